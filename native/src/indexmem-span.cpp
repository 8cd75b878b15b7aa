#include "indexmem-span.h"

#include <algorithm>
#include <cstdlib>

// Share of the span that entries may take after a rebase: room for distances that are true, against how often one is needed.
static double span_keep() {
    static const double keep = getenv("INDEXMEM_SPAN_KEEP") ? atof(getenv("INDEXMEM_SPAN_KEEP")) : 0.5;
    return keep;
}

int32_t indexmem_span_end(uint32_t span, uint32_t n_used, uint32_t n_tokens) {
    const int64_t keep = std::min((int64_t) (span_keep()*span), (int64_t) span - n_tokens);
    return (int32_t) std::max<int64_t>(n_used, keep);
}

std::vector<int32_t> indexmem_span_rebase(const std::vector<int32_t> & rotary, uint32_t n_protected, uint32_t n_window, int32_t end) {
    const int64_t n   = rotary.size();
    const int64_t top = n_protected + n_window;

    // the largest gap with which every head fits, wherever its entries lie
    const int64_t gap = n > top ? std::max<int64_t>(1, (end - top)/(n - top)) : 1;

    std::vector<int32_t> res = rotary;
    for (int64_t i = n - 1; i >= n_protected; --i) {
        res[i] = i == n - 1 ? end - 1 : res[i + 1] - (int32_t) std::min<int64_t>(gap, rotary[i + 1] - rotary[i]);
    }
    return res;
}
