#include "indexmem-window.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

// No fewer than attention sees and one ubatch writes; padded as llama.cpp does it. It must not depend on n_ctx: a bounded
// conversation may become longer.
static uint32_t n_cells(const llama_model & model, uint32_t n_ubatch) {
    return GGML_PAD(model.hparams.n_swa + n_ubatch, 256);
}

indexmem_window::indexmem_window(const llama_model & model, ggml_type type_k, ggml_type type_v, bool offload, uint32_t n_seq_max,
        uint32_t n_ubatch, const layer_filter_cb & filter, const layer_reuse_cb & reuse) :
    model(model),
    cache(model, model.hparams, type_k, type_v, /*v_trans =*/ false, offload, /*unified =*/ false, n_cells(model, n_ubatch), n_seq_max,
            /*n_pad =*/ 1, model.hparams.n_swa, model.hparams.swa_type, nullptr, filter, reuse, nullptr) {
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    llama_kv_cache::slot_info first = { 0, 0, { 0 }, {} };
    for (uint32_t il : cache.get_layer_ids()) {
        ggml_reset(ctx.get());
        stores.push_back(cache.get_k_storage(il));
        stores.push_back(cache.get_v(ctx.get(), il, 1, first)->view_src);
    }
}

llama_pos indexmem_window::first_seen(llama_pos p0) const {
    const auto & hparams = model.hparams;

    llama_pos first = p0;
    while (first > 0 && !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, first - 1, p0)) {
        --first;
    }
    return first;
}

bool indexmem_window::can_go_on(llama_seq_id seq_id, llama_pos p0) const {
    const llama_pos first = first_seen(p0);
    const llama_pos held  = cache.seq_pos_min(seq_id);
    return first == p0 || (held >= 0 && held <= first);
}

llama_pos indexmem_window::first_way_on(llama_seq_id seq_id) const {
    const llama_pos held = cache.seq_pos_min(seq_id);
    llama_pos p0 = held + (llama_pos) model.hparams.n_swa;
    while (p0 > held && can_go_on(seq_id, p0 - 1)) {
        --p0;
    }
    return held <= 0 ? 0 : p0;
}

// Its cells are overwritten in the order of their positions, since those of a tail that is taken back are the next to be used.
uint32_t indexmem_window::n_spare() const {
    return cache.get_size() - model.hparams.n_swa;
}

std::vector<indexmem_state_piece> indexmem_window::rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & cells = cache.get_cells(seq_id);

    std::vector<int64_t> where(std::max(p1 - p0, 0), -1); // the row of each position
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq_id) && cells.pos_in(i, p0, p1)) {
            where[cells.pos_get(i) - p0] = (int64_t) cache.get_stream(seq_id)*cache.get_size() + i;
        }
    }
    std::vector<indexmem_state_piece> res;
    for (ggml_tensor * t : stores) {
        for (size_t i = 0; i < where.size();) {
            size_t n = 1;
            while (i + n < where.size() && where[i + n] == where[i] + (int64_t) n) {
                ++n;
            }
            GGML_ASSERT(where[i] >= 0);
            res.push_back({ t, where[i]*t->nb[1], n*t->nb[1] });
            i += n;
        }
    }
    return res;
}

llama_ubatch indexmem_ubatch_of(llama_batch_allocr & balloc, llama_seq_id & seq_id, llama_pos p0, llama_pos p1) {
    const int64_t n = p1 - p0;

    llama_ubatch res = balloc.ubatch_reserve(n, 1);
    res.seq_id_unq[0] = seq_id;
    for (int64_t i = 0; i < n; ++i) {
        for (uint32_t j = 0; j < res.n_pos; ++j) {
            res.pos[j*n + i] = p0 + i;
        }
        res.n_seq_id[i] = 1;
        res.seq_id[i]   = &seq_id;
    }
    return res;
}

void indexmem_window::place(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    cache.seq_rm(seq_id, -1, -1);
    if (p0 >= p1) {
        return;
    }
    GGML_ASSERT(p1 - p0 <= (llama_pos) cache.get_size());

    llama_batch_allocr balloc(model.hparams.n_pos_per_embd());
    const auto ubatch = indexmem_ubatch_of(balloc, seq_id, p0, p1);
    const auto slots = cache.find_slot(ubatch, false);
    GGML_ASSERT(!slots.empty()); // the stream of the sequence is empty
    cache.apply_ubatch(slots, ubatch);
}

void indexmem_window::copy(llama_seq_id src, llama_seq_id dst, llama_pos p1) {
    const llama_pos p0 = cache.seq_pos_min(src);
    if (p0 < 0 || p0 >= p1) {
        place(dst, 0, 0);
        return;
    }
    const auto bytes = indexmem_state_get(rows(src, p0, p1));
    place(dst, p0, p1);
    indexmem_state_set(rows(dst, p0, p1), bytes);
}

void indexmem_window::learn_rotation(llama_kv_cache_bounded & bounded, int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard) {
    if (bounded.get_span() == 0 || !k_cur || layers.count(il)) {
        return;
    }
    layer l = { {}, hadamard ? hadamard->ne[0] : 0 };
    std::string error;
    if (indexmem_rotation_of(k_cur, hadamard, l.rotation, error)) {
        layers[il] = std::move(l);
        return;
    }
    bounded.drop_span(format("keys of layer %d cannot get new positions: %s", il, error.c_str()));
}

template <typename F>
void indexmem_window::for_each(F f) {
    for (auto & [il, l] : layers) {
        if (!l.rotation.rotates) {
            continue;
        }
        // a row of the cache holds the keys of all heads of a token
        ggml_tensor keys = *cache.get_k_storage(il);
        const int64_t n_head = model.hparams.n_head_kv(il);
        GGML_ASSERT(ggml_is_contiguous(&keys) && keys.ne[0] % n_head == 0);

        keys.ne[1] = ggml_nrows(&keys)*n_head;
        keys.ne[0] = keys.ne[0]/n_head;
        keys.ne[2] = keys.ne[3] = 1;
        keys.nb[1] = ggml_row_size(keys.type, keys.ne[0]);
        keys.nb[2] = keys.nb[3] = keys.nb[1]*keys.ne[1];
        if (!f(&keys, l, n_head)) {
            return;
        }
    }
}

void indexmem_window::reserve(llama_context & lctx, indexmem_rotator & rotator) {
    for_each([&](ggml_tensor * keys, const layer & l, int64_t) {
        rotator.reserve(lctx, keys, keys->ne[0], l.rotation, l.n_rot);
        return true;
    });
}

bool indexmem_window::turn(llama_context & lctx, indexmem_rotator & rotator, llama_seq_id seq_id, int32_t delta, std::string & error) {
    const auto  & cells = cache.get_cells(seq_id);
    const int64_t first = (int64_t) cache.get_stream(seq_id)*cache.get_size();

    bool ok = true;
    for_each([&](ggml_tensor * keys, const layer & l, int64_t n_head) {
        indexmem_turn what;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            for (int64_t h = 0; h < n_head && !cells.is_empty(i) && cells.seq_has(i, seq_id); ++h) {
                what.add((first + i)*n_head + h, delta);
            }
        }
        ok = rotator.turn(lctx, keys, keys->ne[0], l.rotation, l.n_rot, what, error);
        return ok;
    });
    return ok;
}
