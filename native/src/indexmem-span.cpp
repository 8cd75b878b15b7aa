#include "indexmem-span.h"

#include <algorithm>

// Half of the span may be taken by entries after a rebase: room for distances that are true, and half of it for new tokens. On
// books that gives the likelihood of a denser rule or a little more, and facts are found as often.
int32_t indexmem_span_end(uint32_t span, uint32_t n_used, uint32_t n_tokens) {
    return (int32_t) std::max<uint32_t>(n_used, std::min(span/2, span - n_tokens));
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
