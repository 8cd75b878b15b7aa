#pragma once

// Work handed out while it is done, for cores of different speeds: half of it in equal portions, one for each thread, then half of
// what is left, and so on. A thread takes a portion whenever it is done with one. Who does what has no influence on results.

#include "kernels.h"

namespace indexmem_cpu {

// All threads of an op make one, and begin() it before the first portion is taken.
class hand_out {
public:
    explicit hand_out(const ggml_compute_params * params) : params(params) {}

    // waits for all threads
    void begin() const {
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, 0);
        }
        ggml_barrier(params->threadpool);
    }

    // f(begin, end) for portions of [0, n). All threads call it with the same n, and wait for each other before they do so again.
    template <typename F>
    void each(int64_t n, const F & f) {
        const int64_t n_thread  = params->nth;
        const int64_t n_portion = ROUNDS*n_thread;

        for (int64_t t = params->ith; t < n_portion; t = n_thread + ggml_threadpool_chunk_add(params->threadpool, 1) - n_taken) {
            const int64_t round = t/n_thread;
            const int64_t lo    = n - (n >> round);
            const int64_t hi    = round + 1 < ROUNDS ? n - (n >> (round + 1)) : n;
            const int64_t begin = lo + (hi - lo)*(t % n_thread)/n_thread;
            const int64_t end   = lo + (hi - lo)*(t % n_thread + 1)/n_thread;
            if (begin < end) {
                f(begin, end);
            }
        }
        n_taken += n_portion; // each thread has asked once in vain
    }

private:
    static constexpr int64_t ROUNDS = 4;

    const ggml_compute_params * params;
    int64_t n_taken = 0;
};

} // namespace indexmem_cpu
