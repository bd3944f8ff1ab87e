// Products with weights: every output is one chain of f32 over its inputs inside a segment, from +0.0, the odd input of a pair first;
// segments are joined by the tree; the bias comes last. A thread is an output, a block a panel of 64 for up to eight rows.
#include "products.cuh"

constexpr u32 ROWS = 8;
// Inputs of a row in shared memory at once: no run of codes is longer.
constexpr u32 CHUNK = 128;

// Inputs from + [0, count) of the tile's rows to shared memory; behind `end` they are zero.
template <class T>
DEVICE void bring(const MatmulArgs &args, const Tile &tile, u32 from, u32 count, u32 end, float *xs) {
    const T *x = static_cast<const T *>(args.x) + u64(block_z()) * args.x_step;
    sync_block();
    for (u32 at = thread(); at < ROWS * count; at += PANEL) {
        const u32 r = at / count, k = from + at % count;
        float v = 0.0f;
        if (r < tile.count && k < end) {
            const u32 row = tile.first + r;
            v = wide(x[u64(args.picks ? args.picks[row] : row) * args.x_stride + k]);
        }
        xs[r * CHUNK + at % count] = v;
    }
    sync_block();
}

template <class T, bool FLOAT>
DEVICE void plain(const MatmulArgs &args, const Weight &w, const Tile &tile, const Place &at, u32 segment, float *xs, float (&acc)[ROWS]) {
    const u32 length = w.cols / w.segments, first = segment * length, words = FLOAT ? 2 : 1;
    const u32 *panel = w.words + (u64(at.panel) * PANEL * w.segments * w.pairs + u64(segment) * w.pairs * at.width) * words + at.lane;
    for (u32 k = 0; k < length; k += CHUNK) {
        const u32 pairs = ((length - k < CHUNK ? length - k : CHUNK) + 1) / 2;
        bring<T>(args, tile, first + k, 2 * pairs, first + length, xs);
        if (at.lane >= at.width) continue;
        for (u32 pair = 0; pair < pairs; pair++) {
            const u64 row = k / 2 + pair;
            float even, odd;
            if (FLOAT) {
                even = from_bits(panel[2 * row * at.width]);
                odd = from_bits(panel[(2 * row + 1) * at.width]);
            } else {
                const u32 word = panel[row * at.width];
                even = from_bits(word << 16);
                odd = from_bits(word & 0xffff0000u);
            }
            UNROLL for (u32 r = 0; r < ROWS; r++) {
                acc[r] = fused(xs[r * CHUNK + 2 * pair + 1], odd, acc[r]);
                acc[r] = fused(xs[r * CHUNK + 2 * pair], even, acc[r]);
            }
        }
    }
}

// Codes are multiplied as they are; a run's sum is scaled once, and what is taken from its codes is taken from its inputs' sum.
template <class T>
DEVICE void coded(const MatmulArgs &args, const Weight &w, const Tile &tile, const Place &at, u32 segment, float *xs, float *totals, float (&acc)[ROWS]) {
    const u32 length = w.cols / w.segments;
    const bool shifted = is_shifted(w);
    for (u32 k = segment * length; k < (segment + 1) * length; k += w.run) {
        bring<T>(args, tile, k, w.run, k + w.run, xs);
        if (shifted) {
            // Sixteen lanes a row; a warp sums two.
            for (u32 r = thread() / 16; r < ROWS; r += PANEL / 16) {
                const float total = order::sum(xs + r * CHUNK, w.run);
                if (lane() % 16 == 0) totals[r] = total;
            }
            sync_block();
        }
        if (at.lane >= at.width) continue;
        float sums[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; r++) sums[r] = 0.0f;
        for (u32 i = 0; i < w.run; i += 2) {
            const float even = held(w, at, k + i), odd = held(w, at, k + i + 1);
            UNROLL for (u32 r = 0; r < ROWS; r++) {
                sums[r] = fused(xs[r * CHUNK + i + 1], odd, sums[r]);
                sums[r] = fused(xs[r * CHUNK + i], even, sums[r]);
            }
        }
        const float raw = scale_of(w, at, k), scale = raw * w.unit;
        UNROLL for (u32 r = 0; r < ROWS; r++) acc[r] = fused(sums[r], scale, acc[r]);
        if (shifted) {
            const float shift = fused(raw, point_of(w, at, k), w.minima.count ? minimum_of(w, at, k) : 0.0f);
            UNROLL for (u32 r = 0; r < ROWS; r++) acc[r] = fused(shift, -totals[r], acc[r]);
        }
    }
}

template <class T>
DEVICE void matmul(const MatmulArgs &args) {
    SHARED(float, xs, ROWS * CHUNK);
    SHARED(float, totals, ROWS);
    // Touched once a segment: not worth 32 registers.
    SHARED(order::Tree, trees, ROWS * PANEL);
    const Tile tile = tile_of(args, ROWS);
    const Weight &w = weight_of(args, tile);
    Place at;
    at.panel = block_x();
    at.width = width_of(w, at.panel);
    at.lane = thread();
    order::Tree *const own = trees + at.lane;
    for (u32 segment = 0; segment < w.segments; segment++) {
        float acc[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; r++) acc[r] = 0.0f;
        if (w.form == HALVES) plain<T, false>(args, w, tile, at, segment, xs, acc);
        else if (w.form == FLOATS) plain<T, true>(args, w, tile, at, segment, xs, acc);
        else coded<T>(args, w, tile, at, segment, xs, totals, acc);
        UNROLL for (u32 r = 0; r < ROWS; r++) order::join(own[r * PANEL], segment, acc[r]);
    }
    const u32 column = at.panel * PANEL + at.lane;
    if (column >= w.rows) return;
    float *out = args.out + u64(block_z()) * args.out_step + column;
    UNROLL for (u32 r = 0; r < ROWS; r++)
        if (r < tile.count) out[u64(tile.first + r) * args.out_stride] = args.bias ? own[r * PANEL].whole + args.bias[column] : own[r * PANEL].whole;
}

KERNEL_AMONG(640, PANEL, matmul_f32, MatmulArgs) { matmul<float>(args); }
KERNEL_AMONG(640, PANEL, matmul_bf16, MatmulArgs) { matmul<bf16>(args); }

struct EmbedArgs {
    const Weight *table;
    const u32 *ids;
    float *out;
    u32 n, first;
};

// A row of the table for each id, or zeros where it is another rank's.
KERNEL(PANEL, embed, EmbedArgs) {
    const Weight &w = *args.table;
    const u32 row = args.ids[block_y()] - args.first;
    const bool own = args.ids[block_y()] >= args.first && row < w.rows;
    Place at;
    at.panel = own ? row / PANEL : 0;
    at.width = width_of(w, at.panel);
    at.lane = row % PANEL;
    for (u32 k = block_x() * PANEL + thread(); k < w.cols; k += blocks_x() * PANEL)
        args.out[u64(block_y()) * w.cols + k] = own ? value_of(w, at, k) : 0.0f;
}
