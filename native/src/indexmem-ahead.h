#pragma once

#include "indexmem-rotation.h"

#include <cstdint>
#include <vector>

//
// What queries are on average, seen from the positions that follow theirs
//
// A query that comes later is rotated further. The policy `expected` ranks by queries that were not asked yet, and so by the mean of
// the rotations by 1 to INDEXMEM_N_AHEAD positions: what turns quickly vanishes in it, what turns slowly stays.
//
constexpr int INDEXMEM_N_AHEAD = 512; // a power of two

// That mean as a matrix [n][n] for ggml_mul_mat(), for queries of n values as they are cached: rot is the size of the Hadamard
// rotation of a quantised cache, 0 = none.
std::vector<float> indexmem_ahead(const indexmem_rotation & rotation, int64_t n, int64_t rot);
