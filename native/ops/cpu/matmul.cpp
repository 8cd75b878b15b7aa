#include "indexmem-cpu.h"

#include "matmul-simd.h"
#include "repack.h"

#include <vector>

//
// Products of Q4_0, Q4_1 and Q8_0 weights with rows of activations
//
// llama.cpp takes dot products here, one row of weights (8 of Q4_0, interleaved) and one to four of activations at a time, and
// unpacks the weights for each. Here a tile of rows of weights is unpacked once, a row in each lane, and meets all rows of
// activations.
//
// Invariants
//   - every output is summed in the order of its blocks, however the work is split: the number of threads and the other rows
//     of the ubatch change no bit
//   - integers of a block are added without rounding or saturation, as in the dot products
//   - what is large is kept by each thread from product to product, not on its stack, which may be as small as 128 kB
//

#if defined(INDEXMEM_MATMUL)

namespace {

using namespace indexmem_matmul;

constexpr int     GROUPS = 8;       // of four values, in a block of 32: what a lane of 32 bits takes at once
constexpr int     COLS   = 8;       // rows of activations that share what is loaded
constexpr int64_t PANEL  = 32;      // blocks that are unpacked at a time: those of a tile stay in the first cache
constexpr int     TILES  = 4;       // most tiles of a chunk, which share the scales of the activations

// 16 bytes of every row from byte i0 of the quants of its block on, as four vectors of four bytes of every row
template <typename W>
void transposed(const W * const * x, int64_t ib, int i0, ivec * four) {
    const ivec r0 = load_rows(x, ib, i0, 0), r1 = load_rows(x, ib, i0, 1), r2 = load_rows(x, ib, i0, 2), r3 = load_rows(x, ib, i0, 3);
    const ivec a0 = lo32(r0, r1), a1 = hi32(r0, r1), b0 = lo32(r2, r3), b1 = hi32(r2, r3);
    four[0] = lo64(a0, b0);
    four[1] = hi64(a0, b0);
    four[2] = lo64(a1, b1);
    four[3] = hi64(a1, b1);
}

// low halves of the bytes are the first 16 values, high ones the others
template <typename W>
void nibbles(const W * const * x, int64_t ib, ivec * q) {
    transposed(x, ib, 0, q);
    for (int g = 0; g < 4; ++g) {
        q[g + 4] = high4(q[g]);
        q[g]     = low4 (q[g]);
    }
}

// How a type of weights lies in memory. Its values are (quant - OFFSET)*d, or quant*d + m where there is a MIN; dot products
// with it take activations in the type `act`.
struct format_q4_1 {
    typedef block_q4_1 weight;
    typedef block_q8_1 act;
    static constexpr bool MIN    = true;
    static constexpr int  OFFSET = 0;

    static uint32_t halves(const weight & x) { return x.data.dm; } // d, then m
    static float    scale (const act & y)    { return GGML_CPU_FP16_TO_FP32(y.data.data.d); }

    static void quants(const weight * const * x, int64_t ib, ivec * q) { nibbles(x, ib, q); }
};

// what formats with a scale alone have in common
struct format_scaled {
    typedef block_q8_0 act;
    static constexpr bool MIN = false;

    template <typename W>
    static uint32_t halves(const W & x)  { return x.d; }
    static float    scale(const act & y) { return GGML_CPU_FP16_TO_FP32(y.d); }
};

struct format_q4_0 : format_scaled {
    typedef block_q4_0 weight;
    static constexpr int OFFSET = 8;

    static void quants(const weight * const * x, int64_t ib, ivec * q) { nibbles(x, ib, q); }
};

#if defined(INDEXMEM_MATMUL_VNNI) // 16 bits would not be enough
struct format_q8_0 : format_scaled {
    typedef block_q8_0 weight;
    static constexpr int OFFSET = 128;

