#include "indexmem-graph-cache.h"

#include "indexmem-mixed.h"

// The ubatches of decode: of more tokens the compute buffers are large, and one for each kind would be too much.
static constexpr uint32_t N_TOKENS = 32;

int indexmem_graph_cache::kind_of(const llama_memory_context_i * mctx, bool pipelines, const llama_ubatch & ubatch) {
    const auto * bounded = indexmem_context(mctx);
    if (!bounded || pipelines || ubatch.n_tokens > N_TOKENS) {
        return 0;
    }
    const auto & st = bounded->get_step();
    const auto * mixed = indexmem_mixed_context(mctx);
    return (mixed ? 4*mixed->get_bank() : 0) + (st.evict ? 2 : 0) + (st.score ? 1 : 0);
}

void indexmem_graph_cache::take(int kind, ggml_backend_sched_ptr & sched, results & res, llm_graph_result *& active,
        const std::function<ggml_backend_sched_t()> & make) {
    if (kind == current) {
        return;
    }
    kinds[current] = { std::move(sched), std::move(res), active };

    aside & next = kinds[kind];
    sched  = next.sched ? std::move(next.sched) : ggml_backend_sched_ptr(make());
    res    = std::move(next.res);
    active = next.active;

    kinds.erase(kind);
    current = kind;
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
