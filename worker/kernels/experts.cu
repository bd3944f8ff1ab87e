// Which experts a row visits, and the way back from them.
#include "order.cuh"

using namespace dev;

struct RouteArgs {
    const float *logits;
    const float *correction;
    u32 *ids;
    float *weights;
    u32 n, experts, active;
    u32 softmax, groups, kept;  // no groups: 0
    u32 renormalise;
    float eps, scale;
};

// Whether a score goes before another: ties, and what can't be compared, go to the lower id.
DEVICE bool before(float a, u32 a_id, float b, u32 b_id) {
    if (a > b || (b != b && a == a)) return true;
    if (b > a || (a != a && b == b)) return false;
    return a_id < b_id;
}

constexpr u32 NOBODY = ~0u;

// The first of what the lanes bring (nothing: NOBODY), for all of them.
DEVICE u32 first_of_warp(float &score, u32 id) {
    for (u32 apart = WARP / 2; apart > 0; apart /= 2) {
        const float other = shuffle_xor(score, apart);
        const u32 other_id = shuffle_xor(id, apart);
        if (other_id != NOBODY && (id == NOBODY || before(other, other_id, score, id))) {
            score = other;
            id = other_id;
        }
    }
    return id;
}

// The best of `count` scores from `from` on that are not taken yet, which it takes.
DEVICE u32 take(const float *scores, u32 *taken, u32 from, u32 count, float &score) {
    u32 id = NOBODY;
    score = 0.0f;
    for (u32 i = from + lane(); i < from + count; i += WARP)
        if (!taken[i] && (id == NOBODY || before(scores[i], i, score, id))) {
            score = scores[i];
            id = i;
        }
    id = first_of_warp(score, id);
    sync_warp();
    if (lane() == 0) taken[id] = 1;
    sync_warp();
    return id;
}

// A warp a row; dynamic shared memory: scores, biased scores and marks of the experts, then ranks and marks of the groups.
KERNEL(32, route, RouteArgs) {
    SHARED_DYNAMIC(float, scores);
    float *biased = scores + args.experts;
    u32 *taken = reinterpret_cast<u32 *>(biased + args.experts);
    float *ranks = reinterpret_cast<float *>(taken + args.experts);
    u32 *groups_taken = reinterpret_cast<u32 *>(ranks + args.groups);
    const float *logits = args.logits + u64(block_x()) * args.experts;
    const u32 experts = args.experts;
    float most = from_bits(0xff800000u);
    for (u32 i = lane(); i < experts; i += WARP) most = logits[i] > most ? logits[i] : most;
    most = order::most_of_warp(most);
    for (u32 i = lane(); i < experts; i += WARP) scores[i] = args.softmax ? order::exp(logits[i] - most) : order::sigmoid(logits[i]);
    sync_warp();
    if (args.softmax) {
        const float total = order::sum(scores, experts);
        sync_warp();
        for (u32 i = lane(); i < experts; i += WARP) scores[i] = scores[i] / total;
    }
    for (u32 i = lane(); i < experts; i += WARP) {
        // Scores rise with logits; where they round to the same, logits still tell them apart.
        if (!args.correction && !args.groups) biased[i] = logits[i];
        else biased[i] = args.correction ? scores[i] + args.correction[i] : scores[i] + 0.0f;
        taken[i] = 0;
    }
    sync_warp();
    if (args.groups) {
        const u32 each = experts / args.groups;
        for (u32 group = 0; group < args.groups; group++) {
            float rank = 0.0f, score;
            for (u32 best = 0; best < 2 && best < each; best++) {
                take(biased, taken, group * each, each, score);
                rank = rank + score;
            }
            if (lane() == 0) ranks[group] = rank, groups_taken[group] = 0;
        }
        sync_warp();
        for (u32 kept = 0; kept < args.kept; kept++) {
            float score;
            take(ranks, groups_taken, 0, args.groups, score);
        }
        for (u32 i = lane(); i < experts; i += WARP) taken[i] = !groups_taken[i / each];
        sync_warp();
    }
    u32 *ids = args.ids + u64(block_x()) * args.active;
    float *weights = args.weights + u64(block_x()) * args.active;
    float sum = 0.0f;
    for (u32 choice = 0; choice < args.active; choice++) {
        float score;
        const u32 id = take(biased, taken, 0, experts, score);
        sum = sum + scores[id];
        if (lane() == 0) ids[choice] = id;
    }
    sync_warp();
    const float divisor = sum + args.eps;
    for (u32 choice = lane(); choice < args.active; choice += WARP) {
        const float weight = scores[ids[choice]];
        weights[choice] = (args.renormalise ? weight / divisor : weight) * args.scale;
    }
}

constexpr u32 COLUMNS = 128;

struct CombineArgs {
    const float *pairs;
    float *out;
    const u32 *starts;       // of each row's pairs
    const u32 *of_row;       // the pairs, ascending and so by expert
    const u32 *ends;         // of each segment's pairs
    const float *weights;
    u32 cols, segments;
};

// A thread a column of a row: terms by ascending expert inside each segment of experts, segments by the tree.
KERNEL(COLUMNS, combine, CombineArgs) {
    const u32 column = block_x() * COLUMNS + thread(), row = block_y();
    if (column >= args.cols) return;
    u32 next = args.starts[row];
    const u32 end = args.starts[row + 1];
    order::Tree tree = {};
    for (u32 segment = 0; segment < args.segments; segment++) {
        float sum = 0.0f;
        for (; next < end && args.of_row[next] < args.ends[segment]; next++) {
            const u32 pair = args.of_row[next];
            const float term = args.weights[pair] * args.pairs[u64(pair) * args.cols + column];
            sum = sum + term;
        }
        order::join(tree, segment, sum);
    }
    args.out[u64(row) * args.cols + column] = tree.whole;
}
