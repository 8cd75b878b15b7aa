#pragma once

// The two matrix products of attention for many queries, from a chunk of keys and values in fp32. A lane is a key in the
// first and a value of the row in the second, so no sum goes across lanes.

#include "attend-tile.h"

namespace indexmem_cpu {

constexpr int VECS = 4; // vectors that share a value of a query

// n rows as fp32, zeros where `top` is -inf; n_embd is a multiple of HALF
template <typename From>
void attend_convert(const attend_rows & src, int64_t n, int64_t n_embd, const float * top, float * dst) {
    using namespace indexmem_simd;

    for (int64_t j = 0; j < n; ++j) {
        const char * row  = src.row(j);
        const bool   seen = top[j] != -INFINITY;
        attend_blocks(n_embd, [&](int64_t d, auto size) {
            const vec scale = seen ? From::scale(row, d) : zero();
            for (int64_t b = 0; b < size; b += WIDTH) {
                store(dst + j*n_embd + d + b, seen ? From::at(row, d, b, scale) : zero());
            }
        });
    }
}

// the same with a row of `dst` for each value of a key, zeros beyond n up to a multiple of WIDTH
template <typename From>
void attend_convert_columns(const attend_rows & src, int64_t n, int64_t n_embd, const float * top, float * dst) {
    using namespace indexmem_simd;

    for (int64_t j = 0; j < n; j += WIDTH) {
        attend_blocks(n_embd, [&](int64_t d, auto size) {
            constexpr int64_t N = decltype(size)::value/WIDTH; // vectors
            vec x[N][WIDTH];
            for (int64_t i = 0; i < WIDTH; ++i) {
                const char * row   = src.row(j + i);
                const bool   seen  = j + i < n && top[j + i] != -INFINITY;
                const vec    scale = seen ? From::scale(row, d) : zero();
                for (int64_t b = 0; b < N; ++b) {
                    x[b][i] = seen ? From::at(row, d, b*WIDTH, scale) : zero();
                }
            }
            for (int64_t b = 0; b < N; ++b) {
                transpose(x[b], dst + (d + b*WIDTH)*CHUNK + j, CHUNK);
            }
        });
    }
}

// out[r*CHUNK + j] = q[r] . key j, for n keys; `k` is [n_embd][CHUNK]. What is beyond n is undefined.
template <int R>
void attend_dots_many(const float * const * q, const float * k, int64_t n, int64_t n_embd, float * out) {
    using namespace indexmem_simd;

    static_assert(CHUNK % (VECS*WIDTH) == 0, "");
    for (int64_t j = 0; j < n; j += VECS*WIDTH) {
        vec acc[R][VECS];
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < VECS; ++i) {
                acc[r][i] = zero();
            }
        }
        for (int64_t d = 0; d < n_embd; ++d) {
            vec y[VECS];
            for (int i = 0; i < VECS; ++i) {
                y[i] = load(k + d*CHUNK + j + i*WIDTH);
            }
            for (int r = 0; r < R; ++r) {
                const vec x = set1(q[r][d]);
                for (int i = 0; i < VECS; ++i) {
                    acc[r][i] = mul_add(acc[r][i], x, y[i]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < VECS; ++i) {
                store(out + r*CHUNK + j + i*WIDTH, acc[r][i]);
            }
        }
    }
}

// columns [d, d + V*WIDTH) of attend_accumulate_many
template <int R, int V>
void attend_accumulate_columns_many(const float * p, const float * v, int64_t n, int64_t wide, int64_t d, float * const * out) {
    using namespace indexmem_simd;

    vec acc[R][V];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < V; ++i) {
            acc[r][i] = load(out[r] + d + i*WIDTH);
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        vec y[V];
        for (int i = 0; i < V; ++i) {
            y[i] = load(v + j*wide + d + i*WIDTH);
        }
        for (int r = 0; r < R; ++r) {
            const vec w = set1(p[r*CHUNK + j]);
            for (int i = 0; i < V; ++i) {
                acc[r][i] = mul_add(acc[r][i], w, y[i]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < V; ++i) {
            store(out[r] + d + i*WIDTH, acc[r][i]);
        }
    }
}

// out[r] += sum over j of p[r*CHUNK + j]*value j, for n values; `v` is [n][wide], `wide` a multiple of HALF
template <int R>
void attend_accumulate_many(const float * p, const float * v, int64_t n, int64_t wide, float * const * out) {
    using namespace indexmem_simd;

    int64_t d = 0;
    for (; d + VECS*WIDTH <= wide; d += VECS*WIDTH) {
        attend_accumulate_columns_many<R, VECS>(p, v, n, wide, d, out);
    }
    if constexpr (BLOCK < VECS*WIDTH) {
        for (; d + BLOCK <= wide; d += BLOCK) {
            attend_accumulate_columns_many<R, BLOCK/WIDTH>(p, v, n, wide, d, out);
        }
    }
    if constexpr (HALF < VECS*WIDTH) {
        for (; d < wide; d += HALF) {
            attend_accumulate_columns_many<R, HALF/WIDTH>(p, v, n, wide, d, out);
        }
    }
}

typedef void (*attend_dots_many_t)      (const float * const * q, const float * k, int64_t n, int64_t n_embd, float * out);
typedef void (*attend_accumulate_many_t)(const float * p, const float * v, int64_t n, int64_t wide, float * const * out);

// of a tile of 1 to MANY queries
struct attend_kernels_many {
    attend_dots_many_t       dots;
    attend_accumulate_many_t accumulate;
};

template <int R = 1>
attend_kernels_many attend_kernels_many_of(int n) {
    if constexpr (R < indexmem_simd::MANY) {
        if (n > R) {
            return attend_kernels_many_of<R + 1>(n);
        }
    }
    return { attend_dots_many<R>, attend_accumulate_many<R> };
}

} // namespace indexmem_cpu
