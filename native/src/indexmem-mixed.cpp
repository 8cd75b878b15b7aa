#include "indexmem-mixed.h"

#include "indexmem-error.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <limits>

//
// llama_memory_mixed
//

llama_memory_mixed::llama_memory_mixed(
        std::unique_ptr<llama_kv_cache_bounded> bounded,
        std::unique_ptr<indexmem_window>        window,
        std::unique_ptr<indexmem_recurrent>     recurrent) :
    bounded(std::move(bounded)), window(std::move(window)), recurrent(std::move(recurrent)), n_latest(this->bounded->get_n_seq_max(), 0) {
}

llama_memory_context_ptr llama_memory_mixed::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all); // a bounded cache does not serve embeddings

    balloc.split_reset();

    const uint32_t n_rs   = recurrent ? recurrent->get().n_rs_seq : 0;
    const uint32_t n_keep = n_rs > 0 ? n_rs + 1 : 0; // together at the end, to go back to

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = bounded->get_n_seq_max() == 1 && !recurrent ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, n_keep);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    const auto failed = [](llama_memory_status status) { return std::make_unique<llama_memory_mixed_context>(status); };
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    // none of these changes anything
    std::vector<llama_kv_cache_bounded::step> steps;
    const auto status = bounded->prepare(ubatches, steps);
    if (llama_memory_status_is_fail(status)) {
        return failed(status);
    }
    llama_kv_cache::slot_info_vec_t slots;
    if (window && (slots = window->get().prepare(ubatches)).empty()) {
        LLAMA_LOG_ERROR("%s: no room for the batch in the cache of the window\n", __func__);
        return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    if (recurrent && !recurrent->prepare(ubatches)) {
        LLAMA_LOG_ERROR("%s: no room for the batch in the recurrent state\n", __func__);
        return failed(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return std::make_unique<llama_memory_mixed_context>(this, std::move(steps), std::move(slots), std::move(ubatches));
}

llama_memory_context_ptr llama_memory_mixed::init_full() {
    return std::make_unique<llama_memory_mixed_context>(this);
}

llama_memory_context_ptr llama_memory_mixed::init_update(llama_context * lctx, bool optimize) {
    if (!this->lctx && window && bounded->get_span() > 0) {
        window->reserve(*lctx, bounded->get_rotator());
    }
    this->lctx = lctx;

    return std::make_unique<llama_memory_mixed_context>(bounded->init_update(lctx, optimize)->get_status());
}

void llama_memory_mixed::clear(bool data) {
    bounded->clear(data);
    std::fill(n_latest.begin(), n_latest.end(), 0);
    if (window) {
        window->get().clear(data);
    }
    if (recurrent) {
        recurrent->get().clear(data);
    }
}

bool llama_memory_mixed::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0) {
        bool res = true;
        for (uint32_t s = 0; s < bounded->get_n_seq_max(); ++s) {
            res &= seq_rm(s, p0, p1);
        }
        return res;
    }
    GGML_ASSERT((uint32_t) seq_id < bounded->get_n_seq_max());

    const llama_pos n_seen = bounded->get_seq(seq_id)->n_seen;

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    const bool all  = p0 == 0 && p1 >= n_seen;
    const bool some = p0 < n_seen && p0 < p1 && !all;
    if (some && (!bounded->can_seq_rm(seq_id, p0, p1) || (window && !window->can_go_on(seq_id, p0)))) {
        return false;
    }
    if (recurrent && some && n_seen - p0 >= (llama_pos) n_latest[seq_id]) {
        return false; // its snapshots, if it keeps any, are of the tokens of one ubatch
    }
    if (recurrent && (all || some) && !recurrent->get().seq_rm(seq_id, p0, -1)) {
        return false; // and has not changed
    }
    n_latest[seq_id] = all || some ? 0 : n_latest[seq_id];
    if (window) {
        window->get().seq_rm(seq_id, p0, p1); // also of a ubatch that was not computed
    }
    return bounded->seq_rm(seq_id, p0, p1);
}

void llama_memory_mixed::begin_recurrent(const llama_ubatch & ubatch) {
    if (lctx && recurrent->moves(ubatch)) {
        llama_synchronize(lctx); // the ubatch before may still be running
    }
    recurrent->begin(ubatch);
}

