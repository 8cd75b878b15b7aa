#pragma once

// Pieces of compute graphs that several parts of a bounded cache's graph are made of.

#include "ggml.h"

#include <cstdint>
#include <vector>

ggml_tensor * indexmem_new_input(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1);

// n slots or rows, from i0 on, of the sequences [s0, s0 + n_seq) of a cache tensor
ggml_tensor * indexmem_view_seqs(ggml_context * ctx, ggml_tensor * t, int64_t n, uint32_t s0, int64_t n_seq, int64_t i0 = 0);

// [n_embd, n_head, n_tokens*n_seq] -> the last n tokens of each sequence as [n_embd, n, n_head, n_seq], without a copy
ggml_tensor * indexmem_tokens_last(ggml_context * ctx, ggml_tensor * cur, int64_t n_tokens, int64_t n_seq, int64_t n);

// orthonormal Walsh-Hadamard matrix of size n, a power of two: what K and V of quantised caches are rotated by
std::vector<float> indexmem_hadamard(int64_t n);
