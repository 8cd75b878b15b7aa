#pragma once

// what the CUDA kernels of GGML_OP_INDEXMEM share
//
// Invariants
//   - the host reads nothing back: what varies from ubatch to ubatch is read from `ctl` by each kernel
//   - a result depends on the inputs alone, bit by bit: numbers are added up in an order that no scheduling changes
//   - a grid is as large as the shapes allow, and blocks beyond what is in use end at once
//
// y of a grid counts (KV head, sequence) pairs, x parts of such a row.

#include "ggml-cuda/common.cuh"

#include "indexmem-ops.h"

namespace indexmem_cuda {

constexpr int WARP     = 32;
constexpr int THREADS  = 256; // of a block
constexpr int WARPS    = THREADS/WARP;
constexpr int TILE     = WARP; // slots whose keys lie in shared memory, a lane each
constexpr int MAX_EMBD = 256;  // the longest keys that do

struct tensor {
    char  * data;
    int32_t type;
    int32_t ne[GGML_MAX_DIMS];
    int64_t nb[GGML_MAX_DIMS];

    tensor() = default;

    explicit tensor(const ggml_tensor * t) : data((char *) t->data), type(t->type) {
        for (int i = 0; i < GGML_MAX_DIMS; ++i) {
            ne[i] = (int32_t) t->ne[i];
            nb[i] = (int64_t) t->nb[i];
        }
    }

    template <typename T>
    __device__ T * at(int64_t i1, int64_t i2 = 0, int64_t i3 = 0) const {
        return (T *) (data + i1*nb[1] + i2*nb[2] + i3*nb[3]);
    }
};

// An op as its kernels get it; kernels that need more derive from it.
struct op_view {
    tensor  dst;
    tensor  src[6];
    int32_t params[16];

    explicit op_view(const ggml_tensor * op) : dst(op) {
        for (int i = 0; i < 6; ++i) {
            src[i] = op->src[i] ? tensor(op->src[i]) : tensor();
        }
        memcpy(params, op->op_params, sizeof(params));
    }

    __device__ float param_f32(int i) const {
        float res;
        memcpy(&res, params + i, sizeof(res));
        return res;
    }
};

struct row_index {
    int h; // KV head
    int s; // sequence of the ubatch
};

static __device__ inline row_index row_of_block(int n_head) {
    return { (int) blockIdx.y % n_head, (int) blockIdx.y/n_head };
}

// position of any slot in use
static __device__ inline int32_t pos_at(const int32_t * pos, const int32_t * ctl, int slot) {
    const int32_t n_fixed = ctl[INDEXMEM_CTL_N_FIXED];
    return slot < n_fixed ? pos[slot] : ctl[INDEXMEM_CTL_POS_TAIL] + (slot - n_fixed);
}

// entries that leave a KV head: fewer than n_evict if there were not so many
static __device__ inline int n_leaving(const tensor & plan, const tensor & ctl, row_index row) {
    const int32_t * evicted = plan.at<int32_t>(0, row.h, row.s);
    int n = min(ctl.at<int32_t>(row.s)[INDEXMEM_CTL_N_EVICT], plan.ne[0]);
    while (n > 0 && evicted[n - 1] < 0) {
        --n;
    }
    return n;
}

//
// values of any type that a cache may have
//

inline bool is_cache_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0: return true;
        default:             return false;
    }
}

// value i of a block of 32 four-bit values: the low halves of the bytes come first
static __device__ inline int nibble(const uint8_t * qs, int i) {
    return i < 16 ? qs[i] & 0xF : qs[i - 16] >> 4;
}

// its fifth bit
static __device__ inline int high_bit(const uint8_t * qh, int i) {
    return (qh[i/8] >> (i % 8) & 1) << 4;
}

