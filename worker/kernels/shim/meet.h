// Where threads meet: barriers, shuffles, votes, tensor-core products. The last to arrive does the work for all.
#pragma once

#include "fibers.h"

namespace shim {

inline unsigned lane() { return block().current % WARP; }

// All lanes of the running warp bring an operand; `work` sees all 32. Lanes that bring different operations are told apart.
template <class Operand, class Work>
void meet(const char *what, Operand *mine, Work work) {
    Block &b = block();
    Meeting &meeting = b.warps[b.current / WARP];
    unsigned first = b.current / WARP * WARP;
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what && strcmp(meeting.what, what)) fail("came to %s, other lanes to %s", what, meeting.what);
    for (unsigned i = 0; i < WARP; i++)
        if (b.fibers[first + i].ended) fail("came to %s, which lane %u can't: it has ended", what, i);
    meeting.operands[lane()] = mine;
    meeting.arrived |= 1u << lane();
    if (meeting.arrived != ~0u) return wait(what);
    work(reinterpret_cast<Operand **>(meeting.operands));
    meeting.arrived = 0;
    for (unsigned i = 0; i < WARP; i++) set_ready(first + i);
    // It has no right to go on first.
    to_scheduler();
}

inline void sync_warp() {
    int none = 0;
    meet("a warp's barrier", &none, [](int **) {});
}

// `threads` threads meet at barrier `id`.
inline void sync_some(unsigned id, unsigned threads) {
    Block &b = block();
    if (id >= BARRIERS || threads > b.launch->threads || threads % WARP) fail("barrier %u for %u threads", id, threads);
    Barrier &barrier = b.barriers[id];
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads) fail("barrier %u is for %u threads and for %u", id, barrier.expected, threads);
    barrier.arrived++;
    static const char *names[BARRIERS] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",
                                          "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                          "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    if (barrier.arrived < threads) return wait(names[id]);
    barrier.arrived = 0;
    for (unsigned thread = 0; thread < b.launch->threads; thread++)
        if (!b.fibers[thread].ended && b.fibers[thread].waits_for == names[id]) {
            b.fibers[thread].waits_for = nullptr;
            set_ready(thread);
        }
    to_scheduler();
}

inline void sync_block() { sync_some(0, block().launch->threads); }

template <class T>
T shuffle(T value, unsigned from) {
    struct Operand { T value; unsigned from; T got; } mine = {value, from % WARP, value};
    meet("a shuffle", &mine, [](Operand **all) {
        for (unsigned i = 0; i < WARP; i++) all[i]->got = all[all[i]->from]->value;
    });
    return mine.got;
}

inline uint32_t ballot(bool yes) {
    struct Operand { bool yes; uint32_t got; } mine = {yes, 0};
    meet("a vote", &mine, [](Operand **all) {
        uint32_t got = 0;
        for (unsigned i = 0; i < WARP; i++) got |= uint32_t(all[i]->yes) << i;
        for (unsigned i = 0; i < WARP; i++) all[i]->got = got;
    });
    return mine.got;
}

inline float widen(uint32_t word, unsigned half) {
    uint32_t bits = half ? word & 0xffff0000u : word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// d += a b, 16 x 8 by 16: fragments as PTX lays them out for mma.m16n8k16 with bf16. The order of a sum is not promised.
inline void mma_16816(float *d, const uint32_t *a, const uint32_t *b) {
    struct Operand { float *d; const uint32_t *a, *b; } mine = {d, a, b};
    meet("a product of 16 x 8 x 16", &mine, [](Operand **all) {
        float left[16][16], right[16][8];
        for (unsigned i = 0; i < WARP; i++) {
            unsigned group = i / 4, pair = i % 4 * 2;
            for (unsigned half = 0; half < 2; half++)
                for (unsigned part = 0; part < 4; part++) {
                    left[group + part % 2 * 8][pair + half + part / 2 * 8] = widen(all[i]->a[part], half);
                    if (part < 2) right[pair + half + part * 8][group] = widen(all[i]->b[part], half);
                }
        }
        for (unsigned i = 0; i < WARP; i++)
            for (unsigned part = 0; part < 4; part++) {
                unsigned row = i / 4 + part / 2 * 8, column = i % 4 * 2 + part % 2;
                float sum = all[i]->d[part];
                for (unsigned k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
                all[i]->d[part] = sum;
            }
    });
}

// Four 8 x 8 matrices of 16 bits: lane i names row i % 8 of matrix i / 8, and gets two neighbours of each matrix.
inline void load_matrices(uint32_t *out, const void *row, bool transposed) {
    struct Operand { uint32_t *out; const uint16_t *row; bool transposed; };
    Operand mine = {out, static_cast<const uint16_t *>(row), transposed};
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix at an odd place");
    meet("matrices from shared memory", &mine, [](Operand **all) {
        uint32_t got[WARP][4];
        for (unsigned i = 0; i < WARP; i++)
            for (unsigned matrix = 0; matrix < 4; matrix++) {
                unsigned row = i / 4, column = i % 4 * 2;
                auto at = [&](unsigned r, unsigned c) -> uint32_t { return all[matrix * 8 + r]->row[c]; };
                bool turned = all[i]->transposed;
                uint32_t low = turned ? at(column, row) : at(row, column);
                uint32_t high = turned ? at(column + 1, row) : at(row, column + 1);
                got[i][matrix] = low | high << 16;
            }
        for (unsigned i = 0; i < WARP; i++) memcpy(all[i]->out, got[i], sizeof got[i]);
    });
}

inline void copy_async_16(void *to, const void *from) {
    Block &b = block();
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy of 16 bytes at an odd place");
    if (b.launch->late_copies)
        b.fibers[b.current].copies.back().push_back({to, from});
    else
        memcpy(to, from, 16);
}

inline void commit_async() {
    Block &b = block();
    b.fibers[b.current].copies.emplace_back();
}

// Waits for all groups but the latest `but` of the running thread.
inline void wait_async(unsigned but) {
    Block &b = block();
    auto &groups = b.fibers[b.current].copies;
    for (size_t group = 0; group + 1 + but < groups.size(); group++) {
        for (const Copy &copy : groups[group]) memcpy(copy.to, copy.from, 16);
        groups[group].clear();
    }
}

// Shared memory of the place `site` in the kernel's text: the same for all threads of the block.
inline void *shared(const void *site, size_t bytes) {
    Block &b = block();
    for (unsigned i = 0; i < b.arrays_used; i++)
        if (b.arrays[i].site == site) return b.arrays[i].bytes;
    size_t start = (b.shared_used + 63) / 64 * 64;
    if (b.arrays_used == ARRAYS || start + bytes + GAP > SHARED_MOST) fail("%zu bytes of shared memory are too many", bytes);
    Array &array = b.arrays[b.arrays_used++];
    array = {site, b.shared + start, bytes};
    memset(array.bytes + bytes, CANARY, GAP);
    b.shared_used = start + bytes + GAP;
    return array.bytes;
}

inline void *dynamic_shared() { return block().shared; }

}  // namespace shim
