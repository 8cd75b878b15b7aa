#include "launch.h"

#include "ggml-impl.h"
#include "indexmem-metal.h"
#include "indexmem-ops.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

static_assert(sizeof(indexmem_metal_ctl) == INDEXMEM_CTL_SIZE*sizeof(int32_t), "a row of ctl");

#define SAME_PLACE(member, index) \
    static_assert(offsetof(indexmem_metal_ctl, member) == INDEXMEM_CTL_##index*sizeof(int32_t), "enum indexmem_ctl has changed")
SAME_PLACE(n_used,   N_USED);
SAME_PLACE(n_evict,  N_EVICT);
SAME_PLACE(n_fixed,  N_FIXED);
SAME_PLACE(pos_tail, POS_TAIL);
SAME_PLACE(keep_lo,  KEEP_LO);
SAME_PLACE(keep_hi,  KEEP_HI);
SAME_PLACE(pos_last, POS_LAST);
#undef SAME_PLACE

// numbers that common.metal knows
static_assert(GGML_TYPE_F32 == 0 && GGML_TYPE_F16 == 1 && GGML_TYPE_Q4_0 == 2 && GGML_TYPE_Q8_0 == 8 && GGML_TYPE_BF16 == 30,
        "the numbers of types have changed");

namespace {

constexpr int THREADS = INDEXMEM_METAL_THREADS;
constexpr int SIMD    = INDEXMEM_METAL_SIMD;

indexmem_op kind_of(const ggml_tensor * op) {
    return (indexmem_op) ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP);
}

const indexmem_policy_info * policy_of(const ggml_tensor * op) {
    return indexmem_policy_get(ggml_get_op_params_i32(op, INDEXMEM_PARAM_POLICY));
}

int blocks(int64_t n, int size) {
    return (int) ((n + size - 1)/size);
}

// groups of whole 16 bytes, at least one: Metal wants that
size_t memory_of(size_t n) {
    return std::max<size_t>(16, (n + 15)/16*16);
}

bool is_smooth(const ggml_tensor * op) {
    return kind_of(op) == INDEXMEM_OP_RANK && strcmp(policy_of(op)->name, "snapkv") == 0;
}

// pairs of floats: largest logit and sum of each query of a KV head
int64_t scratch_row(const ggml_tensor * op) {
    if (kind_of(op) != INDEXMEM_OP_RANK || !op->src[3] || strcmp(policy_of(op)->name, "expected") == 0) {
        return 0;
    }
    const ggml_tensor * k = op->src[0];
    const int64_t n_group = op->src[3]->ne[2]/k->ne[2];
    return 2*n_group*policy_of(op)->n_queries + (is_smooth(op) ? 2*k->ne[1] : 0);
}

std::vector<indexmem_metal_launch> launches_of_rank(const ggml_tensor * op) {
    struct named { const char * policy; const char * kernel; bool per_thread; };
    static const named kernels[] = {
        { "full",      "rank_full",      true  },
        { "streaming", "rank_streaming", true  },
        { "random",    "rank_random",    true  },
        { "indexer",   "rank_indexer",   true  },
        { "knorm",     "rank_knorm",     false },
    };
    const ggml_tensor * k = op->src[0];
    const ggml_tensor * q = op->src[3];
    const indexmem_policy_info * info = policy_of(op);

    const int n_head = (int) op->ne[1];
    const int n_seq  = (int) op->ne[2];

    for (const named & n : kernels) {
        if (strcmp(n.policy, info->name) == 0) {
            return { { n.kernel, { blocks(op->ne[0], n.per_thread ? THREADS : SIMD), n_head, n_seq }, memory_of(0) } };
        }
    }
    if (strcmp(info->name, "keydiff") == 0) {
        return { { "rank_keydiff", { 1, n_head, n_seq }, memory_of(SIMD*k->ne[0]*sizeof(float)) } };
    }
    if (strcmp(info->name, "expected") == 0) {
        return { { "attention_expected", { blocks(op->ne[0], SIMD), n_head, n_seq }, memory_of(k->ne[0]*sizeof(float)) } };
    }
    if (strcmp(info->name, "tova") != 0 && strcmp(info->name, "snapkv") != 0) {
        return {};
    }
    const int n_group = (int) (q->ne[2]/k->ne[2]);
    std::vector<indexmem_metal_launch> res = {
        { "attention_sum",  { n_group*info->n_queries,   n_head, n_seq }, memory_of(SIMD*2*sizeof(float)) },
        { "attention_mean", { blocks(op->ne[0], SIMD), n_head, n_seq }, memory_of(0) },
    };
    if (is_smooth(op)) {
        res.push_back({ "attention_smooth", { 1, n_head, n_seq }, memory_of(0) });
    }
    return res;
}

// does the op read this source as keys or values?
bool reads_rows(const ggml_tensor * op, int i) {
    switch (kind_of(op)) {
        case INDEXMEM_OP_RANK:     return i == 0 && policy_of(op)->needs_keys;
        case INDEXMEM_OP_CENTROID:
        case INDEXMEM_OP_RESIDUAL: return i == 2 || i == 3;
        default:                   return false;
    }
}

bool can_read(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0: return true;
        default:             return false;
    }
}

indexmem_metal_tensor describe(const ggml_tensor * t) {
    indexmem_metal_tensor res = {};
    for (int i = 0; t && i < 4; ++i) {
        res.ne[i] = (int32_t) t->ne[i];
        res.nb[i] = t->nb[i];
    }
    return res;
}