    static void quants(const weight * const * x, int64_t ib, ivec * q) {
        transposed(x, ib, 0,  q);
        transposed(x, ib, 16, q + 4);
        for (int g = 0; g < GROUPS; ++g) {
            q[g] = flip(q[g]); // signed to unsigned
        }
    }
};
#endif

// up to PANEL blocks of ROWS rows of weights, a row in each lane
struct alignas(64) tile {
    uint8_t q[PANEL][GROUPS][ROWS*4];
    float   d[PANEL][ROWS];
    float   m[PANEL][ROWS];
};

// Weights that a thread unpacks later, fetched while it does something that takes longer than fetching them.
struct weights_ahead {
    const char * data; // null: nothing
    size_t       size; // bytes for each block

    void fetch(int64_t ib) const {
        for (size_t i = 0; data && i < size; i += 64) {
            _mm_prefetch(data + ib*size + i, _MM_HINT_T0);
        }
    }
};

// blocks [b0, b0 + n) of the rows from r0 on; lanes beyond the last row repeat it
template <typename F>
void unpack(const ggml_tensor * w, int64_t r0, int64_t b0, int64_t n, const weights_ahead & next, tile & t) {
    const typename F::weight * x[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) {
        x[r] = (const typename F::weight *) ((const char *) w->data + std::min(r0 + r, w->ne[1] - 1)*w->nb[1]) + b0;
    }
    for (int64_t ib = 0; ib < n; ++ib) {
        next.fetch(ib);
        ivec q[GROUPS];
        F::quants(x, ib, q);
        for (int g = 0; g < GROUPS; ++g) {
            store(t.q[ib][g], q[g]);
        }
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t halves = F::halves(x[r][ib]);
            memcpy(&t.m[ib][r], &halves, sizeof(halves));
        }
    }
    for (int64_t ib = 0; ib < n; ++ib) {
        const ivec halves = load((const uint8_t *) t.m[ib]);
        store(t.d[ib], low_half(halves));
        store(t.m[ib], high_half(halves));
    }
}

// up to PANEL blocks of COLS rows of activations
template <typename F>
struct columns {
    const typename F::act * y[COLS];
    float   d  [COLS][PANEL];
    float   s  [COLS][PANEL]; // sums of the values, if there is a MIN
    int32_t off[COLS][PANEL]; // what the OFFSET of the weights adds to a dot product of quants, to be taken off
};

// all rows of activations
template <typename F>
struct matmul_rows {
    const typename F::act * data;
    int64_t n_cols;
    int64_t n_blocks;

    matmul_rows(const typename F::act * data, int64_t n_cols, int64_t n_blocks) : data(data), n_cols(n_cols), n_blocks(n_blocks) {
        if (few()) {
            const size_t n_panels = (n_blocks + PANEL - 1)/PANEL;
            if (panels.size() < n_panels) {
                panels.resize(n_panels);
            }
            for (int64_t b0 = 0; b0 < n_blocks; b0 += PANEL) {
                make(0, b0, panels[b0/PANEL]);
            }
        }
    }

    // rows from i0 on, blocks from b0 on; perhaps in `made`
    const columns<F> & get(int64_t i0, int64_t b0, columns<F> & made) const {
        if (few()) {
            return panels[b0/PANEL];
        }
        make(i0, b0, made);
        return made;
    }

private:
    bool few() const { return n_cols <= COLS; } // their activations are prepared once, for all tiles

    void make(int64_t i0, int64_t b0, columns<F> & c) const {
        for (int64_t i = 0; i < std::min<int64_t>(COLS, n_cols - i0); ++i) {
            c.y[i] = data + (i0 + i)*n_blocks + b0;
            for (int64_t ib = 0; ib < std::min(PANEL, n_blocks - b0); ++ib) {
                const auto & y = c.y[i][ib];
                c.d[i][ib] = F::scale(y);
                if constexpr (F::MIN) {
                    c.s[i][ib] = GGML_CPU_FP16_TO_FP32(y.data.data.s);
                }
                if constexpr (F::OFFSET != 0) {
                    int32_t sum = 0;
                    for (int j = 0; j < 4*GROUPS; ++j) {
                        sum += y.qs[j];
                    }
                    c.off[i][ib] = F::OFFSET*sum;
                }
            }
        }
    }

