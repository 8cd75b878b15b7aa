#pragma once

//
// llama-bench reads its options by itself: the options of the cache are taken out of them first. The budget may be a list.
//

#include "indexmem-options.h"

#include <vector>

struct llama_context_params;

void indexmem_bench_usage();

// Takes the options of the cache out of the arguments of the program. Ends it when one of them is impossible.
void indexmem_bench_take(int & argc, char ** argv);

// In the order in which they were named; {0} without a --kv-budget
const std::vector<uint32_t> & indexmem_bench_budgets();

bool indexmem_bench_has_budgets();

// Before a context is made: asks for the bounded cache, and sets the parameters that it needs.
void indexmem_bench_prepare(uint32_t budget, llama_context_params & params);

// the tests of one budget after those of another
template <typename T>
std::vector<T> indexmem_bench_each_budget(const std::vector<T> & tests) {
    std::vector<T> res;
    for (const uint32_t budget : indexmem_bench_budgets()) {
        for (const T & test : tests) {
            res.push_back(test);
            res.back().kv_budget = budget;
        }
    }
    return res;
}
