// Products of bf16 on tensor cores (mma.sync of sm_80 and later). An output is, in each segment, four chains from +0.0: of the steps of
// sixteen inputs 0, 4, 8 and so on, 1, 5, 9, ...; the tree joins chains, then segments; the bias comes last. In which order a core adds
// a step's sixteen products is its own affair: it depends on nothing but them, so an output depends neither on its row's
// neighbours nor on who holds which segments. Codes are multiplied as they are, which bf16 holds: their chains are of runs, whose sums
// are scaled as in matmul.cu.
//
// A block is a panel of 64 outputs for some tiles of sixteen rows: eight warps, each one chain of one half of the panel. Four words
// that a lane reads at once, of a pair of inputs for four neighbouring outputs, are the second operands of four products: so
// output 4 j + t of a half is column j of product t.
#include "products.cuh"

constexpr u32 WARPS = 8;
constexpr u32 CHAINS = 4;
constexpr u32 HALF = PANEL / 2;
constexpr u32 STEP = 16;
constexpr u32 PRODUCTS = 4;

struct alignas(16) Words {
    u32 of[PRODUCTS];
};

// What a lane works on.
template <u32 TILES>
struct Lane {
    const bf16 *rows[2 * TILES];  // of its elements of each tile; null where there is none
    Place at;                     // the first of its four outputs, as second operand
    u32 chain, half, column, quarter;
    bool even;                    // two inputs are one word
};

// Words of inputs k and k + 1 for four outputs; zeros behind the segment's `end` and the panel's width.
DEVICE Words words_at(const Weight &w, const Place &at, u32 segment, u32 k, u32 end) {
    if (k >= end || at.lane >= at.width) return Words{{0, 0, 0, 0}};
    const u32 pair = segment * w.pairs + (k - segment * (w.cols / w.segments)) / 2;
    return *reinterpret_cast<const Words *>(w.words + u64(at.panel) * PANEL * w.segments * w.pairs + u64(pair) * at.width + at.lane);
}

template <u32 FORM>
DEVICE Words codes_as(const Weight &w, const Place &at, u32 k) {
    Words words = {{0, 0, 0, 0}};
    if (at.lane >= at.width) return words;
    UNROLL for (u32 t = 0; t < PRODUCTS; t++) {
        Place one = at;
        one.lane = at.lane + t;
        words.of[t] = bits(held_as<FORM>(w, one, k)) >> 16 | (bits(held_as<FORM>(w, one, k + 1)) & 0xffff0000u);
    }
    return words;
}

// The same of codes, of which a run has all of its inputs.
DEVICE Words codes_at(const Weight &w, const Place &at, u32 k) {
    switch (w.form) {
        case NIBBLES: return codes_as<NIBBLES>(w, at, k);
        case INTEGERS: return codes_as<INTEGERS>(w, at, k);
        default: return codes_as<FP8>(w, at, k);
    }
}

// Inputs k and k + 1 of a row, or zeros.
DEVICE u32 inputs_at(const bf16 *row, u32 k, u32 end, bool even) {
    if (!row || k >= end) return 0;
    if (even) return *reinterpret_cast<const u32 *>(row + k);
    return u32(row[k].bits) | (k + 1 < end ? u32(row[k + 1].bits) << 16 : 0);
}

// First operands of one step of tile `m`.
template <u32 TILES>
DEVICE void bring(const Lane<TILES> &lane, u32 m, u32 k, u32 end, u32 (&a)[4]) {
    UNROLL for (u32 i = 0; i < 4; i++) a[i] = inputs_at(lane.rows[2 * m + i % 2], k + i / 2 * 8, end, lane.even);
}

template <u32 TILES>
DEVICE void plain(const Weight &w, const Lane<TILES> &lane, u32 segment, float (&acc)[TILES][PRODUCTS][4]) {
    const u32 length = w.cols / w.segments, first = segment * length, end = first + length;
    u32 k = first + lane.chain * STEP + 2 * lane.quarter;
    Words low = words_at(w, lane.at, segment, k, end), high = words_at(w, lane.at, segment, k + 8, end);
    // All lanes take the same steps, also those whose own inputs lie behind the end.
    for (u32 step = lane.chain * STEP; step < length; step += CHAINS * STEP, k += CHAINS * STEP) {
        const Words now[2] = {low, high};
        // The next ones are on their way meanwhile.
        low = words_at(w, lane.at, segment, k + CHAINS * STEP, end);
        high = words_at(w, lane.at, segment, k + CHAINS * STEP + 8, end);
        UNROLL for (u32 m = 0; m < TILES; m++) {
            u32 a[4];
            bring(lane, m, k, end, a);
            UNROLL for (u32 t = 0; t < PRODUCTS; t++) {
                const u32 b[2] = {now[0].of[t], now[1].of[t]};
                mma_16816(acc[m][t], a, b);
            }
        }
    }
}