void llama_memory_mixed::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst || !bounded->can_seq_cp(seq_id_src, p0, p1)) {
        return;
    }
    const bool part = p1 >= 0 && p1 < bounded->get_seq(seq_id_src)->n_seen;
    if (part && (recurrent || (window && !window->can_go_on(seq_id_src, p1)))) {
        LLAMA_LOG_ERROR("%s: %s; nothing copied\n", __func__, recurrent ? "a recurrent state is copied whole" :
                "the window no longer holds what the end of the prefix looks at");
        return;
    }
    bounded->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    if (lctx) {
        llama_synchronize(lctx);
    }
    if (window) {
        window->copy(seq_id_src, seq_id_dst, bounded->get_seq(seq_id_dst)->n_seen);
    }
    if (recurrent) {
        recurrent->copy(seq_id_src, seq_id_dst, bounded->get_seq(seq_id_dst)->n_seen);
        n_latest[seq_id_dst] = 0;
    }
}

void llama_memory_mixed::seq_keep(llama_seq_id seq_id) {
    for (uint32_t s = 0; s < bounded->get_n_seq_max(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            seq_rm(s, -1, -1);
        }
    }
}

void llama_memory_mixed::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    bounded->seq_add(seq_id, p0, p1, shift); // says that nothing changes
}

void llama_memory_mixed::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    bounded->seq_div(seq_id, p0, p1, d); // likewise
}

llama_pos llama_memory_mixed::seq_pos_min(llama_seq_id seq_id) const {
    const llama_pos last = bounded->seq_pos_max(seq_id);
    if (last < 0) {
        return -1;
    }
    if (recurrent) {
        return last; // where there are snapshots seq_rm finds out
    }
    const llama_pos first = bounded->seq_pos_min(seq_id);
    return window ? std::max(first, std::min(window->first_way_on(seq_id) - 1, last)) : first;
}

