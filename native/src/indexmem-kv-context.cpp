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
    st.n_kv   = (kv->get_n_front() + kv->get_n_slots())/kv->N_KV_PAD*kv->N_KV_PAD;
    st.evict  = true;
    st.recall = kv->get_memory() != nullptr;
    st.score  = kv->get_indexer() != nullptr;
    st.n_old  = st.score ? kv->get_n_wait() : 0;
    st.before = kv->seqs;
    st.after  = kv->seqs;
    steps.push_back(std::move(st));
}

llama_kv_cache_bounded_context::llama_kv_cache_bounded_context(
        llama_kv_cache_bounded * kv,
        std::vector<step> steps,
        std::vector<llama_ubatch> ubatches) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), steps(std::move(steps)), ubatches(std::move(ubatches)) {
}

bool llama_kv_cache_bounded_context::next() {
    GGML_ASSERT(status == LLAMA_MEMORY_STATUS_SUCCESS);
    return ++i_cur < ubatches.size();
}

bool llama_kv_cache_bounded_context::apply() {
    GGML_ASSERT(!llama_memory_status_is_fail(status));
    if (!ubatches.empty()) {
        kv->apply(steps[i_cur]);
    }
    return true;
}

const llama_ubatch & llama_kv_cache_bounded_context::get_ubatch() const {
    GGML_ASSERT(status == LLAMA_MEMORY_STATUS_SUCCESS);
    return ubatches[i_cur];
}