template <u32 TILES>
DEVICE void coded(const Weight &w, const Lane<TILES> &lane, u32 segment, float (&acc)[TILES][PRODUCTS][4]) {
    const u32 length = w.cols / w.segments, end = (segment + 1) * length;
    const bool shifted = is_shifted(w);
    // Two ones of bf16: their products are the inputs' sums.
    const u32 ones[2] = {0x3f803f80u, 0x3f803f80u};
    for (u32 run = segment * length + lane.chain * w.run; run < end; run += CHAINS * w.run) {
        float sums[TILES][PRODUCTS][4], totals[TILES][4];
        UNROLL for (u32 m = 0; m < TILES; m++)
            UNROLL for (u32 i = 0; i < 4; i++) {
                totals[m][i] = 0.0f;
                UNROLL for (u32 t = 0; t < PRODUCTS; t++) sums[m][t][i] = 0.0f;
            }
        for (u32 step = 0; step < w.run; step += STEP) {
            const u32 k = run + step + 2 * lane.quarter;
            const Words low = codes_at(w, lane.at, k), high = codes_at(w, lane.at, k + 8);
            UNROLL for (u32 m = 0; m < TILES; m++) {
                u32 a[4];
                bring(lane, m, k, end, a);
                UNROLL for (u32 t = 0; t < PRODUCTS; t++) {
                    const u32 b[2] = {low.of[t], high.of[t]};
                    mma_16816(sums[m][t], a, b);
                }
                if (shifted) mma_16816(totals[m], a, ones);
            }
        }
        UNROLL for (u32 t = 0; t < PRODUCTS; t++)
            UNROLL for (u32 i = 0; i < 2; i++) {
                Place one = lane.at;
                one.lane = lane.half * HALF + (lane.quarter * 2 + i) * PRODUCTS + t;
                if (one.lane >= one.width) continue;
                const float raw = scale_of(w, one, run), scale = raw * w.unit;
                float shift = 0.0f;
                if (shifted) shift = fused(raw, point_of(w, one, run), w.minima.count ? minimum_of(w, one, run) : 0.0f);
                UNROLL for (u32 m = 0; m < TILES; m++)
                    UNROLL for (u32 e = i; e < 4; e += 2) {
                        acc[m][t][e] = fused(sums[m][t][e], scale, acc[m][t][e]);
                        if (shifted) acc[m][t][e] = fused(shift, -totals[m][e], acc[m][t][e]);
                    }
            }
    }
}

template <u32 TILES, bool CODES>
DEVICE void multiply(const MatmulArgs &args) {
    constexpr u32 ROWS = TILES * 16, OWN = ROWS * PANEL / (WARPS * WARP);
    SHARED(float, sums, CHAINS * ROWS * PANEL);
    const Tile tile = tile_of(args, ROWS);
    const Weight &w = weight_of(args, tile);
    const bf16 *x = static_cast<const bf16 *>(args.x) + u64(block_z()) * args.x_step;
    Lane<TILES> lane;
    lane.chain = warp() % CHAINS;
    lane.half = warp() / CHAINS;
    lane.column = dev::lane() / 4;
    lane.quarter = dev::lane() % 4;
    lane.at.panel = block_x();
    lane.at.width = width_of(w, lane.at.panel);
    lane.at.lane = lane.half * HALF + lane.column * PRODUCTS;
    lane.even = w.cols / w.segments % 2 == 0 && args.x_stride % 2 == 0 && args.x_step % 2 == 0;
    UNROLL for (u32 i = 0; i < 2 * TILES; i++) {
        const u32 r = i * 8 + lane.column, row = tile.first + r;
        lane.rows[i] = nullptr;
        if (r < tile.count) lane.rows[i] = x + u64(args.picks ? args.picks[row] : row) * args.x_stride;
    }
    order::Tree trees[OWN];
    for (u32 segment = 0; segment < w.segments; segment++) {
        float acc[TILES][PRODUCTS][4];
        UNROLL for (u32 m = 0; m < TILES; m++)
            UNROLL for (u32 t = 0; t < PRODUCTS; t++)
                UNROLL for (u32 i = 0; i < 4; i++) acc[m][t][i] = 0.0f;
        if (!CODES) plain(w, lane, segment, acc);
        else coded(w, lane, segment, acc);
        UNROLL for (u32 m = 0; m < TILES; m++)
            UNROLL for (u32 t = 0; t < PRODUCTS; t++)
                UNROLL for (u32 i = 0; i < 4; i++) {
                    const u32 row = m * 16 + lane.column + i / 2 * 8;
                    const u32 output = lane.half * HALF + (lane.quarter * 2 + i % 2) * PRODUCTS + t;
                    sums[(lane.chain * ROWS + row) * PANEL + output] = acc[m][t][i];
                }
        sync_block();
        UNROLL for (u32 i = 0; i < OWN; i++) {
            const float *own = sums + thread() + i * WARPS * WARP;
            const float one = own[0] + own[ROWS * PANEL], other = own[2 * ROWS * PANEL] + own[3 * ROWS * PANEL];
            order::join(trees[i], segment, one + other);
        }
        sync_block();
    }
    const u32 output = thread() % PANEL, place = lane.at.panel * PANEL + output;
    if (place >= w.rows) return;
    float *out = args.out + u64(block_z()) * args.out_step + place;
    UNROLL for (u32 i = 0; i < OWN; i++) {
        const u32 r = thread() / PANEL + i * (WARPS * WARP / PANEL);
        if (r < tile.count) out[u64(tile.first + r) * args.out_stride] = args.bias ? trees[i].whole + args.bias[place] : trees[i].whole;
    }
}

KERNEL_AMONG(512, WARPS * WARP, tensor_few, MatmulArgs) { multiply<1, false>(args); }
KERNEL_AMONG(512, WARPS * WARP, tensor_many, MatmulArgs) { multiply<2, false>(args); }
KERNEL_AMONG(512, WARPS * WARP, tensor_codes_few, MatmulArgs) { multiply<1, true>(args); }
KERNEL_AMONG(256, WARPS * WARP, tensor_codes_many, MatmulArgs) { multiply<2, true>(args); }
