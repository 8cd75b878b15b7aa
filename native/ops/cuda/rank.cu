#include "kernels.cuh"

// The policies of native/policies, one kernel or more each: those that look at one entry at a time share a kernel; those
// that look at attention are in attention.cu.

namespace indexmem_cuda {

namespace {

enum policy {
#define INDEXMEM_POLICY(name, needs_keys, n_queries, help) POLICY_##name,
#include "policies.def"
#undef INDEXMEM_POLICY
};

} // namespace

static policy policy_of(const ggml_tensor * op) {
    return (policy) ggml_get_op_params_i32(op, INDEXMEM_PARAM_POLICY);
}

//
// what does not look at keys: full, streaming, random, indexer
//

// the numbers of native/policies/streaming.cpp
static __device__ float streaming_rank(int32_t pos) {
    const int32_t  from_middle = pos - (1 << 30);
    const uint32_t bits = from_middle >= 0 ? 0x00800000u + (uint32_t) from_middle : 0x80800000u + (uint32_t) (-1 - from_middle);
    float rank;
    memcpy(&rank, &bits, sizeof(rank));
    return rank;
}

// the numbers of native/policies/random.cpp
static __device__ float random_rank(const op_view & op, row_index row, int32_t pos) {
    uint64_t seed;
    memcpy(&seed, op.params + INDEXMEM_PARAM_SEED, sizeof(seed));

    const uint64_t stream = (uint64_t) row.h + ((uint64_t) op.params[INDEXMEM_PARAM_IL] << 12);
    uint64_t x = seed + 0x9E3779B97F4A7C15ull*(1 + (uint64_t) (uint32_t) pos + (stream << 32));
    x = (x ^ (x >> 30))*0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27))*0x94D049BB133111EBull;
    x =  x ^ (x >> 31);
    return (float) (x >> 40)*(1.0f/16777216.0f);
}

static __device__ float indexer_rank(const op_view & op, row_index row, int i, int32_t pos, int32_t pos_last) {
    const tensor & terms = op.src[0];

    const float * term = terms.at<float>(i, row.h % terms.ne[2], row.s);
    float rank = term[0] + op.param_f32(INDEXMEM_PARAM_SLOPE)*(float) pos;
    if (terms.ne[0] > 1) {
        rank += term[1]*((float) (pos_last - pos)/op.param_f32(INDEXMEM_PARAM_AGE));
    }
    return rank;
}

// a thread for each entry
static __global__ void rank_kernel(const op_view op) {
    const row_index row = row_of_block(op.dst.ne[1]);

    const int32_t * c = op.src[2].at<int32_t>(row.s);
    const int i = blockIdx.x*THREADS + threadIdx.x;
    if (c[INDEXMEM_CTL_N_EVICT] == 0 || i >= c[INDEXMEM_CTL_N_USED]) {
        return;
    }
    const int32_t pos = pos_at(op.src[1].at<int32_t>(row.h, row.s), c, i);

    float rank = 0.0f;
    switch (op.params[INDEXMEM_PARAM_POLICY]) {
        case POLICY_streaming: rank = streaming_rank(pos);                                     break;
        case POLICY_random:    rank = random_rank(op, row, pos);                               break;
        case POLICY_indexer:   rank = indexer_rank(op, row, i, pos, c[INDEXMEM_CTL_POS_LAST]); break;
    }
    op.dst.at<float>(row.h, row.s)[i] = rank;
}

//
// norms of keys: knorm, keydiff
//

static __device__ float key_norm(const tensor & k, const char * key) {
    float sum = 0.0f;
    for (int d = threadIdx.x % WARP; d < k.ne[0]; d += WARP) {
        const float x = value_at(k.type, key, d);
        sum += x*x;
    }
    return sqrtf(warp_sum(sum));
}

// a warp for each entry
static __global__ void knorm_kernel(const op_view op) {
    const row_index row = row_of_block(op.dst.ne[1]);

    const int32_t * c = op.src[2].at<int32_t>(row.s);
    const int i = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (c[INDEXMEM_CTL_N_EVICT] == 0 || i >= c[INDEXMEM_CTL_N_USED]) {
        return;
    }
    const float norm = key_norm(op.src[0], op.src[0].at<char>(i, row.h, row.s));
    if (threadIdx.x % WARP == 0) {
        op.dst.at<float>(row.h, row.s)[i] = -norm;
    }
}

namespace {

constexpr int GROUP = 64; // keys whose normalised sum a block makes

struct keydiff_args : op_view {
    int     n_groups;
    float * partial; // [row][n_groups][n_embd] sums of normalised keys
    float * sum;     // [row][n_embd]

    using op_view::op_view;
};

} // namespace

