#include <metal_stdlib>
#include "args.h"

// What the kernels share. All have the same arguments, see INDEXMEM_KERNEL; those of a grid [.., H, S] work on KV head
// tgpig.y of sequence tgpig.z.
//
// The compiler may assume that there are neither NaN nor infinities (fast math): where these matter, bits are compared.

using namespace metal;

constant int indexmem_type_k [[function_constant(INDEXMEM_METAL_TYPE_K)]];
constant int indexmem_type_v [[function_constant(INDEXMEM_METAL_TYPE_V)]];

#define INDEXMEM_KERNEL(name)                                          \
    [[max_total_threads_per_threadgroup(INDEXMEM_METAL_THREADS)]]      \
    kernel void kernel_indexmem_##name(                                \
        constant indexmem_metal_args & args    [[buffer(0)]],          \
        device char      * src0                [[buffer(1)]],          \
        device char      * src1                [[buffer(2)]],          \
        device char      * src2                [[buffer(3)]],          \
        device char      * src3                [[buffer(4)]],          \
        device char      * src4                [[buffer(5)]],          \
        device char      * src5                [[buffer(6)]],          \
        device char      * dst                 [[buffer(7)]],          \
        device float     * scratch             [[buffer(8)]],          \
        threadgroup char * shared              [[threadgroup(0)]],     \
        uint3 tgpig [[threadgroup_position_in_grid]],                  \
        uint  tiitg [[thread_index_in_threadgroup]],                   \
        uint  tiisg [[thread_index_in_simdgroup]],                     \
        uint  sgitg [[simdgroup_index_in_threadgroup]])

namespace indexmem {

constexpr constant int THREADS = INDEXMEM_METAL_THREADS;
constexpr constant int SIMD    = INDEXMEM_METAL_SIMD;
constexpr constant int WIDTH   = 32;

enum value_type {
    TYPE_F32  = 0,
    TYPE_F16  = 1,
    TYPE_Q4_0 = 2,
    TYPE_Q8_0 = 8,
    TYPE_BF16 = 30,
};

struct q8_block {
    half   d;
    int8_t qs[32];
};

struct q4_block {
    half    d;
    uint8_t qs[16];
};

// component d of a row of any type
inline float value_at(int type, device const char * row, uint d) {
    switch (type) {
        case TYPE_F32:  return ((device const float *) row)[d];
        case TYPE_F16:  return (float) ((device const half *) row)[d];
        case TYPE_BF16: return as_type<float>((uint) ((device const ushort *) row)[d] << 16);
        case TYPE_Q8_0:
            {
                device const q8_block * b = (device const q8_block *) row + d/32;
                return (float) b->d*(float) b->qs[d % 32];
            }
        case TYPE_Q4_0:
            {
                device const q4_block * b = (device const q4_block *) row + d/32;
                const uint packed = b->qs[d % 16];
                const uint q      = d % 32 < 16 ? packed & 0xF : packed >> 4;
                return (float) b->d*((float) q - 8.0f);
            }
    }
    return 0.0f;
}

inline float key_at  (device const char * row, uint d) { return value_at(indexmem_type_k, row, d); }
inline float entry_at(device const char * row, uint d) { return value_at(indexmem_type_v, row, d); }

// dimensions 1 (or 2), ..: what lies at an index of the dimensions from the second (or third) on
inline device char * at2(device char * base, constant indexmem_metal_tensor & t, uint i2, uint i3) {
    return base + i2*t.nb[2] + i3*t.nb[3];
}

inline device char * at1(device char * base, constant indexmem_metal_tensor & t, uint i1, uint i2) {
    return base + i1*t.nb[1] + i2*t.nb[2];
}

inline device const indexmem_metal_ctl & ctl_of(device const char * ctl, constant indexmem_metal_tensor & t, uint s) {
    return *(device const indexmem_metal_ctl *) (ctl + s*t.nb[1]);
}

// position of any slot in use
inline int pos_at(device const int * pos, device const indexmem_metal_ctl & c, int slot) {
    return slot < c.n_fixed ? pos[slot] : c.pos_tail + (slot - c.n_fixed);
}

// entries that leave a KV head: fewer than n_evict if there were not so many
inline int n_leaving(device const int * evicted, device const indexmem_metal_ctl & c, int n_max) {
    int n = min(c.n_evict, n_max);
    while (n > 0 && evicted[n - 1] < 0) {
        --n;
    }
    return n;
}

// of a simdgroup, every lane gets it: q . key, q in fp32
template <typename Query> // a pointer into any memory
inline float dot_key(Query q, device const char * k, int n_embd, uint lane) {
    float sum = 0.0f;
    for (int d = lane; d < n_embd; d += WIDTH) {
        sum += q[d]*key_at(k, d);
    }
    return simd_sum(sum);
}

// Sum of the values of the threads before this one; `total` becomes that of all. work: SIMD numbers.
inline uint group_scan(uint value, uint lane, uint simd, threadgroup uint * work, thread uint & total) {
    const uint before = simd_prefix_exclusive_sum(value);
    if (lane == WIDTH - 1) {
        work[simd] = before + value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint offset = 0;
    total = 0;
    for (uint i = 0; i < SIMD; ++i) {
        offset += i < simd ? work[i] : 0;
        total  += work[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup); // work is free again
    return offset + before;
}

} // namespace indexmem

using namespace indexmem;
