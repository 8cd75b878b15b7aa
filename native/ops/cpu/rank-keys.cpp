#include "rank-keys.h"

using namespace indexmem_cpu;

namespace {

template <typename From>
void squares_of(const attend_rows & k, int64_t n, int64_t n_embd, float * out, const attend_ahead & next) {
    using namespace indexmem_simd;

    for (int64_t j = 0; j < n; j += KEYS) {
        const char * row[KEYS];
        vec          acc[KEYS];
        for (int i = 0; i < KEYS; ++i) {
            row[i] = k.row(std::min(j + i, n - 1));
            acc[i] = zero();
            next.fetch(j + i);
        }
        attend_blocks(n_embd, [&](int64_t d, auto size) {
            for (int i = 0; i < KEYS; ++i) {
                const vec scale = From::scale(row[i], d);
                for (int64_t b = 0; b < size; b += WIDTH) {
                    const vec x = From::at(row[i], d, b, scale);
                    acc[i] = mul_add(acc[i], x, x);
                }
            }
        });
        sums4(acc, out + j);
    }
}

// a row of n_embd values with zeros behind it
const float * widened(const indexmem_rank_chunk & c, const float * x) {
    const int64_t n_embd = c.shape.n_embd;
    if (rank_wide(c.shape) == n_embd) {
        return x;
    }
    std::copy(x, x + n_embd, c.thread.rows);
    std::fill(c.thread.rows + n_embd, c.thread.rows + rank_wide(c.shape), 0.0f);
    return c.thread.rows;
}

} // namespace

void indexmem_rank_chunk::squares(float * out) const {
    const rank_keys keys(*this);
    attend_with(keys.type, [&](auto from) { squares_of<decltype(from)>(keys.rows, n, rank_wide(shape), out, keys.next); });
}

void indexmem_rank_chunk::dots(const float * x, float * out) const {
    const rank_keys keys(*this);
    const float * wide = widened(*this, x);
    keys.kernels().dots[1](&wide, keys.rows, n, rank_wide(shape), out, keys.next);
}

void indexmem_rank_chunk::add(const float * weight, float * sum) const {
    const rank_keys keys(*this);
    float * wide = (float *) widened(*this, sum);
    keys.kernels().accumulate[1](weight, keys.rows, n, rank_wide(shape), &wide, {});
    if (wide != sum) {
        std::copy(wide, wide + shape.n_embd, sum);
    }
}
