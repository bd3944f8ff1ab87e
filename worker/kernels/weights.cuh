// A weight matrix as the worker packs it (`backend/cpu/simd/pack.rs`, `coded.rs`): panels of 64 outputs, a pair of inputs after the
// other, each as wide as the panel.
#pragma once

#include "order.cuh"

using namespace dev;

constexpr u32 PANEL = 64;

enum Form { HALVES, FLOATS, NIBBLES, INTEGERS, FP8 };
enum ScaleForm { SCALE_F32, SCALE_F16, SCALE_BF16, SCALE_E8M0 };

// `count` entries an output, each of `each` bytes.
struct Plane {
    const u8 *bytes;
    u32 count, each;
};

struct Weight {
    const u32 *words;  // of HALVES and FLOATS
    u32 rows, cols, segments, pairs;
    u32 form;
    // Of codes: see model/src/keep.rs.
    u32 run, span, scale_form;
    float unit, point;
    float entries[16];
    Plane codes, scales, integers, minima, minimum_integers, points;
};
static_assert(sizeof(Weight) == 208, "what the host writes");

DEVICE u32 width_of(const Weight &w, u32 panel) {
    const u32 left = w.rows - panel * PANEL;
    return left >= PANEL ? PANEL : (left + 15) / 16 * 16;
}

// An output's place.
struct Place {
    u32 panel, width, lane;
};

DEVICE const u8 *entry(const Plane &plane, const Place &at, u32 index) {
    return plane.bytes + (u64(at.panel) * PANEL * plane.count + u64(index) * at.width + at.lane) * plane.each;
}

DEVICE float number(const Weight &w, const Plane &plane, const Place &at, u32 index) {
    const u8 *p = entry(plane, at, index);
    switch (w.scale_form) {
        case SCALE_F32: return *reinterpret_cast<const float *>(p);
        case SCALE_F16: return from_f16(*reinterpret_cast<const u16 *>(p));
        case SCALE_BF16: return from_bits(u32(*reinterpret_cast<const u16 *>(p)) << 16);
        default: return from_bits(u32(*p) << 23);
    }
}

// What the sum of a run is multiplied by before the code's unit, and what is taken away for each input.
DEVICE float scale_of(const Weight &w, const Place &at, u32 k) {
    float scale = number(w, w.scales, at, k / w.span);
    if (w.integers.count) scale = scale * (float(*entry(w.integers, at, k / w.run)) - 128.0f);
    return scale;
}

DEVICE float minimum_of(const Weight &w, const Place &at, u32 k) {
    float minimum = number(w, w.minima, at, k / w.span);
    if (w.minimum_integers.count) minimum = minimum * float(*entry(w.minimum_integers, at, k / w.run));
    return minimum;
}

DEVICE float point_of(const Weight &w, const Place &at, u32 k) {
    return w.points.count ? w.point + float(*entry(w.points, at, k / w.run)) : w.point;
}

DEVICE bool is_shifted(const Weight &w) { return w.minima.count || w.points.count || w.point != 0.0f; }

// What is held for input `k`, before scale, unit and point. Every code is a number of bf16.
template <u32 FORM>
DEVICE float held_as(const Weight &w, const Place &at, u32 k) {
    if (FORM == NIBBLES) {
        const u32 pair = k / 2, word = *reinterpret_cast<const u32 *>(entry(w.codes, at, pair / 4));
        return w.entries[word >> (16 * (k % 2) + 8 * (pair % 4 / 2) + 4 * (pair % 2)) & 15];
    }
    const u8 byte = *entry(w.codes, at, k);
    if (FORM == INTEGERS) return float(static_cast<signed char>(byte));
    // E4M3 as f16 with the same bits of exponent: 256 times too small.
    return from_f16(u16((byte & 0x80) << 8 | (byte & 0x7f) << 7));
}

DEVICE float held(const Weight &w, const Place &at, u32 k) {
    switch (w.form) {
        case NIBBLES: return held_as<NIBBLES>(w, at, k);
        case INTEGERS: return held_as<INTEGERS>(w, at, k);
        default: return held_as<FP8>(w, at, k);
    }
}

// One value.
DEVICE float value_of(const Weight &w, const Place &at, u32 k) {
    if (w.form == HALVES || w.form == FLOATS) {
        const u32 length = w.cols / w.segments, pair = k / length * w.pairs + k % length / 2, odd = k % length % 2;
        const u64 start = u64(at.panel) * PANEL * w.segments * w.pairs;
        if (w.form == FLOATS) return from_bits(w.words[start * 2 + (u64(pair) * 2 + odd) * at.width + at.lane]);
        return from_bits(w.words[start + u64(pair) * at.width + at.lane] >> 16 * odd << 16);
    }
    const float code = held(w, at, k) * w.unit;
    const float scaled = (code - point_of(w, at, k)) * scale_of(w, at, k);
    return w.minima.count ? scaled - minimum_of(w, at, k) : scaled;
}