static __global__ void keydiff_partial_kernel(const keydiff_args a) {
    __shared__ float rates[GROUP];

    const tensor & k = a.src[0];
    const row_index row = row_of_block(a.dst.ne[1]);

    const int32_t * c = a.src[2].at<int32_t>(row.s);
    const int i0 = blockIdx.x*GROUP;
    const int n  = min(GROUP, c[INDEXMEM_CTL_N_USED] - i0);
    if (c[INDEXMEM_CTL_N_EVICT] == 0 || n <= 0) {
        return;
    }
    for (int i = threadIdx.x/WARP; i < n; i += WARPS) {
        const float norm = key_norm(k, k.at<char>(i0 + i, row.h, row.s));
        if (threadIdx.x % WARP == 0) {
            rates[i] = norm > 0.0f ? 1.0f/norm : 0.0f;
        }
    }
    __syncthreads();

    float * partial = a.partial + ((int64_t) blockIdx.y*a.n_groups + blockIdx.x)*k.ne[0];
    for (int d = threadIdx.x; d < k.ne[0]; d += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < n; ++i) {
            sum += rates[i]*value_at(k.type, k.at<char>(i0 + i, row.h, row.s), d);
        }
        partial[d] = sum;
    }
}

static __global__ void keydiff_sum_kernel(const keydiff_args a) {
    const int n_embd = a.src[0].ne[0];

    const int32_t * c = a.src[2].at<int32_t>(row_of_block(a.dst.ne[1]).s);
    const int d = blockIdx.x*THREADS + threadIdx.x;
    if (c[INDEXMEM_CTL_N_EVICT] == 0 || d >= n_embd) {
        return;
    }
    float sum = 0.0f;
    for (int g = 0; g < (c[INDEXMEM_CTL_N_USED] + GROUP - 1)/GROUP; ++g) {
        sum += a.partial[((int64_t) blockIdx.y*a.n_groups + g)*n_embd + d];
    }
    a.sum[(int64_t) blockIdx.y*n_embd + d] = sum;
}

// a warp for each entry
static __global__ void keydiff_kernel(const keydiff_args a) {
    const tensor & k = a.src[0];
    const row_index row = row_of_block(a.dst.ne[1]);

    const int32_t * c = a.src[2].at<int32_t>(row.s);
    const int i = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (c[INDEXMEM_CTL_N_EVICT] == 0 || i >= c[INDEXMEM_CTL_N_USED]) {
        return;
    }
    const char  * key = k.at<char>(i, row.h, row.s);
    const float * sum = a.sum + (int64_t) blockIdx.y*k.ne[0];

    float kk = 0.0f, ks = 0.0f, ss = 0.0f; // products
    for (int d = threadIdx.x % WARP; d < k.ne[0]; d += WARP) {
        const float x = value_at(k.type, key, d);
        kk += x*x;
        ks += x*sum[d];
        ss += sum[d]*sum[d];
    }
    const float length = sqrtf(warp_sum(kk))*sqrtf(warp_sum(ss));
    const float cosine = warp_sum(ks)/length;
    if (threadIdx.x % WARP == 0) {
        a.dst.at<float>(row.h, row.s)[i] = length > 0.0f ? -cosine : 0.0f;
    }
}

//
// host
//

static void keydiff(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const int64_t n_row  = op->ne[1]*op->ne[2];
    const int64_t n_embd = op->src[0]->ne[0];

    keydiff_args args(op);
    args.n_groups = blocks_for(op->ne[0], GROUP);

    ggml_cuda_pool_alloc<float> partial(ctx.pool(), n_row*args.n_groups*n_embd);
    ggml_cuda_pool_alloc<float> sum    (ctx.pool(), n_row*n_embd);
    args.partial = partial.get();
    args.sum     = sum.get();

    launch(keydiff_partial_kernel, dim3(args.n_groups,                n_row), THREADS, ctx, args);
    launch(keydiff_sum_kernel,     dim3(blocks_for(n_embd, THREADS),  n_row), THREADS, ctx, args);
    launch(keydiff_kernel,         dim3(blocks_for(op->ne[0], WARPS), n_row), THREADS, ctx, args);
}

bool rank_supported(const ggml_tensor * op) {
    const ggml_tensor * k = op->src[0];
    switch (policy_of(op)) {
        case POLICY_full:
        case POLICY_streaming:
        case POLICY_random:
        case POLICY_indexer: return true;
        case POLICY_knorm:
        case POLICY_keydiff: return is_cache_type(k->type);
        case POLICY_tova:
        case POLICY_snapkv:
        case POLICY_expected: return is_cache_type(k->type) && k->ne[0] <= MAX_EMBD;
        default:             return false;
    }
}

void rank(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const auto launch_all = [&](void (*kernel)(op_view), int entries_per_block) {
        launch(kernel, dim3(blocks_for(op->ne[0], entries_per_block), op->ne[1]*op->ne[2]), THREADS, ctx, op_view(op));
    };
    const policy p = policy_of(op);
    const int n_queries = indexmem_policy_get(p)->n_queries;
    switch (p) {
        case POLICY_knorm:   launch_all(knorm_kernel, WARPS);            break;
        case POLICY_keydiff: keydiff(ctx, op);                           break;
        case POLICY_tova:    attention_mean(ctx, op, n_queries, false);  break;
        case POLICY_snapkv:  attention_mean(ctx, op, n_queries, true);   break;
        case POLICY_expected: attention_expected(ctx, op, n_queries);    break;
        default:             launch_all(rank_kernel, THREADS);           break;
    }
}

} // namespace indexmem_cuda