    static std::vector<columns<F>> & panels_of_thread() {
        static thread_local std::vector<columns<F>> panels;
        return panels;
    }

    std::vector<columns<F>> & panels = panels_of_thread();
};

// 8 rows interleaved by 8 bytes, as llama.cpp lays Q4_0 weights out where its kernels for that are
struct format_q4_0x8 : format_scaled {
    static constexpr int OFFSET = 8;
};

template <>
void unpack<format_q4_0x8>(const ggml_tensor * w, int64_t r0, int64_t b0, int64_t n, const weights_ahead & next, tile & t) {
    const int64_t n_blocks = w->ne[0]/QK4_0;

    const block_q4_0x8 * x[ROWS/8];
    for (int64_t i = 0; i < ROWS/8; ++i) {
        x[i] = (const block_q4_0x8 *) w->data + std::min(r0/8 + i, w->ne[1]/8 - 1)*n_blocks + b0;
    }
    for (int64_t ib = 0; ib < n; ++ib) {
        next.fetch(ib);
        ivec four[4];
        for (int k = 0; k < 2; ++k) {
            deinterleave(x, ib, 64*k, four + 2*k);
        }
        for (int g = 0; g < 4; ++g) {
            const ivec q = flip4(four[g]); // they are stored less 8
            store(t.q[ib][g],     low4 (q));
            store(t.q[ib][g + 4], high4(q));
        }
        store(t.d[ib], halves_of(x, ib));
    }
}

