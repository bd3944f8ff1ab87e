// What a multiplication is asked, however it is done.
#pragma once

#include "weights.cuh"

// Rows of one weight.
struct Tile {
    u32 weight, first, count;
};
static_assert(sizeof(Tile) == 12, "what the host writes");

struct MatmulArgs {
    const void *x;
    float *out;
    const float *bias;
    const Weight *one;           // the weight of all rows
    const Weight *const *many;   // or of each tile, or of each z
    const Tile *tiles;           // of block y
    const u32 *picks;            // the row of x of each row of out
    u32 n;                       // rows, where there are no tiles
    u32 x_stride, x_step;        // of rows, and from one z to the next
    u32 out_stride, out_step;
};

// This block's, of at most `most` rows.
DEVICE Tile tile_of(const MatmulArgs &args, u32 most) {
    if (args.tiles) return args.tiles[block_y()];
    const u32 first = block_y() * most, left = args.n - first;
    return Tile{block_z(), first, left < most ? left : most};
}

DEVICE const Weight &weight_of(const MatmulArgs &args, const Tile &tile) { return args.many ? *args.many[tile.weight] : *args.one; }