llama_pos llama_memory_mixed::seq_pos_max(llama_seq_id seq_id) const {
    return bounded->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_mixed::memory_breakdown() const {
    auto res = bounded->memory_breakdown();
    const auto add = [&](const llama_memory_i & part) {
        for (const auto & [buft, size] : part.memory_breakdown()) {
            res[buft] += size;
        }
    };
    if (window) {
        add(window->get());
    }
    if (recurrent) {
        add(recurrent->get());
    }
    return res;
}

static size_t size_of(const llama_memory_i & memory) {
    size_t res = 0;
    for (const auto & [buft, size] : memory.memory_breakdown()) {
        res += size;
    }
    return res;
}

size_t llama_memory_mixed::size_window_bytes() const {
    return window ? size_of(window->get()) : 0;
}

size_t llama_memory_mixed::size_recurrent_bytes() const {
    return recurrent ? size_of(recurrent->get()) : 0;
}

bool llama_memory_mixed::rebase(const llama_kv_cache_bounded::step & st) {
    // how far the newest tokens of each sequence move; with them all that is in the window
    std::vector<int32_t> deltas;
    for (uint32_t i = 0; i < st.n_seq; ++i) {
        const auto & seq = *bounded->get_seq(st.s0 + i);
        deltas.push_back(seq.n_rebases == st.before[i].n_rebases ? 0 : st.before[i].rotary_next() - seq.rotary_next());
    }
    if (!bounded->rebase(st)) {
        for (uint32_t i = 0; i < st.n_seq; ++i) {
            if (deltas[i] != 0) {
                bounded->spoil(st.s0 + i); // one that was turned whose window was not
            }
        }
        return false;
    }
    for (uint32_t i = 0; window && i < st.n_seq; ++i) {
        const int64_t t_start = ggml_time_us();

        std::string error;
        bool ok = true;
        try {
            ok = deltas[i] == 0 || window->turn(*lctx, bounded->get_rotator(), st.s0 + i, deltas[i], error);
        } catch (const std::exception & err) { // no memory
            ok    = false;
            error = err.what();
        }
        if (!ok) {
            for (; i < st.n_seq; ++i) {
                if (deltas[i] != 0) {
                    bounded->spoil(st.s0 + i); // what it holds was turned, its window was not
                }
            }
            LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
            indexmem_error_is(error);
            return false;
        }
        bounded->rebase_us += ggml_time_us() - t_start;
    }
    return true;
}

void llama_memory_mixed::finish(const llama_kv_cache_bounded::step & st) {
    std::fill_n(n_latest.begin() + st.s0, st.n_seq, st.n_tokens);
}

void llama_memory_mixed::abandon(const llama_kv_cache_bounded::step & st) {
    for (uint32_t i = 0; i < st.n_seq; ++i) {
        if (window) {
            window->get().seq_rm(st.s0 + i, st.before[i].n_seen, -1);
        }
    }
    if (!recurrent) {
        return;
    }
    for (uint32_t s = 0; s < bounded->get_n_seq_max(); ++s) {
        if (recurrent->touched(s)) { // also one that was only moved, to make room
            bounded->spoil(s);
        }
    }
    recurrent->abandon();
}

//
// llama_memory_mixed_context
//

llama_memory_mixed_context::llama_memory_mixed_context(llama_memory_mixed * mem) :
    mem(mem), status(LLAMA_MEMORY_STATUS_SUCCESS), bounded(new llama_kv_cache_bounded_context(&mem->get_bounded())) {
    if (mem->get_window()) {
        window.reset(new llama_kv_cache_context(&mem->get_window()->get()));
    }
    if (mem->get_recurrent()) {
        recurrent.reset(new llama_memory_recurrent_context(&mem->get_recurrent()->get()));
    }
}

llama_memory_mixed_context::llama_memory_mixed_context(
        llama_memory_mixed * mem,
        std::vector<llama_kv_cache_bounded::step> steps,
        llama_kv_cache::slot_info_vec_t           slots,
        std::vector<llama_ubatch>                 ubatches) :
    mem(mem), status(LLAMA_MEMORY_STATUS_SUCCESS), ubatches(std::move(ubatches)),
    bounded(new llama_kv_cache_bounded_context(&mem->get_bounded(), std::move(steps), this->ubatches)) {
    if (mem->get_window()) {
        window.reset(new llama_kv_cache_context(&mem->get_window()->get(), std::move(slots), this->ubatches));
    }
    if (mem->get_recurrent()) {
        recurrent.reset(new llama_memory_recurrent_context(&mem->get_recurrent()->get(), this->ubatches));
    }
}

llama_memory_mixed_context::~llama_memory_mixed_context() {
    if (begun) {
        const auto st = bounded->get_step();
        bounded.reset(); // puts its own part in order
        mem->abandon(st);
    }
}

bool llama_memory_mixed_context::next() {
    mem->finish(bounded->get_step());
    begun = false;
    if (window) {
        window->next();
    }
    if (recurrent) {
        recurrent->next();
    }
    ++i_cur;
    return bounded->next();
}

bool llama_memory_mixed_context::apply() {
    if (ubatches.empty()) {
        return true;
    }
    if (!mem->rebase(bounded->get_step()) || !bounded->apply()) {
        return false;
    }
    if (recurrent) {
        mem->begin_recurrent(get_ubatch());
    }
    begun = true;
    return !window || window->apply();
}

void llama_memory_mixed_context::learn_window_rotation(int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard) const {
    if (mem->get_window()) {
        mem->get_window()->learn_rotation(mem->get_bounded(), il, k_cur, hadamard);
    }
}

//
// what others ask
//

const llama_memory_mixed_context * indexmem_mixed_context(const llama_memory_context_i * mctx) {
    return dynamic_cast<const llama_memory_mixed_context *>(mctx);
}

const llama_kv_cache_bounded_context * indexmem_context(const llama_memory_context_i * mctx) {
    const auto * mixed = indexmem_mixed_context(mctx);
    return mixed ? mixed->get_bounded() : dynamic_cast<const llama_kv_cache_bounded_context *>(mctx);
}

uint32_t indexmem_n_drafts(const llama_memory_i * memory, llama_seq_id seq_id, uint32_t n, bool copied) {
    const auto * bounded = indexmem_bounded(memory);
    const auto * seq     = bounded ? bounded->get_seq(seq_id) : nullptr;
    if (!bounded || !seq) {
        return bounded ? 0 : n; // without a budget llama.cpp's own rules are in force
    }
    if (const auto * mixed = dynamic_cast<const llama_memory_mixed *>(memory)) {
        if (const auto * window = mixed->get_window()) {
            n = std::min(n, window->n_spare() - 1);
        }
        if (const auto * recurrent = mixed->get_recurrent(); recurrent && !copied) {
            n = std::min(n, recurrent->get().n_rs_seq);
        }
    }
    return bounded->get_counts().n_drafts(*seq, n);
}

const llama_kv_cache_bounded * indexmem_bounded(const llama_memory_i * memory) {
    const auto * mixed = dynamic_cast<const llama_memory_mixed *>(memory);
    return mixed ? &mixed->get_bounded() : dynamic_cast<const llama_kv_cache_bounded *>(memory);
}

llama_kv_cache_bounded * indexmem_bounded(llama_memory_i * memory) {
    return const_cast<llama_kv_cache_bounded *>(indexmem_bounded(const_cast<const llama_memory_i *>(memory)));
}
