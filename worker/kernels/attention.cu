// Attention over the paged cache, grouped and latent, and what comes before it. A warp does one head of one row.
#include "order.cuh"

using namespace dev;

constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / WARP;

// Where one row stands.
struct Row {
    u32 position, sequence;
    u32 block, slot;  // where its key and value go
};
static_assert(sizeof(Row) == 16, "what the host writes");

// Where things lie in a cache, in elements: key d of slot t at block + head + d * key_d + t * key_t, and its value in the same way.
struct Layout {
    u64 block;
    u32 head;
    u32 key_d, key_t;
    u32 value, value_t;
};

enum HeadNorm { NO_NORM, BEFORE, WHOLE, AFTER };
enum Turn { NO_TURN, HALF, INTERLEAVED };

// A head's rotation by the table's row of its position.
DEVICE void rotate(float *x, const float *cos, const float *sin, u32 pairs, u32 turn) {
    for (u32 i = lane(); i < pairs; i += WARP) {
        const u32 first = turn == HALF ? i : 2 * i, second = turn == HALF ? i + pairs : 2 * i + 1;
        const float a = x[first], b = x[second];
        x[first] = fused(a, cos[i], 0.0f - b * sin[i]);
        x[second] = fused(b, cos[i], a * sin[i]);
    }
    sync_warp();
}

// x = x * by (* weight)
DEVICE void weigh(float *x, u32 n, float by, const float *weight) {
    sync_warp();
    for (u32 i = lane(); i < n; i += WARP) x[i] = weight ? x[i] * by * weight[i] : x[i] * by;
    sync_warp();
}

struct SquaresArgs {
    const float *qkv;
    float *out;
    u32 n, cols, heads, kv_heads, dim;
    u32 first;         // column of the first query head
    u32 keys, counts;  // column of the first key head, and whether there is one
};

// A warp a column of `out`.
KERNEL(THREADS, head_squares, SquaresArgs) {
    const u32 item = block_x() * WARPS + warp();
    if (item >= args.n * args.cols) return;
    const u32 row = item / args.cols, column = item % args.cols;
    u32 head = ~0u;
    if (column >= args.first && column < args.first + args.heads) head = column - args.first;
    if (args.counts && column >= args.keys && column < args.keys + args.kv_heads) head = args.heads + column - args.keys;
    float square = 0.0f;
    if (head != ~0u) square = order::squares(args.qkv + (u64(row) * (args.heads + 2 * args.kv_heads) + head) * args.dim, args.dim);
    if (lane() == 0) args.out[item] = square;
}

struct PrepareArgs {
    float *qkv;
    void *cache;
    const Row *rows;
    const float *query_weight, *key_weight;
    const float *squares;       // of all heads of a row, for WHOLE
    const float *cos, *sin;
    const float *query_scale;   // by position
    Layout layout;
    u32 n, heads, kv_heads, dim;
    u32 norm, turn, pairs;
    u32 square_cols, all_heads;
    float eps;
};

// A warp a head: norms, rotates and scales queries; norms and rotates keys and writes them; writes values.
template <class T>
DEVICE void prepare(const PrepareArgs &args) {
    const u32 each = args.heads + 2 * args.kv_heads, item = block_x() * WARPS + warp(), dim = args.dim;
    if (item >= args.n * each) return;
    const Row at = args.rows[item / each];
    const u32 head = item % each;
    float *x = args.qkv + u64(item) * dim;
    const bool query = head < args.heads, value = head >= args.heads + args.kv_heads;
    if (!value) {
        if (args.norm == BEFORE) {
            weigh(x, dim, order::inverse_root(order::squares(x, dim), dim, args.eps), query ? args.query_weight : args.key_weight);
        } else if (args.norm == WHOLE) {
            const float *squares = args.squares + u64(item / each) * args.square_cols + (query ? 0 : args.all_heads);
            const u32 count = query ? args.all_heads : args.square_cols - args.all_heads;
            const float by = order::inverse_root(order::sum(squares, count), count * dim, args.eps);
            weigh(x, dim, by, query ? args.query_weight + head * dim : args.key_weight + (head - args.heads) * dim);
        }
        if (args.turn != NO_TURN) {
            const u64 of = u64(at.position) * args.pairs;
            rotate(x, args.cos + of, args.sin + of, args.pairs, args.turn);
        }
        if (args.norm == AFTER) weigh(x, dim, order::inverse_root(order::squares(x, dim), dim, args.eps), nullptr);
        if (query) {
            if (args.query_scale) weigh(x, dim, args.query_scale[at.position], nullptr);
            return;
        }
    }
    const u32 kv = value ? head - args.heads - args.kv_heads : head - args.heads;
    T *cache = static_cast<T *>(args.cache) + at.block * args.layout.block + kv * args.layout.head;
    for (u32 d = lane(); d < dim; d += WARP)
        store(cache + (value ? args.layout.value + at.slot * args.layout.value_t + d : d * args.layout.key_d + at.slot * args.layout.key_t), x[d]);
}

KERNEL(THREADS, prepare_f32, PrepareArgs) { prepare<float>(args); }
KERNEL(THREADS, prepare_bf16, PrepareArgs) { prepare<bf16>(args); }

struct LatentArgs {
    float *q, *kv;
    void *cache;
    const Row *rows;
    const float *weight;
    const float *cos, *sin;
    const float *query_scale;
    Layout layout;
    u32 n, heads, rank, nope, pairs, turn;
    float eps;
};

