// A kernel with one synchronisation bug at a time, chosen by `bug`; without one, the sums of its blocks' inputs in a fixed order.
#include "dev.cuh"

using namespace dev;

struct PlantedArgs {
    const float *in;   // [blocks][4][128]
    float *out;        // [blocks][128]
    u32 *matrix;       // [blocks][32][4], of ldmatrix and mma
    u32 bug;
};

constexpr u32 THREADS = 128;
constexpr u32 STAGES = 2;
constexpr u32 TILES = 4;

// The bugs; a test names each.
enum Bug {
    NONE,
    NO_BARRIER_AFTER_WRITE,
    NO_BARRIER_BEFORE_OVERWRITE,
    NO_WAIT_FOR_COPIES,
    WAIT_FOR_TOO_FEW,
    NO_COMMIT,
    NO_BARRIER_AFTER_WAIT,
    COPY_INTO_A_STAGE_IN_USE,
    NO_WARP_BARRIER,
    WARP_BARRIER_FOR_BLOCK,
    READS_UNWRITTEN,
    HALF_A_WARP_SHUFFLES,
    HALF_A_BLOCK_MEETS,
    LANES_DIVERGE,
    ENDS_TOO_SOON,
    WRONG_BARRIER_COUNT,
    PAST_THE_END,
    NO_BARRIER_BEFORE_MATRICES,
    BUGS,
};

KERNEL(THREADS, planted, PlantedArgs) {
    SHARED(float, stages, STAGES * THREADS);
    SHARED(float, sums, THREADS);
    SHARED(u16, tile, 16 * 16);
    const u32 me = thread(), bug = args.bug;
    const float *in = args.in + block_x() * TILES * THREADS;

    // A ring of copies: each thread brings 16 bytes of a tile, everyone reads its mirror's number.
    auto bring = [&](u32 step) {
        if (me < THREADS / 4) copy_async_16(stages + step % STAGES * THREADS + me * 4, in + step * THREADS + me * 4);
        if (bug != NO_COMMIT) commit_async();
    };
    float total = 0.0f;
    bring(0);
    for (u32 step = 0; step < TILES; step++) {
        if (bug == COPY_INTO_A_STAGE_IN_USE) {
            if (step + 1 < TILES) bring(step + 1); else commit_async();
            if (step + 2 < TILES && me < THREADS / 4)
                copy_async_16(stages + step % STAGES * THREADS + me * 4, in + (step + 2) * THREADS + me * 4);
        } else if (step + 1 < TILES) {
            bring(step + 1);
        } else {
            commit_async();
        }
        if (bug == WAIT_FOR_TOO_FEW) wait_async<2>();
        else if (bug != NO_WAIT_FOR_COPIES) wait_async<1>();
        if (bug != NO_BARRIER_AFTER_WAIT) sync_block();
        total = total + stages[step % STAGES * THREADS + (THREADS - 1 - me)];
        if (bug != NO_BARRIER_BEFORE_OVERWRITE) sync_block();
    }

    // Neighbours by shared memory: within a warp, then across the block.
    if (bug != READS_UNWRITTEN || me != 77) sums[me] = total;
    if (bug != NO_WARP_BARRIER) sync_warp();
    total = total + sums[me / WARP * WARP + (me + 1) % WARP];
    sync_warp();
    sums[me] = total;
    if (bug == WARP_BARRIER_FOR_BLOCK) sync_warp();
    else if (bug != NO_BARRIER_AFTER_WRITE) sync_block();
    total = total + sums[(me + 40) % THREADS];

    if (bug == HALF_A_WARP_SHUFFLES) {
        if (lane() < 16) total = total + shuffle_xor(total, 1);
    } else if (bug == LANES_DIVERGE && lane() == 3) {
        total = total + float(ballot(true) != 0);
    } else {
        total = total + shuffle_xor(total, 1);
    }
    if (bug == HALF_A_BLOCK_MEETS) {
        if (warp() % 2) sync_block();
    } else if (bug == ENDS_TOO_SOON && me >= 96) {
        return;
    } else {
        sync_block();
    }
    // Two halves of the block meet apart.
    sync_some(1 + warp() / 2, bug == WRONG_BARRIER_COUNT ? THREADS : THREADS / 2);

    // A tile of bf16 in shared memory meets itself in the tensor cores.
    const u32 spread = me / WARP * 64 + lane() * 2;
    tile[spread] = u16(0x3f80 + (me * 7 & 63));
    tile[spread + 1] = u16(0x3f80 + (me * 11 & 63));
    if (bug == PAST_THE_END) sums[THREADS + (me == 5)] = 1.0f;
    if (bug != NO_BARRIER_BEFORE_MATRICES) sync_block();
    if (warp() == 0) {
        u32 a[4], b[2];
        load_matrices(a, tile + (lane() % 16) * 16 + lane() / 16 * 8);
        b[0] = a[0];
        b[1] = a[1];
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_16816(d, a, b);
        for (u32 i = 0; i < 4; i++) args.matrix[(block_x() * WARP + lane()) * 4 + i] = bits(d[i]);
    }
    args.out[block_x() * THREADS + me] = total;
}
