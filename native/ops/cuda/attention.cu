#include "kernels.cuh"

// Ranks of the policies tova and snapkv: the attention that entries receive from the latest queries; and of expected, from the mean of
// such queries.
//
// A block has the keys of a tile of slots in shared memory, an entry a lane, and its warps share the queries. The logits are
// computed twice, first for the maximum and the sum of each query, then for the probabilities: to keep them would take
// as much memory as the queries times the cache.

namespace indexmem_cuda {

namespace {

// of the softmax of a query: sum of exp(logit - max)
struct softmax {
    float max;
    float sum;
};

struct attention_args : op_view {
    int n_queries; // positions looked back at
    int n_group;   // query heads of a KV head
    int n_tiles;

    softmax * parts;  // [row][query][n_tiles]
    softmax * totals; // [row][query]
    float   * mean;   // [row][n_slots], null: the ranks

    using op_view::op_view;

    __device__ int     n_all()             const { return n_queries*n_group; }
    __device__ int64_t query_index(int iq) const { return (int64_t) blockIdx.y*n_all() + iq; }
};

// The tile of a block, and the logits of its entries.
struct attention_tile {
    const attention_args & a;
    const int32_t        * ctl;
    row_index              row;
    int slot0;
    int n_used;
    int p0; // first of the positions whose queries are asked

    __device__ attention_tile(const attention_args & a) : a(a), row(row_of_block(a.dst.ne[1])), slot0(blockIdx.x*TILE) {
        ctl    = a.src[2].at<int32_t>(row.s);
        n_used = ctl[INDEXMEM_CTL_N_USED];
        p0     = max(0, ctl[INDEXMEM_CTL_POS_LAST] + 1 - a.n_queries);
    }

    __device__ bool is_needed() const { return ctl[INDEXMEM_CTL_N_EVICT] > 0 && slot0 < n_used; }

    __device__ int n_positions() const { return ctl[INDEXMEM_CTL_POS_LAST] + 1 - p0; }

    __device__ int slot() const { return slot0 + threadIdx.x % WARP; }

    // position of this lane's entry; one that no query sees if there is none
    __device__ int32_t pos() const {
        return slot() < n_used ? pos_at(a.src[1].at<int32_t>(row.h, row.s), ctl, slot()) : INT32_MAX;
    }

    // that of query head g at position p
    __device__ const float * query(int g, int32_t p) const {
        const tensor & q = a.src[3];
        return q.at<float>(p % q.ne[1], row.h*a.n_group + g, row.s);
    }

    // that of this lane's entry
    __device__ const float * key(const float * keys) const { return keys + (threadIdx.x % WARP)*tile_pitch(a.src[0]); }

    // of such a query and this lane's entry
    __device__ float logit(const float * keys, int g, int32_t p) const {
        const float softcap = a.param_f32(INDEXMEM_PARAM_SOFTCAP);
        const float x = a.param_f32(INDEXMEM_PARAM_SCALE)*dot(query(g, p), key(keys), a.src[0].ne[0]);
        if (softcap == 0.0f) {
            return x;
        }
        return softcap*(1.0f - 2.0f/(expf(2.0f*x/softcap) + 1.0f)); // tanh
    }
};

// What all warps have found for the lane's entry, added up in the first warp; the others get what they gave.
__device__ float add_warps(float (*sums)[TILE], float sum) {
    const int lane = threadIdx.x % WARP;
    sums[threadIdx.x/WARP][lane] = sum;
    __syncthreads();
    for (int i = 1; threadIdx.x < WARP && i < WARPS; ++i) {
        sum += sums[i][lane];
    }
    return sum;
}

} // namespace

static __global__ void attention_parts_kernel(const attention_args a) {
    __shared__ float keys[TILE_FLOATS];

    const attention_tile tile(a);
    if (!tile.is_needed()) {
        return;
    }
    load_tile(a.src[0], tile.row, tile.slot0, tile.n_used, keys);
    __syncthreads();

    const int32_t pos = tile.pos();
    for (int iq = threadIdx.x/WARP; iq < a.n_all(); iq += WARPS) {
        const int32_t p = tile.p0 + iq % a.n_queries;
        if (iq % a.n_queries >= tile.n_positions()) {
            continue;
        }
        const float x   = pos <= p ? tile.logit(keys, iq/a.n_queries, p) : -INFINITY;
        const float max = warp_max(x);
        const float sum = warp_sum(pos <= p ? expf(x - max) : 0.0f);
        if (threadIdx.x % WARP == 0) {
            a.parts[a.query_index(iq)*a.n_tiles + blockIdx.x] = { max, sum };
        }
    }
}

// a warp for each query
static __global__ void attention_totals_kernel(const attention_args a) {
    const attention_tile tile(a);
    const int iq = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (tile.ctl[INDEXMEM_CTL_N_EVICT] == 0 || iq >= a.n_all() || iq % a.n_queries >= tile.n_positions()) {
        return;
    }
    const softmax * parts = a.parts + a.query_index(iq)*a.n_tiles;
    const int n = (tile.n_used + TILE - 1)/TILE;

    float max = -INFINITY;
    for (int i = threadIdx.x % WARP; i < n; i += WARP) {
        max = fmaxf(max, parts[i].max);
    }
    max = warp_max(max);
    float sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < n; i += WARP) {
        sum += parts[i].max > -INFINITY ? parts[i].sum*expf(parts[i].max - max) : 0.0f;
    }
    sum = warp_sum(sum);
    if (a.src[4].data) { // a sink takes part, and gets nothing
        const float sink = a.src[4].at<float>(0)[tile.row.h*a.n_group + iq/a.n_queries];
        const float most = fmaxf(max, sink);
        sum = sum*expf(max - most) + expf(sink - most);
        max = most;
    }
    if (threadIdx.x % WARP == 0) {
        a.totals[a.query_index(iq)] = { max, sum };
    }
}