// adds the products of n blocks with N rows of activations to n_rows values of N rows of the output, or begins with them
template <typename F, int N>
void multiply(const tile & t, const columns<F> & c, int64_t n, bool first, float * dst, int64_t stride, int64_t n_rows, const weights_ahead & next) {
    vec acc[N];
    for (int i = 0; i < N; ++i) {
        alignas(64) float before[ROWS] = { 0 };
        if (!first) {
            memcpy(before, dst + i*stride, n_rows*sizeof(float));
        }
        acc[i] = load(before);
    }
    for (int64_t ib = 0; ib < n; ++ib) {
        next.fetch(ib);
        ivec q[GROUPS];
        for (int g = 0; g < GROUPS; ++g) {
            q[g] = load(t.q[ib][g]);
        }
        for (int i = 0; i < N; ++i) {
            isum sum = no_sum();
            for (int g = 0; g < GROUPS; ++g) {
                sum = add_products(sum, q[g], set1(c.y[i][ib].qs + 4*g));
            }
            acc[i] = mul_add(to_f32(sum, F::OFFSET ? c.off[i][ib] : 0), mul(load(t.d[ib]), set1(c.d[i][ib])), acc[i]);
            if constexpr (F::MIN) {
                acc[i] = mul_add(load(t.m[ib]), set1(c.s[i][ib]), acc[i]);
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        store_rows(dst + i*stride, acc[i], n_rows);
    }
}

// the one for 1 to COLS rows of activations
template <typename F, int N = 1>
decltype(&multiply<F, 1>) multiply_of(int n_cols) {
    if constexpr (N < COLS) {
        if (n_cols > N) {
            return multiply_of<F, N + 1>(n_cols);
        }
    }
    return multiply<F, N>;
}

// Products of rows [r0, r1) of the weights, at most TILES*ROWS, with all rows of activations. It goes on `ahead` bytes later.
template <typename F>
void multiply_chunk(const ggml_tensor * w, const matmul_rows<F> & rows, float * dst, int64_t r0, int64_t r1, size_t ahead) {
    const int64_t stride  = w->ne[1]; // of the output
    const size_t  n_fetch = ROWS*w->nb[1]/rows.n_blocks;
    const bool    brief   = rows.n_cols == 1; // then it unpacks longer than it multiplies

    static thread_local std::vector<tile> tiles(TILES);
    for (int64_t b0 = 0; b0 < rows.n_blocks; b0 += PANEL) {
        const int64_t n = std::min(PANEL, rows.n_blocks - b0);

        const auto next = [&](int64_t r, bool now) {
            return weights_ahead{ now ? (const char *) w->data + r*w->nb[1] + b0*n_fetch + ahead : nullptr, n_fetch };
        };
        for (int64_t r = r0; r < r1; r += ROWS) {
            unpack<F>(w, r, b0, n, next(r, brief), tiles[(r - r0)/ROWS]);
        }
        for (int64_t i0 = 0; i0 < rows.n_cols; i0 += COLS) {
            columns<F> made;
            const columns<F> & c = rows.get(i0, b0, made);
            const auto multiply  = multiply_of<F>((int) std::min<int64_t>(COLS, rows.n_cols - i0));
            for (int64_t r = r0; r < r1; r += ROWS) {
                multiply(tiles[(r - r0)/ROWS], c, n, b0 == 0, dst + i0*stride + r, stride, std::min<int64_t>(ROWS, r1 - r),
                        next(r, !brief && i0 == 0));
            }
        }
    }
}

// what this thread does of a product
template <typename F>
void multiply_all(const ggml_compute_params * params, ggml_tensor * dst, const void * data) {
    const ggml_tensor * w = dst->src[0];

    const matmul_rows<F> rows((const typename F::act *) data, ggml_nrows(dst->src[1]), w->ne[0]/(4*GROUPS));

    const int64_t n_tiles = (w->ne[1] + ROWS - 1)/ROWS;
    int64_t n_chunk = rows.n_cols > 32 ? TILES : TILES/2; // tiles
    if (n_tiles < 4*n_chunk*params->nth) {
        n_chunk = 1;
    }
    const size_t ahead = params->nth*n_chunk*ROWS*w->nb[1]; // about where this thread goes on

    for (int64_t t = params->ith*n_chunk; t < n_tiles; t = (int64_t) ggml_threadpool_chunk_add(params->threadpool, 1)*n_chunk) {
        multiply_chunk(w, rows, (float *) dst->data, t*ROWS, std::min((t + n_chunk)*ROWS, w->ne[1]), ahead);
    }
}

} // namespace

bool ggml_indexmem_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, const void * rows) {
    const ggml_tensor * w = dst->src[0];

    if (ggml_nrows(w) != w->ne[1] || !ggml_is_contiguous(dst) || params->use_ref) {
        return false;
    }
    switch (w->type) {
        case GGML_TYPE_Q4_0: multiply_all<format_q4_0>(params, dst, rows); return true;
        case GGML_TYPE_Q4_1: multiply_all<format_q4_1>(params, dst, rows); return true;
#if defined(INDEXMEM_MATMUL_VNNI)
        case GGML_TYPE_Q8_0:
            if (ggml_nrows(dst->src[1]) == 1) {
                return false; // a dot product has nothing to unpack
            }
            multiply_all<format_q8_0>(params, dst, rows);
            return true;
#endif
        default: return false;
    }
}

bool ggml_indexmem_mul_mat_q4_0x8(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * w = dst->src[0];
    const ggml_tensor * x = dst->src[1];

    const int64_t n_cols = ggml_nrows(x);
    if (w->type != GGML_TYPE_Q4_0 || ggml_nrows(w) != w->ne[1] || !ggml_is_contiguous(dst) || x->type != GGML_TYPE_F32 ||
            !ggml_is_contiguous(x) || n_cols == 1 || params->use_ref) {
        return false;
    }
    const auto   from_float = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
    const size_t row_size   = ggml_row_size(GGML_TYPE_Q8_0, x->ne[0]);
    for (int64_t i = params->ith; i < n_cols; i += params->nth) {
        from_float((const float *) x->data + i*x->ne[0], (char *) params->wdata + i*row_size, x->ne[0]);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    multiply_all<format_q4_0x8>(params, dst, params->wdata);
    return true;
}

#else

bool ggml_indexmem_mul_mat(const ggml_compute_params *, ggml_tensor *, const void *) {
    return false;
}

bool ggml_indexmem_mul_mat_q4_0x8(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