// what divides all places and the length of the rows of a cache
int32_t copy_size(const ggml_tensor * cache) {
    const size_t row = ggml_row_size(cache->type, cache->ne[0]);
    const size_t all = row | cache->nb[1] | cache->nb[2] | cache->nb[3] | cache->view_offs;
    return all % 16 == 0 ? 16 : all % 2 == 0 ? 2 : 1;
}

} // namespace

std::vector<indexmem_metal_launch> indexmem_metal_launches(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];

    switch (kind_of(op)) {
        case INDEXMEM_OP_RANK:
            return launches_of_rank(op);
        case INDEXMEM_OP_PAIRWISE:
            return { { "pairwise", { blocks(a->ne[1], SIMD), 1, (int) a->ne[3] }, memory_of(0) } };
        case INDEXMEM_OP_SELECT: // counts of 256 values of a byte, and what goes from thread to thread
            return { { "select", { 1, (int) a->ne[1], (int) a->ne[2] }, memory_of((256 + SIMD + 2)*sizeof(uint32_t)) } };
        case INDEXMEM_OP_COMPACT:
            return { { "compact", { blocks(b->ne[0], SIMD), (int) op->ne[2], (int) op->ne[3] }, memory_of(0) } };
        case INDEXMEM_OP_COMPACT_POS:
            return { { "compact_pos", { 1, (int) op->ne[1], (int) op->ne[2] }, memory_of(0) } };
        case INDEXMEM_OP_CENTROID:
            return { { "centroid", { 1, (int) op->ne[2], (int) op->ne[3] },
                       memory_of((SIMD + THREADS + 2*op->src[4]->ne[0])*sizeof(uint32_t)) } };
        case INDEXMEM_OP_RESIDUAL:
            return { { "residual", { 1, (int) op->ne[2], (int) op->ne[3] },
                       memory_of(INDEXMEM_METAL_FEATURED*op->ne[0]*sizeof(float)) } };
        case INDEXMEM_OP_BIAS:
            return { { "bias", { (int) op->ne[1], 1, (int) op->ne[3] }, memory_of(0) } };
        case INDEXMEM_OP_ATTEND:
            break;
    }
    return {};
}

indexmem_metal_args indexmem_metal_args_of(const ggml_tensor * op) {
    indexmem_metal_args res = {};
    for (int i = 0; i < INDEXMEM_METAL_N_SRC; ++i) {
        res.src[i] = describe(op->src[i]);
    }
    res.dst = describe(op);

    const indexmem_op kind = kind_of(op);
    memcpy(&res.seed, op->op_params + INDEXMEM_PARAM_SEED, sizeof(res.seed));
    res.row_size    = ggml_row_size(op->type, op->ne[0]);
    res.scratch_row = scratch_row(op);
    res.il          = ggml_get_op_params_i32(op, INDEXMEM_PARAM_IL);
    res.n_queries   = kind == INDEXMEM_OP_RANK ? policy_of(op)->n_queries : ggml_get_op_params_i32(op, INDEXMEM_PARAM_QUERIES);
    res.n_head      = ggml_get_op_params_i32(op, INDEXMEM_PARAM_HEADS);
    res.maximum     = ggml_get_op_params_i32(op, INDEXMEM_PARAM_REDUCE) == INDEXMEM_REDUCE_MAX;
    res.smooth      = is_smooth(op);
    res.copy_size   = copy_size(op);
    res.scale       = ggml_get_op_params_f32(op, INDEXMEM_PARAM_SCALE);
    res.softcap     = ggml_get_op_params_f32(op, INDEXMEM_PARAM_SOFTCAP);
    res.pos_slope   = ggml_get_op_params_f32(op, INDEXMEM_PARAM_SLOPE);
    res.age_scale   = ggml_get_op_params_f32(op, INDEXMEM_PARAM_AGE);
    res.rate        = ggml_get_op_params_f32(op, INDEXMEM_PARAM_RATE);
    res.decay       = ggml_get_op_params_f32(op, INDEXMEM_PARAM_DECAY);
    return res;
}

indexmem_metal_types indexmem_metal_types_of(const ggml_tensor * op) {
    const int i = reads_rows(op, 0) ? 0 : 2;
    return {
        reads_rows(op, i) ? op->src[i]->type : GGML_TYPE_F32,
        reads_rows(op, 3) ? op->src[3]->type : GGML_TYPE_F32,
    };
}

bool ggml_indexmem_metal_supports(const ggml_tensor * op, size_t max_memory) {
    for (int i = 0; i < INDEXMEM_METAL_N_SRC; ++i) {
        if (reads_rows(op, i) && !can_read(op->src[i]->type)) {
            return false;
        }
    }
    if (kind_of(op) == INDEXMEM_OP_COMPACT && copy_size(op) == 1) {
        return false;
    }
    const auto launches = indexmem_metal_launches(op);
    for (const auto & launch : launches) {
        if (launch.memory > max_memory) {
            return false;
        }
    }
    return !launches.empty();
}

size_t ggml_indexmem_metal_extra(const ggml_tensor * op) {
    const size_t n = scratch_row(op)*sizeof(float);
    return n == 0 ? 0 : 16 + n*op->ne[1]*op->ne[2]; // 16: it begins at a multiple of them
}
