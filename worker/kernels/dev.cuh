// What kernels know of the device: places, meetings of threads, own number types. Every function has a form for the GPU and one
// for the CPU (`shim/`), and no kernel file says anything device-specific but through these.
//
// Rules for kernel files: inline PTX only here; shared memory by SHARED and SHARED_DYNAMIC; one KERNEL an entry, which takes one
// struct; no includes but this and other files of this folder; every warp operation is for whole warps.
#pragma once

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SHARED_DYNAMIC(type, name)                        \
    extern __shared__ __align__(16) unsigned char dev_dynamic[]; \
    type *const name = reinterpret_cast<type *>(dev_dynamic)
#define KERNEL_AMONG(together, threads, name, Args) \
    extern "C" __global__ void __launch_bounds__(threads, (together) / (threads)) name(const __grid_constant__ Args args)
#define UNROLL _Pragma("unroll")

#else

#include "shim/meet.h"
#define DEVICE static inline
#define SHARED(type, name, count)   \
    static const char name##_site = 0; \
    type *const name = static_cast<type *>(shim::shared(&name##_site, sizeof(type) * (count)))
#define SHARED_DYNAMIC(type, name) type *const name = static_cast<type *>(shim::dynamic_shared())
#define KERNEL_AMONG(together, threads, name, Args)                                                                     \
    static void name(const Args &args);                                                                                 \
    static void name##_body(const void *args) { name(*static_cast<const Args *>(args)); }                               \
    extern "C" {                                                                                                        \
    __attribute__((visibility("default"))) shim::Entry shim_entry_##name = {#name, sizeof(Args), threads, name##_body}; \
    }                                                                                                                   \
    static void name(const Args &args)
#define UNROLL

#endif

// An entry whose registers suffice for `together` threads on a multiprocessor at once: left to itself, a compiler spills some to
// hold more threads.
#define KERNEL(threads, name, Args) KERNEL_AMONG(1024, threads, name, Args)

namespace dev {

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

constexpr u32 WARP = 32;

struct bf16 {
    u16 bits;
};

#ifdef __CUDACC__

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 threads() { return blockDim.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 block_z() { return blockIdx.z; }
DEVICE u32 blocks_x() { return gridDim.x; }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// `count` threads, whole warps, meet at barrier `id` (1 to 15; 0 is the block's).
DEVICE void sync_some(u32 id, u32 count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
template <class T>
DEVICE T shuffle(T value, u32 from) { return __shfl_sync(~0u, value, from); }
DEVICE u32 ballot(bool yes) { return __ballot_sync(~0u, yes); }

// a b + c, rounded once.
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float root(float x) { return __fsqrt_rn(x); }
DEVICE u32 bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(u32 x) { return __uint_as_float(x); }
DEVICE float from_f16(u16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}

DEVICE u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void load_matrices(u32 (&out)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&out)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// Copies 16 bytes to shared memory, some time before the wait for its group ends.
DEVICE void copy_async_16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <u32 BUT>
DEVICE void wait_async() { asm volatile("cp.async.wait_group %0;" ::"n"(BUT) : "memory"); }

#else

DEVICE u32 thread() { return shim::block().current; }
DEVICE u32 threads() { return shim::block().launch->threads; }
DEVICE u32 block_x() { return shim::block().index[0]; }
DEVICE u32 block_y() { return shim::block().index[1]; }
DEVICE u32 block_z() { return shim::block().index[2]; }
DEVICE u32 blocks_x() { return shim::block().launch->grid[0]; }

DEVICE void sync_block() { shim::sync_block(); }
DEVICE void sync_warp() { shim::sync_warp(); }
DEVICE void sync_some(u32 id, u32 count) { shim::sync_some(id, count); }
template <class T>
DEVICE T shuffle(T value, u32 from) { return shim::shuffle(value, from); }
DEVICE u32 ballot(bool yes) { return shim::ballot(yes); }

DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float root(float x) { return __builtin_sqrtf(x); }
DEVICE u32 bits(float x) {
    u32 out;
    memcpy(&out, &x, 4);
    return out;
}
DEVICE float from_bits(u32 x) {
    float out;
    memcpy(&out, &x, 4);
    return out;
}
DEVICE float from_f16(u16 x) {
    u32 exponent = x >> 10 & 31, mantissa = x & 1023, sign = u32(x & 0x8000) << 16;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
    float size = exponent ? from_bits((exponent + 112) << 23 | mantissa << 13) : float(mantissa) * from_bits(103u << 23);
    return from_bits(bits(size) | sign);
}

DEVICE void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { shim::mma_16816(d, a, b); }
DEVICE void load_matrices(u32 (&out)[4], const void *row) { shim::load_matrices(out, row, false); }
DEVICE void load_matrices_transposed(u32 (&out)[4], const void *row) { shim::load_matrices(out, row, true); }
DEVICE void copy_async_16(void *to, const void *from) { shim::copy_async_16(to, from); }
DEVICE void commit_async() { shim::commit_async(); }
template <u32 BUT>
DEVICE void wait_async() { shim::wait_async(BUT); }

#endif

DEVICE u32 lane() { return thread() % WARP; }
DEVICE u32 warp() { return thread() / WARP; }
template <class T>
DEVICE T shuffle_xor(T value, u32 mask) { return shuffle(value, lane() ^ mask); }

DEVICE float wide(float x) { return x; }
DEVICE float wide(bf16 x) { return from_bits(u32(x.bits) << 16); }
// To nearest even; a NaN stays one.
DEVICE void store(float *to, float x) { *to = x; }
DEVICE void store(bf16 *to, float x) {
    u32 b = bits(x);
    u32 rounded = x != x ? b | 0x00400000u : b + 0x7fffu + (b >> 16 & 1u);
    to->bits = u16(rounded >> 16);
}

}  // namespace dev