// value d of a row. The type is the same for a whole grid, so that the choice costs next to nothing.
static __device__ inline float value_at(int type, const char * row, int d) {
    constexpr int QK = 32; // values of a block, in all these types

    const int ib = d/QK;
    const int i  = d % QK;
    switch (type) {
        case GGML_TYPE_F32: return ((const float *) row)[d];
        case GGML_TYPE_F16: return __half2float(((const half *) row)[d]);
        case GGML_TYPE_BF16:
            {
                const uint32_t bits = (uint32_t) ((const uint16_t *) row)[d] << 16;
                float res;
                memcpy(&res, &bits, sizeof(res));
                return res;
            }
        case GGML_TYPE_Q8_0:
            {
                const block_q8_0 & b = ((const block_q8_0 *) row)[ib];
                return __half2float(b.d)*(float) b.qs[i];
            }
        case GGML_TYPE_Q4_0:
            {
                const block_q4_0 & b = ((const block_q4_0 *) row)[ib];
                return __half2float(b.d)*(float) (nibble(b.qs, i) - 8);
            }
        case GGML_TYPE_Q4_1:
            {
                const block_q4_1 & b = ((const block_q4_1 *) row)[ib];
                const half * dm = (const half *) &b;
                return __half2float(dm[0])*(float) nibble(b.qs, i) + __half2float(dm[1]);
            }
        case GGML_TYPE_Q5_0:
            {
                const block_q5_0 & b = ((const block_q5_0 *) row)[ib];
                return __half2float(b.d)*(float) ((nibble(b.qs, i) | high_bit(b.qh, i)) - 16);
            }
        case GGML_TYPE_Q5_1:
            {
                const block_q5_1 & b = ((const block_q5_1 *) row)[ib];
                const half * dm = (const half *) &b;
                return __half2float(dm[0])*(float) (nibble(b.qs, i) | high_bit(b.qh, i)) + __half2float(dm[1]);
            }
    }
    return 0.0f;
}

// Keys of the slots [slot0, slot0 + TILE) of one KV head, those in use, to shared memory: key i at keys + i*tile_pitch(k).
// An odd pitch lets 32 lanes read the same component of 32 keys at once.
constexpr int TILE_FLOATS = TILE*(MAX_EMBD + 1);

static __device__ inline int tile_pitch(const tensor & k) {
    return k.ne[0] | 1;
}

static __device__ inline void load_tile(const tensor & k, row_index row, int slot0, int n_used, float * keys) {
    const int n = min(TILE, n_used - slot0);
    for (int i = threadIdx.x/WARP; i < n; i += WARPS) {
        const char * key = k.at<char>(slot0 + i, row.h, row.s);
        for (int d = threadIdx.x % WARP; d < k.ne[0]; d += WARP) {
            keys[i*tile_pitch(k) + d] = value_at(k.type, key, d);
        }
    }
}

static __device__ inline float dot(const float * a, const float * b, int n) {
    float sum = 0.0f;
    for (int d = 0; d < n; ++d) {
        sum += a[d]*b[d];
    }
    return sum;
}

//
// of all lanes of a warp, the same bits for each
//

static __device__ inline float warp_sum(float x) {
    for (int offset = WARP/2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xFFFFFFFF, x, offset, WARP);
    }
    return x;
}

static __device__ inline float warp_max(float x) {
    for (int offset = WARP/2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, offset, WARP));
    }
    return x;
}

// What the threads before this one have, added up, and what all have. `warps` is shared memory, a value for each warp.
static __device__ inline uint32_t block_scan(uint32_t x, uint32_t * warps, uint32_t & total) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x/WARP;

    uint32_t sum = x;
    for (int offset = 1; offset < WARP; offset *= 2) {
        const uint32_t y = __shfl_up_sync(0xFFFFFFFF, sum, offset, WARP);
        sum += lane >= offset ? y : 0;
    }
    if (lane == WARP - 1) {
        warps[warp] = sum;
    }
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (int w = 0; w < (int) blockDim.x/WARP; ++w) {
        before += w < warp ? warps[w] : 0;
        total  += warps[w];
    }
    __syncthreads(); // `warps` may be written again
    return before + sum - x;
}

//
// host
//

inline int blocks_for(int64_t n, int64_t per_block) {
    return (int) ((n + per_block - 1)/per_block);
}

template <typename A>
void launch(void (*kernel)(A), dim3 grid, int n_threads, ggml_backend_cuda_context & ctx, A args) {
    void * pointers[] = { &args };
    CUDA_CHECK(cudaLaunchKernel(kernel, grid, dim3(n_threads), pointers, 0, ctx.stream()));
}

// Keys and values of the entries that leave, in fp32: entries[row][n_evict_max][n_embd_k + n_embd_v]
void gather_leaving(ggml_backend_cuda_context & ctx, const ggml_tensor * op, float * entries); // of centroid or residual

void rank       (ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void select     (ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void compact    (ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void compact_pos(ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void pairwise   (ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void centroid   (ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void residual   (ggml_backend_cuda_context & ctx, const ggml_tensor * op);
void bias       (ggml_backend_cuda_context & ctx, const ggml_tensor * op);

bool rank_supported(const ggml_tensor * op);

// Ranks = attention received from the last n_queries, mean over them and the group; `smooth`: and over neighbours.
void attention_mean(ggml_backend_cuda_context & ctx, const ggml_tensor * op, int n_queries, bool smooth);
void attention_expected(ggml_backend_cuda_context & ctx, const ggml_tensor * op, int n_queries);

} // namespace indexmem_cuda