static __global__ void attention_mean_kernel(const attention_args a) {
    __shared__ float keys[TILE_FLOATS];
    __shared__ float sums[WARPS][TILE];

    const attention_tile tile(a);
    if (!tile.is_needed()) {
        return;
    }
    load_tile(a.src[0], tile.row, tile.slot0, tile.n_used, keys);
    __syncthreads();

    const int warp = threadIdx.x/WARP;

    const int32_t pos = tile.pos();
    float sum = 0.0f;
    for (int iq = warp; iq < a.n_all(); iq += WARPS) {
        const int32_t p = tile.p0 + iq % a.n_queries;
        if (iq % a.n_queries < tile.n_positions() && pos <= p) {
            const softmax total = a.totals[a.query_index(iq)];
            sum += expf(tile.logit(keys, iq/a.n_queries, p) - total.max)/total.sum;
        }
    }
    sum = add_warps(sums, sum);
    if (warp == 0 && tile.slot() < tile.n_used) {
        float * mean = a.mean ? a.mean + (int64_t) blockIdx.y*a.dst.ne[0] : a.dst.at<float>(tile.row.h, tile.row.s);
        mean[tile.slot()] = sum/(float) (a.n_group*tile.n_positions());
    }
}

//
// expected: the product with the mean of such queries (native/policies/expected.cpp)
//

static __global__ void attention_expected_kernel(const attention_args a) {
    __shared__ float keys[TILE_FLOATS];
    __shared__ float mean[MAX_EMBD];

    const attention_tile tile(a);
    if (!tile.is_needed()) {
        return;
    }
    load_tile(a.src[0], tile.row, tile.slot0, tile.n_used, keys);
    const int n = tile.n_positions();
    for (int d = threadIdx.x; d < a.src[0].ne[0]; d += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < a.n_group*n; ++i) {
            sum += tile.query(i/n, tile.p0 + i % n)[d];
        }
        mean[d] = a.param_f32(INDEXMEM_PARAM_SCALE)*sum/(float) (a.n_group*n);
    }
    __syncthreads();
    if (threadIdx.x < WARP && tile.slot() < tile.n_used) {
        a.dst.at<float>(tile.row.h, tile.row.s)[tile.slot()] = dot(mean, tile.key(keys), a.src[0].ne[0]);
    }
}

//
// snapkv: the mean over the entry and its three neighbours on each side, in the order of positions
//

namespace {

constexpr int DIGITS = 16; // values of the four bits that a pass sorts by
constexpr int REACH  = 3;

struct smooth_args : op_view {
    const float * mean; // [row][n_slots]
    int32_t * order;    // [row][2][n_slots] slots by position, and room to sort

    using op_view::op_view;
};

} // namespace

