#include "indexmem-graph-cache.h"

#include "indexmem-mixed.h"

#include <algorithm>
#include <iterator>

// The ubatches of decode: of more tokens the compute buffers are large, and one for each kind would be too much.
static constexpr uint32_t N_TOKENS = 32;

static constexpr size_t N_ASIDE = 12;

// How many tokens a batch of drafts or of several sequences has, 0 for any other. Of these all logits are read: the end of a prompt,
// which has any number of tokens as well, comes once.
static uint32_t rows_of(const llama_ubatch & ubatch) {
    const bool all = ubatch.n_tokens > 1 && std::all_of(ubatch.output, ubatch.output + ubatch.n_tokens, [](int8_t o) { return o != 0; });
    return all ? ubatch.n_tokens : 0;
}

int indexmem_graph_cache::kind_of(const llama_memory_context_i * mctx, bool pipelines, const llama_ubatch & ubatch) {
    const auto * bounded = indexmem_context(mctx);
    if (!bounded || pipelines || ubatch.n_tokens > N_TOKENS) {
        return 0;
    }
    const auto & st = bounded->get_step();
    const auto * mixed = indexmem_mixed_context(mctx);
    return 8*rows_of(ubatch) + (mixed ? 4*mixed->get_bank() : 0) + (st.evict ? 2 : 0) + (st.score ? 1 : 0);
}

void indexmem_graph_cache::take(int kind, ggml_backend_sched_ptr & sched, results & res, llm_graph_result *& active,
        const std::function<ggml_backend_sched_t()> & make) {
    if (kind == current) {
        return;
    }
    kinds[current] = { std::move(sched), std::move(res), active, ++n_changes };

    aside & next = kinds[kind];
    sched  = next.sched ? std::move(next.sched) : ggml_backend_sched_ptr(make());
    res    = std::move(next.res);
    active = next.active;

    kinds.erase(kind);
    current = kind;

    if (kinds.size() > N_ASIDE) { // what it computed has long been read: other graphs came after it
        const auto first = kinds.begin()->first == 0 ? std::next(kinds.begin()) : kinds.begin();
        kinds.erase(std::min_element(first, kinds.end(), [](const auto & a, const auto & b) { return a.second.put < b.second.put; }));
    }
}

size_t indexmem_graph_cache::size(ggml_backend_t backend) const {
    size_t res = 0;
    for (const auto & [kind, aside] : kinds) {
        res += aside.sched ? ggml_backend_sched_get_buffer_size(aside.sched.get(), backend) : 0;
    }
    return res;
}

void indexmem_graph_cache::clear() {
    kinds.clear();
    current = 0;
}
