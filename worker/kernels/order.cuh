// The canonical orders of sums and the functions of our own, bit for bit those of the CPU's kernels (`backend/cpu`): what a row gives
// depends on the row alone. Nothing here may be fused or reordered by a compiler.
#pragma once

#include "dev.cuh"

namespace order {

using namespace dev;

// Positions of a span of attention, and of a block of the cache.
constexpr u32 SPAN = 32;
// The maximum of nothing; finite, so that it may be taken from itself.
constexpr float LOWEST = -3.402823466e38f;

// e^x for x <= 0; exactly 0 below -87.
DEVICE float exp(float x) {
    const float least = -87.0f, rounder = 12582912.0f;
    float bounded = least > x ? least : x;
    float t = fused(bounded, 1.4426950408889634f, rounder);
    float n = t - rounder;
    float r = fused(n, -0.6933594f, bounded);
    r = fused(n, 2.1219444e-4f, r);
    float p = 1.984127e-4f;
    p = fused(p, r, 1.3888889e-3f);
    p = fused(p, r, 8.333334e-3f);
    p = fused(p, r, 4.1666668e-2f);
    p = fused(p, r, 1.6666667e-1f);
    p = fused(p, r, 0.5f);
    p = fused(p * r, r, r);
    float e = from_bits(bits(p + 1.0f) + (bits(t) << 23));
    return x < least ? 0.0f : e;
}

DEVICE float sigmoid(float x) {
    float e = exp(x < 0.0f ? x : 0.0f - x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// Sixteen lanes, halved: every lane of a warp gets the sum of its half's.
DEVICE float halve(float sum) {
    for (u32 apart = 8; apart > 0; apart /= 2) sum = sum + shuffle_xor(sum, apart);
    return sum;
}

// Sums of a warp's row of `n` in sixteen lanes, element i in lane i mod 16. Both halves of the warp do the same.
template <class T>
DEVICE float sum(const T *x, u32 n) {
    float total = 0.0f;
    for (u32 i = 0; i < n; i += 16) total = total + (i + lane() % 16 < n ? wide(x[i + lane() % 16]) : 0.0f);
    return halve(total);
}

DEVICE float squares(const float *x, u32 n) {
    float total = 0.0f;
    for (u32 i = lane() % 16; i < n; i += 16) total = fused(x[i], x[i], total);
    return halve(total);
}

DEVICE float squares_from(const float *x, u32 n, float mean) {
    float total = 0.0f;
    for (u32 i = lane() % 16; i < n; i += 16) total = fused(x[i] - mean, x[i] - mean, total);
    return halve(total);
}

DEVICE float inverse_root(float squares, u32 n, float eps) { return 1.0f / root(squares / float(n) + eps); }

// The sum and the greatest of 32 lanes, for all of them: lane i + lane i + 16, then + 8, + 4, + 2, + 1.
DEVICE float sum_of_warp(float x) { return halve(x + shuffle_xor(x, 16)); }
DEVICE float most_of_warp(float x) {
    for (u32 apart = 16; apart > 0; apart /= 2) {
        float other = shuffle_xor(x, apart);
        x = x > other ? x : other;
    }
    return x;
}

// A balanced binary tree over up to eight sums that come one after the other, neighbours first.
struct Tree {
    float pending[3];
    float whole;
};

// Takes in sum `index`; after 1, 2, 4 or 8 of them `whole` is theirs.
DEVICE void join(Tree &tree, u32 index, float sum) {
    tree.whole = sum;
    if (!(index & 1)) {
        tree.pending[0] = sum;
        return;
    }
    tree.whole = sum = tree.pending[0] + sum;
    if (!(index & 2)) {
        tree.pending[1] = sum;
        return;
    }
    tree.whole = sum = tree.pending[1] + sum;
    if (!(index & 4)) {
        tree.pending[2] = sum;
        return;
    }
    tree.whole = tree.pending[2] + sum;
}

}  // namespace order