// A block sorts a row: each thread has a run of consecutive entries, counts their digits, and, knowing how many of each
// digit come before, puts them where they belong in their order.
static __global__ void smooth_kernel(const smooth_args a) {
    __shared__ uint32_t counts[DIGITS*THREADS]; // digit by digit, thread by thread
    __shared__ uint32_t warps[WARPS];

    const row_index row = row_of_block(a.dst.ne[1]);
    const int32_t * c   = a.src[2].at<int32_t>(row.s);
    const int32_t * pos = a.src[1].at<int32_t>(row.h, row.s);
    const int n = c[INDEXMEM_CTL_N_USED];
    if (c[INDEXMEM_CTL_N_EVICT] == 0) {
        return;
    }
    const int tid   = threadIdx.x;
    const int run   = (n + THREADS - 1)/THREADS;
    const int begin = min(n, tid*run);
    const int end   = min(n, begin + run);

    int32_t * order = a.order + (int64_t) blockIdx.y*2*a.dst.ne[0];
    int32_t * next  = order + a.dst.ne[0];
    for (int i = begin; i < end; ++i) {
        order[i] = i;
    }
    for (int shift = 0; shift < 32 && c[INDEXMEM_CTL_POS_LAST] >> shift > 0; shift += 4) {
        __syncthreads();
        for (int digit = 0; digit < DIGITS; ++digit) {
            counts[digit*THREADS + tid] = 0;
        }
        for (int i = begin; i < end; ++i) {
            counts[(pos_at(pos, c, order[i]) >> shift & (DIGITS - 1))*THREADS + tid]++;
        }
        __syncthreads();
        uint32_t sum = 0;
        for (int i = tid*DIGITS; i < (tid + 1)*DIGITS; ++i) {
            sum += counts[i];
        }
        uint32_t total;
        uint32_t before = block_scan(sum, warps, total);
        for (int i = tid*DIGITS; i < (tid + 1)*DIGITS; ++i) {
            const uint32_t count = counts[i];
            counts[i] = before;
            before += count;
        }
        __syncthreads();
        for (int i = begin; i < end; ++i) {
            next[counts[(pos_at(pos, c, order[i]) >> shift & (DIGITS - 1))*THREADS + tid]++] = order[i];
        }
        int32_t * sorted = next;
        next  = order;
        order = sorted;
    }
    __syncthreads();

    const float * mean = a.mean + (int64_t) blockIdx.y*a.dst.ne[0];
    float       * rank = a.dst.at<float>(row.h, row.s);
    for (int i = tid; i < n; i += THREADS) {
        const int lo = max(0,     i - REACH);
        const int hi = min(n - 1, i + REACH);
        float sum = 0.0f;
        for (int j = lo; j <= hi; ++j) {
            sum += mean[order[j]];
        }
        rank[order[i]] = sum/(float) (hi - lo + 1);
    }
}

void attention_expected(ggml_backend_cuda_context & ctx, const ggml_tensor * op, int n_queries) {
    attention_args args(op);
    args.n_queries = n_queries;
    args.n_group   = (int) (op->src[3]->ne[2]/op->src[0]->ne[2]);
    args.n_tiles   = blocks_for(op->ne[0], TILE);
    launch(attention_expected_kernel, dim3(args.n_tiles, op->ne[1]*op->ne[2]), THREADS, ctx, args);
}

void attention_mean(ggml_backend_cuda_context & ctx, const ggml_tensor * op, int n_queries, bool smooth) {
    const int64_t n_row   = op->ne[1]*op->ne[2];
    const int64_t n_slots = op->ne[0];

    attention_args args(op);
    args.n_queries = n_queries;
    args.n_group   = (int) (op->src[3]->ne[2]/op->src[0]->ne[2]);
    args.n_tiles   = blocks_for(n_slots, TILE);
    const int n_all = n_queries*args.n_group;

    ggml_cuda_pool_alloc<softmax> parts (ctx.pool(), n_row*n_all*args.n_tiles);
    ggml_cuda_pool_alloc<softmax> totals(ctx.pool(), n_row*n_all);
    ggml_cuda_pool_alloc<float>   mean  (ctx.pool(), smooth ? n_row*n_slots : 1);
    args.parts  = parts.get();
    args.totals = totals.get();
    args.mean   = smooth ? mean.get() : nullptr;

    launch(attention_parts_kernel,  dim3(args.n_tiles,             n_row), THREADS, ctx, args);
    launch(attention_totals_kernel, dim3(blocks_for(n_all, WARPS), n_row), THREADS, ctx, args);
    launch(attention_mean_kernel,   dim3(args.n_tiles,             n_row), THREADS, ctx, args);
    if (smooth) {
        ggml_cuda_pool_alloc<int32_t> order(ctx.pool(), n_row*2*n_slots);
        smooth_args sorting(op);
        sorting.mean  = args.mean;
        sorting.order = order.get();
        launch(smooth_kernel, dim3(1, n_row), THREADS, ctx, sorting);
    }
}

} // namespace indexmem_cuda
