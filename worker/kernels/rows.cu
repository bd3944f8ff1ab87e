// Operations on one row at a time: norms, sums, activations, copies.
#include "order.cuh"

using namespace dev;

constexpr u32 THREADS = 128;

struct NormArgs {
    const float *x;
    const float *weight;
    const float *bias;  // of norms that centre
    void *out;
    u32 n, width;
    float eps;
};

// A warp a row.
template <class T>
DEVICE void norm(const NormArgs &args) {
    const u32 row = block_x() * (THREADS / WARP) + warp(), width = args.width;
    if (row >= args.n) return;
    const float *x = args.x + u64(row) * width;
    T *out = static_cast<T *>(args.out) + u64(row) * width;
    if (!args.bias) {
        const float inverse = order::inverse_root(order::squares(x, width), width, args.eps);
        for (u32 i = lane(); i < width; i += WARP) store(out + i, x[i] * inverse * args.weight[i]);
        return;
    }
    const float mean = order::sum(x, width) / float(width);
    const float inverse = order::inverse_root(order::squares_from(x, width, mean), width, args.eps);
    for (u32 i = lane(); i < width; i += WARP) store(out + i, fused((x[i] - mean) * inverse, args.weight[i], args.bias[i]));
}

KERNEL(THREADS, norm_f32, NormArgs) { norm<float>(args); }
KERNEL(THREADS, norm_bf16, NormArgs) { norm<bf16>(args); }

struct AddArgs {
    float *x;
    const float *y;
    const float *bias;                // one row for all
    const float *const *row_biases;   // or a row each
    u64 values;
    u32 cols;
};

// x += y (+ bias), or x += the row's own bias.
KERNEL(THREADS, add, AddArgs) {
    const u64 at = u64(block_x()) * THREADS + thread();
    if (at >= args.values) return;
    const u32 column = u32(at % args.cols);
    float y = args.row_biases ? args.row_biases[at / args.cols][column] : args.y[at];
    if (args.bias) y = y + args.bias[column];
    args.x[at] = args.x[at] + y;
}

struct ActivateArgs {
    const float *x;
    void *out;
    u64 values;
    u32 cols;   // of `out`
    u32 gated;  // rows of x are twice as wide
    u32 kind;
    float alpha, limit;
};

enum Activation { SILU, GELU_TANH, CLAMPED_SWIGLU };

// At most `most`; a NaN stays.
DEVICE float below(float x, float most) { return most < x ? most : x; }

template <class T>
DEVICE void activate(const ActivateArgs &args) {
    const u64 at = u64(block_x()) * THREADS + thread();
    if (at >= args.values) return;
    const u64 row = at / args.cols, column = at % args.cols;
    const float *x = args.x + row * args.cols * (args.gated ? 2 : 1) + column;
    float gate = x[0];
    switch (args.kind) {
        case SILU: gate = gate * order::sigmoid(gate); break;
        case GELU_TANH: {
            const float grown = fused(0.044715f, gate * gate, 1.0f);
            gate = gate * order::sigmoid(1.595769f * gate * grown);
            break;
        }
        default:
            gate = below(gate, args.limit);
            gate = gate * order::sigmoid(gate * args.alpha);
    }
    if (args.gated) {
        float up = x[args.cols];
        if (args.kind == CLAMPED_SWIGLU) {
            up = below(up, args.limit);
            up = (up < -args.limit ? -args.limit : up) + 1.0f;
        }
        gate = gate * up;
    }
    store(static_cast<T *>(args.out) + at, gate);
}

KERNEL(THREADS, activate_f32, ActivateArgs) { activate<float>(args); }
KERNEL(THREADS, activate_bf16, ActivateArgs) { activate<bf16>(args); }

struct CopyArgs {
    const void *x;
    void *out;
    const u32 *rows;         // of x, for each row of out; in order without
    const float *weights;    // of each row of out
    u64 values;
    u32 cols;
    u32 x_stride, out_stride;
};

// out = weight * x[rows], rounded once.
template <class From, class To>
DEVICE void copy(const CopyArgs &args) {
    const u64 at = u64(block_x()) * THREADS + thread();
    if (at >= args.values) return;
    const u64 row = at / args.cols, column = at % args.cols;
    float x = wide(static_cast<const From *>(args.x)[(args.rows ? args.rows[row] : row) * args.x_stride + column]);
    if (args.weights) x = x * args.weights[row];
    store(static_cast<To *>(args.out) + row * args.out_stride + column, x);
}

struct SumPartsArgs {
    const float *parts;  // one behind the other
    float *out;
    u64 values;          // of a part
    u32 count;           // a power of two
};

// The balanced tree over `N` parts' values at `at`.
template <u32 N>
DEVICE float tree(const float *at, u64 values) {
    if constexpr (N == 1) return *at;
    else return tree<N / 2>(at, values) + tree<N / 2>(at + values * (N / 2), values);
}

KERNEL(THREADS, sum_parts, SumPartsArgs) {
    const u64 at = u64(block_x()) * THREADS + thread();
    if (at >= args.values) return;
    const float *x = args.parts + at;
    switch (args.count) {
        case 2: args.out[at] = tree<2>(x, args.values); break;
        case 4: args.out[at] = tree<4>(x, args.values); break;
        case 8: args.out[at] = tree<8>(x, args.values); break;
        case 16: args.out[at] = tree<16>(x, args.values); break;
        default: args.out[at] = *x;
    }
}

KERNEL(THREADS, copy_f32, CopyArgs) { copy<float, float>(args); }
KERNEL(THREADS, copy_bf16, CopyArgs) { copy<bf16, bf16>(args); }
KERNEL(THREADS, round_bf16, CopyArgs) { copy<float, bf16>(args); }
