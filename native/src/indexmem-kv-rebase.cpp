#include "indexmem-kv-cache.h"

#include "indexmem-ahead.h"
#include "indexmem-error.h"
#include "indexmem-span.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <numeric>

//
// New rotary positions for what a bounded cache holds (indexmem-span.h)
//

void llama_kv_cache_bounded::learn_rotation(int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard) {
    const auto & of_layer = map_layer_ids.at(il);
    layer & l = layers[of_layer[0]];
    if ((get_span() == 0 && !l.ahead) || l.rotation) {
        return;
    }
    indexmem_rotation rotation;
    std::string error;
    if (indexmem_rotation_of(k_cur, hadamard, rotation, error)) {
        for (size_t i : of_layer) {
            layers[i].rotation = rotation;
        }
        write_ahead(l);
        return;
    }
    if (get_span() > 0) {
        drop_span(format("keys of layer %d cannot get new positions: %s", il, error.c_str()));
    }
    if (l.ahead) {
        LLAMA_LOG_WARN("%s: in layer %d the policy ranks by queries where they are, not from later positions: %s\n", __func__, il, error.c_str());
        l.rotation = indexmem_rotation(); // not tried again
    }
}

// what is known of the rotation of the layer's queries; until then they stay as they are
void llama_kv_cache_bounded::write_ahead(const layer & l) const {
    if (l.ahead && l.ahead->data) {
        const auto data = indexmem_ahead(l.rotation ? *l.rotation : indexmem_rotation(), l.ahead->ne[0], rot_k);
        ggml_backend_tensor_set(l.ahead, data.data(), 0, ggml_nbytes(l.ahead));
    }
}

void llama_kv_cache_bounded::drop_span(const std::string & why) {
    if (cfg.span_asked) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, why + ": use a span of 0");
    }
    LLAMA_LOG_WARN("%s: rotary positions grow without end: %s\n", __func__, why.c_str());
    span_reason = why;
    counts.drop_span();
}

void llama_kv_cache_bounded::reserve_rotator() {
    for (const auto & l : layers) {
        if (get_span() > 0 && l.rotation && l.rotation->rotates) {
            rotator.reserve(*lctx, l.k, l.k->ne[0], *l.rotation, rot_k);
        }
    }
}

// what the layer holds of sequence s, to positions below `end`
bool llama_kv_cache_bounded::turn_layer(uint32_t s, layer & l, const seq_state & of_all, int32_t end, std::string & error) {
    const seq_state from = of_all.of(l.cls);

    const int64_t  n_used      = from.n_used;
    const int32_t  newest      = end - from.rotary_next(); // how far the newest tokens move, and with them what has no position
    const uint32_t n_protected = std::min(counts.n_protected(from, l.cls), from.n_first);
    const uint32_t n_window    = std::min(counts.window_of(of_all), from.n_last);

    const bool remembers = cfg.memory && from.n_evictions > 0;

    indexmem_turn keys;
    std::vector<int32_t> order(n_used), sorted(n_used), rotary(n_used);
    for (int64_t h = 0; h < l.k->ne[2]; ++h) {
        const auto pos    = get_positions(s, l, h);
        const auto before = get_rotary   (s, l, h);

        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return pos[a] < pos[b]; });
        for (int64_t i = 0; i < n_used; ++i) {
            sorted[i] = before[order[i]];
        }
        sorted = indexmem_span_rebase(sorted, n_protected, n_window, end);
        for (int64_t i = 0; i < n_used; ++i) {
            rotary[order[i]] = sorted[i];
        }

        const int64_t row = (s*l.k->ne[2] + h)*l.k->ne[1];
        for (int64_t i = 0; remembers && i < get_n_latent(); ++i) {
            keys.add(row + i, newest);
        }
        for (int64_t i = 0; i < n_used; ++i) {
            keys.add(row + get_n_front() + i, rotary[i] - before[i]);
        }
        const size_t offset = h*l.pos->nb[1] + s*l.pos->nb[2];
        ggml_backend_tensor_set(l.pos,    pos.data(),    offset, n_used*sizeof(int32_t));
        ggml_backend_tensor_set(l.rotary, rotary.data(), offset, n_used*sizeof(int32_t));
    }

    // all rows of a tensor of the sequence
    const auto whole = [&](const ggml_tensor * t) {
        const int64_t n = t->ne[1]*t->ne[2];
        indexmem_turn res;
        for (int64_t i = s*n; i < (s + 1)*n; ++i) {
            res.add(i, newest);
        }
        return res;
    };
    const auto turn = [&](ggml_tensor * t, const indexmem_turn & what) {
        return rotator.turn(*lctx, t, l.k->ne[0], *l.rotation, rot_k, what, error);
    };
    return turn(l.k, keys) && (!l.q || turn(l.q, whole(l.q))) &&
        (!remembers || turn(l.memory[cfg.memory->keyed_state()], whole(l.memory[cfg.memory->keyed_state()])));
}

bool llama_kv_cache_bounded::rebase(const step & st) {
    for (uint32_t i = 0; i < st.n_seq; ++i) {
        const uint32_t s = st.s0 + i;
        if (get_seq(s)->n_rebases == st.before[i].n_rebases) {
            continue;
        }
        llama_synchronize(lctx); // the ubatch before may still be running

        const int64_t   t_start = ggml_time_us();
        const seq_state from    = *get_seq(s);

        seq_state   to = st.before[i];
        std::string error;
        try {
            for (layer & l : layers) {
                to.broken = to.broken || !turn_layer(s, l, from, to.rotary_next(), error);
            }
        } catch (const std::exception & err) { // no memory
            to.broken = true;
            error     = err.what();
        }
        counts.assign(s, to);
        if (to.broken) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
            indexmem_error_is(error);
            return false;
        }
        rebase_us += ggml_time_us() - t_start;
    }
    return true;
}
