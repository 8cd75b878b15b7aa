#include "indexmem-kv-cache.h"

//
// llama_kv_cache_bounded_context
//

llama_kv_cache_bounded_context::llama_kv_cache_bounded_context(llama_kv_cache_bounded * kv, llama_memory_status status) :
    kv(kv), status(status) {
}

llama_kv_cache_bounded_context::llama_kv_cache_bounded_context(llama_kv_cache_bounded * kv) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS) {
    step st = {};
    st.n_seq  = kv->get_n_seq_max();
    st.evict  = true;
    st.rotary = kv->get_span() > 0;
    st.recall = kv->get_memory() != nullptr;
    for (uint32_t c = 0; c < indexmem_kv_counts::N_CLASSES_MAX; ++c) {
        st.n_kv[c] = kv->get_geometry().n_kv_max(c, st.recall);
    }
    st.score  = kv->get_indexer() != nullptr;
    st.n_old  = st.score ? kv->get_n_wait() : 0;
    for (uint32_t s = 0; s < st.n_seq; ++s) {
        st.before.push_back(*kv->get_seq(s));
    }
    st.after = st.before;
    steps.push_back(std::move(st));
}

llama_kv_cache_bounded_context::llama_kv_cache_bounded_context(
        llama_kv_cache_bounded * kv,
        std::vector<step> steps,
        std::vector<llama_ubatch> ubatches) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), steps(std::move(steps)), ubatches(std::move(ubatches)) {
}

llama_kv_cache_bounded_context::~llama_kv_cache_bounded_context() {
    if (begun) {
        kv->abandon(steps[i_cur]);
    }
}

bool llama_kv_cache_bounded_context::next() {
    GGML_ASSERT(status == LLAMA_MEMORY_STATUS_SUCCESS);
    if (begun) {
        kv->finish(steps[i_cur]);
        begun = false;
    }
    return ++i_cur < ubatches.size();
}

bool llama_kv_cache_bounded_context::apply() {
    GGML_ASSERT(!llama_memory_status_is_fail(status));
    if (ubatches.empty()) {
        return true;
    }
    begun = kv->rebase(steps[i_cur]);
    return begun;
}

const llama_ubatch & llama_kv_cache_bounded_context::get_ubatch() const {
    GGML_ASSERT(status == LLAMA_MEMORY_STATUS_SUCCESS);
    return ubatches[i_cur];
}

const llama_ubatch * llama_kv_cache_bounded_context::get_rotary_ubatch(const llama_ubatch & ubatch) const {
    const step & st = steps[i_cur];
    if (!st.rotary) {
        return &ubatch;
    }
    rotary_pos.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens); // of text all dimensions of a position are this one
    for (uint32_t i = 0; i < st.n_seq*st.n_tokens; ++i) {
        rotary_pos[i] -= st.before[i/st.n_tokens].shift;
    }
    rotary_ubatch     = ubatch;
    rotary_ubatch.pos = rotary_pos.data();
    return &rotary_ubatch;
}