// A warp a query head, and one for the cached row.
template <class T>
DEVICE void latent(const LatentArgs &args) {
    const u32 item = block_x() * WARPS + warp();
    if (item >= args.n * (args.heads + 1)) return;
    const u32 row = item / (args.heads + 1), head = item % (args.heads + 1), turned = 2 * args.pairs;
    const Row at = args.rows[row];
    const float *cos = args.cos + u64(at.position) * args.pairs, *sin = args.sin + u64(at.position) * args.pairs;
    if (head < args.heads) {
        float *x = args.q + (u64(row) * args.heads + head) * (args.nope + turned);
        rotate(x + args.nope, cos, sin, args.pairs, args.turn);
        if (args.query_scale) weigh(x, args.nope + turned, args.query_scale[at.position], nullptr);
        return;
    }
    float *x = args.kv + u64(row) * (args.rank + turned);
    weigh(x, args.rank, order::inverse_root(order::squares(x, args.rank), args.rank, args.eps), args.weight);
    rotate(x + args.rank, cos, sin, args.pairs, args.turn);
    T *cache = static_cast<T *>(args.cache) + at.block * args.layout.block + at.slot * args.layout.key_t;
    for (u32 d = lane(); d < args.rank + turned; d += WARP) store(cache + d, x[d]);
}

KERNEL(THREADS, latent_f32, LatentArgs) { latent<float>(args); }
KERNEL(THREADS, latent_bf16, LatentArgs) { latent<bf16>(args); }

enum Sees { ALL, WINDOW, CHUNK };

struct AttendArgs {
    const float *q, *q_rest;  // a query's first channels, and the rest of them
    const void *cache;
    void *out;
    const Row *rows;
    const u32 *tables, *starts;  // block tables, and where each sequence's begins
    const float *slopes, *sinks;
    Layout layout;
    u32 n, heads, group;
    u32 first, q_row, q_head;          // channels, and distances of rows and heads
    u32 rest, rest_row, rest_head;
    u32 value_dim;
    u32 sees, size;
    float scale;
};

// Spans of 32 positions, each with a maximum of its own, merged left to right; positions are lanes for scores, channels for answers.
template <class T>
DEVICE void attend(const AttendArgs &args) {
    SHARED(float, weights, THREADS);
    SHARED_DYNAMIC(float, answers);
    const u32 item = block_x() * WARPS + warp();
    if (item >= args.n * args.heads) return;
    const u32 row = item / args.heads, head = item % args.heads, own = args.rows[row].position, end = own + 1;
    u32 start = 0;
    if (args.sees == WINDOW) start = end > args.size ? end - args.size : 0;
    if (args.sees == CHUNK) start = own / args.size * args.size;
    const float *q = args.q + u64(row) * args.q_row + u64(head) * args.q_head;
    const float *rest = args.rest ? args.q_rest + u64(row) * args.rest_row + u64(head) * args.rest_head : nullptr;
    const u32 *table = args.tables + args.starts[args.rows[row].sequence];
    float *answer = answers + warp() * args.value_dim, *weight = weights + warp() * WARP;
    for (u32 c = lane(); c < args.value_dim; c += WARP) answer[c] = 0.0f;
    float most = order::LOWEST, total = 0.0f, old_scale = 0.0f;
    for (u32 span = start / order::SPAN; span * order::SPAN < end; span++) {
        const T *cache = static_cast<const T *>(args.cache) + table[span] * args.layout.block + head / args.group * args.layout.head;
        const u32 from = start > span * order::SPAN ? start - span * order::SPAN : 0;
        const u32 to = end - span * order::SPAN < order::SPAN ? end - span * order::SPAN : order::SPAN;
        const bool seen = lane() >= from && lane() < to;
        float score = 0.0f;
        if (seen) {
            const T *key = cache + lane() * args.layout.key_t;
            for (u32 d = 0; d < args.first; d++) score = fused(q[d], wide(key[d * args.layout.key_d]), score);
            key += args.first * args.layout.key_d;
            for (u32 d = 0; d < args.rest; d++) score = fused(rest[d], wide(key[d * args.layout.key_d]), score);
            score = score * args.scale;
            if (args.slopes) score = fused(args.slopes[head], float(lane()) - (float(own) - float(span * order::SPAN)), score);
        }
        const float high = order::most_of_warp(seen ? score : from_bits(0xff800000u));
        const float p = seen ? order::exp(score - high) : 0.0f;
        const float sum = order::sum_of_warp(p);
        const float next = most > high ? most : high;
        const float new_scale = order::exp(high - next);
        old_scale = order::exp(most - next);
        total = fused(sum, new_scale, total * old_scale);
        most = next;
        weight[lane()] = p;
        sync_warp();
        for (u32 c = lane(); c < args.value_dim; c += WARP) {
            float o = 0.0f;
            for (u32 t = from; t < to; t++) o = fused(weight[t], wide(cache[args.layout.value + t * args.layout.value_t + c]), o);
            answer[c] = fused(o, new_scale, answer[c] * old_scale);
        }
        sync_warp();
    }
    float inverse = 1.0f / total;
    if (args.sinks) {
        // A last position without a value.
        const float sink = args.sinks[head], next = most > sink ? most : sink;
        old_scale = order::exp(most - next);
        total = fused(1.0f, order::exp(sink - next), total * old_scale);
        inverse = old_scale / total;
    }
    T *out = static_cast<T *>(args.out) + u64(item) * args.value_dim;
    for (u32 c = lane(); c < args.value_dim; c += WARP) store(out + c, answer[c] * inverse);
}

KERNEL(THREADS, attend_f32, AttendArgs) { attend<float>(args); }
KERNEL(THREADS, attend_bf16, AttendArgs) { attend<bf16>(args); }
