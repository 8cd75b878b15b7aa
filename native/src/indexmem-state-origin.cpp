#include "indexmem-state-reader.h"

#include <algorithm>

using kv_cache = llama_kv_cache_bounded;

//
// States of caches with other options: what may differ, and what becomes of it
//
//   budget, step, seed, ratio   decide what leaves from now on. What is too much leaves when the state is read (counts.fit)
//   budgets of layers           likewise, as long as layers that have one budget here held equally much there
//   sinks, window, pin          protect what is there; what is gone does not come back (n_first, n_last)
//   policy                      one that ranks by keys and positions needs nothing of a state. Kept queries go on where there are
//                               some; where there are none, the policy that reads them has to see enough new ones before it evicts.
//                               Scores of an indexer are needed by that indexer, and nobody else has a use for them
//   memory                      goes on in one of the same kind and size; none at all forgets it, and a new one begins empty
//

static const char * AGAIN = "use the options that the state was made with, or evaluate the text again";

// the parts whose rows a policy, an indexer or a memory of these names has
static bool has_part(const indexmem_state_origin & o, int part) {
    switch (part) {
        case INDEXMEM_STATE_ENTRIES: return true;
        case INDEXMEM_STATE_RING:    return o.n_ring > 0 && o.policy != INDEXMEM_STATE_INDEXER;
        case INDEXMEM_STATE_QUERIES: return o.n_ring > 0 && o.policy == INDEXMEM_STATE_INDEXER;
        case INDEXMEM_STATE_MEMORY:  return o.memory != "off";
        default:                     return o.policy == INDEXMEM_STATE_INDEXER;
    }
}

// Whether a part of a state may have another size than here, because it belongs to another sidecar or memory. What is not compared
// here is read as the state says it, before what it is worth is known.
static bool other_size(const indexmem_state_origin & o, const indexmem_state_origin & ours, int part) {
    switch (part) {
        case INDEXMEM_STATE_ENTRIES:
        case INDEXMEM_STATE_RING:   return false;
        case INDEXMEM_STATE_MEMORY: return o.memory != ours.memory || o.n_latent != ours.n_latent || o.sidecar != ours.sidecar;
        default:                    return o.sidecar != ours.sidecar;
    }
}

indexmem_state_origin indexmem_state_origin_of(const kv_cache & kv) {
    const auto & cfg = kv.get_config();

    indexmem_state_origin res = {};
    res.version  = indexmem_state_version_of(kv);
    res.policy   = kv.get_policy().name;
    res.memory   = indexmem_state_name(kv.get_memory());
    res.n_latent = kv.get_n_latent();
    res.sidecar  = cfg.sidecar ? cfg.sidecar->get_hash() : 0;
    res.n_ring   = kv.get_n_ring();
    return res;
}

bool indexmem_state_goes_on(const indexmem_state_origin & o, const indexmem_state_origin & ours, int part) {
    return has_part(o, part) && has_part(ours, part) && (part != INDEXMEM_STATE_RING || o.n_ring == ours.n_ring);
}

indexmem_state_origin indexmem_state_get_header(indexmem_state_reader & in, const kv_cache & kv) {
    const indexmem_state_origin ours = indexmem_state_origin_of(kv);

    in.expect(INDEXMEM_STATE_MAGIC, "magic");

    indexmem_state_origin res = {};
    res.version = in.get<uint32_t>();
    if (res.version < INDEXMEM_STATE_VERSION_OLDEST || res.version > INDEXMEM_STATE_VERSION) {
        throw std::runtime_error(format("bounded KV state: has format %u, this version of indexmem-edge reads formats %u to %u: "
                    "evaluate the text again", res.version, INDEXMEM_STATE_VERSION_OLDEST, INDEXMEM_STATE_VERSION));
    }
    const bool sized = res.version > 7;

    res.policy   = in.get_name("policy");
    res.memory   = in.get_name("memory");
    res.n_latent = in.get<uint32_t>();
    if (!sized) {
        res.sinks  = in.get<uint32_t>();
        res.window = in.get<uint32_t>();
    }
    res.sidecar = in.get<uint64_t>();
    res.n_ring  = in.get<uint32_t>();

    in.expect(kv.get_rot_k(),         "rotation of K");
    in.expect(kv.get_rot_v(),         "rotation of V");
    const bool classes = res.version > INDEXMEM_STATE_VERSION_ONE;
    const bool sliced  = res.version > INDEXMEM_STATE_VERSION_WHOLE;

    std::vector<uint32_t> layers; // that are bounded here
    for (const auto & l : kv.get_layers()) {
        if (l.head == 0) {
            layers.push_back(l.il);
        }
    }
    uint32_t n_slices = layers.size();
    if (sliced) {
        n_slices = in.get<uint32_t>();
    } else {
        in.expect(n_slices, "number of layers");
    }
    res.n_classes = classes ? in.get<uint32_t>() : 1;
    if (res.n_classes < 1 || res.n_classes > indexmem_kv_counts::N_CLASSES_MAX) {
        throw std::runtime_error(format("bounded KV state: %u classes of layers, expected 1 to %u: it is damaged", res.n_classes,
                    indexmem_kv_counts::N_CLASSES_MAX));
    }

    bool whole = true; // sizes that belong to these names
    size_t at = 0;     // the layer of the next slice, and how many of its heads there were
    uint32_t n_before = 0;
    for (uint32_t i = 0; i < n_slices; ++i) {
        if (at == layers.size()) {
            throw std::runtime_error(format("bounded KV state: %u slices of %zu layers are too many: it is damaged", n_slices, layers.size()));
        }
        const uint32_t il     = layers[at];
        const uint32_t n_left = kv.get_n_head_kv(il) - n_before; // heads of the layer that are still to come
        in.expect(il, "index", il);
        const uint32_t cls = classes ? in.get<uint32_t>() : 0;
        if (cls >= res.n_classes) {
            throw std::runtime_error(format("bounded KV state: layer %u is of class %u of %u: it is damaged", il, cls, res.n_classes));
        }
        if (sliced) {
            in.expect(n_before, "first KV head of a slice", il);
        }
        const uint32_t n_head = in.get<uint32_t>();
        if (n_head < 1 || n_head > n_left || (!sliced && n_head != n_left)) {
            throw std::runtime_error(format("bounded KV state: number of KV heads of layer %u is %u in the state and %u in this context", il, n_head,
                        n_left));
        }
        const indexmem_slice heads = { il, n_before, n_head, cls };
        const auto & l = *kv.get_layer(il);
        in.expect(l.k->ne[0], "head size of K",     il);
        in.expect(l.v->ne[0], "head size of V",     il);
        in.expect(l.k->type,  "type of K",          il);
        in.expect(l.v->type,  "type of V",          il);

        const auto of_ours = indexmem_state_sizes_of(kv, heads);
        auto sizes = of_ours;
        for (int part = 0; sized && part < INDEXMEM_STATE_N_PARTS; ++part) {
            const uint32_t size = sizes[part] = in.get<uint32_t>();
            const bool     has  = has_part(res, part) && (n_before == 0 || (part != INDEXMEM_STATE_PENDING && part != INDEXMEM_STATE_QUERIES));
            whole = whole && (size > 0) == has;
            whole = whole && (!indexmem_state_goes_on(res, ours, part) || other_size(res, ours, part) || size == of_ours[part]);
        }
        res.slices.push_back(heads);
        res.sizes.push_back(sizes);
        at       += n_head == n_left;
        n_before  = n_head == n_left ? 0 : n_before + n_head;
    }
    if (at < layers.size()) {
        throw std::runtime_error(format("bounded KV state: %u slices are not all of %zu layers: it is damaged", n_slices, layers.size()));
    }

    const bool has_sidecar = res.policy == INDEXMEM_STATE_INDEXER || res.memory != "off";
    whole = whole && indexmem_policy_find(res.policy.c_str()) >= 0 && (res.memory == "off" || indexmem_memory_find(res.memory));
    whole = whole && (res.policy != ours.policy || res.sidecar != ours.sidecar || res.n_ring == ours.n_ring);
    whole = whole && (has_sidecar || res.sidecar == 0) && (res.memory != "off" || res.n_latent == 0);
    if (!whole) {
        throw std::runtime_error(format("bounded KV state: damaged, or made by a later version of indexmem-edge (policy '%s', memory '%s')",
                    res.policy.c_str(), res.memory.c_str()));
    }

    if (!sized && (res.policy != ours.policy || res.memory != ours.memory || res.n_latent != ours.n_latent ||
                res.sidecar != ours.sidecar || res.n_ring != ours.n_ring)) {
        throw std::runtime_error(format("bounded KV state: made with policy '%s', memory '%s' of %u slots and sidecar %016llx, this context has '%s', "
                    "'%s' of %u and %016llx. Its format, %u, does not say how to take up one without the other: load it with the options "
                    "that it was made with, and save it again", res.policy.c_str(), res.memory.c_str(), res.n_latent,
                    (unsigned long long) res.sidecar, ours.policy.c_str(), ours.memory.c_str(), ours.n_latent,
                    (unsigned long long) ours.sidecar, res.version));
    }
    return res;
}

// what ranks: an indexer by scores, which were computed when the text was read
static void require_scores(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & from) {
    if (!kv.get_indexer() || from.n_used == 0) {
        return;
    }
    if (o.policy != INDEXMEM_STATE_INDEXER) {
        throw std::runtime_error(format("bounded KV state: made with policy '%s', without the scores of its entries by which the indexer "
                    "of this context ranks: %s", o.policy.c_str(), AGAIN));
    }
    if (o.sidecar != kv.get_config().sidecar->get_hash()) {
        throw std::runtime_error("bounded KV state: made with another sidecar than the one of this context, whose indexer cannot rank "
                "by the scores of the other: use that one, or a policy without an indexer");
    }
}

static void require_memory(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & from) {
    const auto * memory = kv.get_memory();
    if (!memory || o.memory == "off" || from.n_evictions == 0) {
        return;
    }
    if (o.memory != memory->kind() || o.n_latent != kv.get_n_latent()) {
        throw std::runtime_error(format("bounded KV state: holds a memory '%s' of %u slots, this context has '%s' of %u: use the same one, "
                    "or none, which forgets it", o.memory.c_str(), o.n_latent, memory->kind(), kv.get_n_latent()));
    }
    if (!memory->tensors().empty() && o.sidecar != kv.get_config().sidecar->get_hash()) {
        throw std::runtime_error(format("bounded KV state: its memory '%s' was written with another sidecar than the one of this context: use "
                    "that one, or no memory, which forgets it", o.memory.c_str()));
    }
}

// What ranks by queries has to find them where it evicts first: so many, the newest.
static void require_queries(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & seq, bool kept) {
    const uint32_t n_queries = kv.get_indexer() ? 0 : kv.get_policy().n_queries;
    const uint32_t n_latent  = kv.get_n_latent();
    const uint32_t budget    = kv.get_config().budget_of(0) - n_latent; // policies that read queries have one class
    const char   * name      = kv.get_policy().name;
    const bool     too_many  = seq.n_used > budget;

    if (n_queries == 1 && too_many) {
        throw std::runtime_error(format("bounded KV state: holds %u entries and the budget has room for %u. The policy '%s' ranks by the query of the "
                    "newest token, which a state does not have: use a budget of at least %u, or another policy to load it with",
                    seq.n_used, budget, name, seq.n_used + n_latent));
    }
    const int32_t n_missing = seq.ring_from - std::max(0, seq.n_seen - (int32_t) n_queries);
    if (n_queries <= 1 || seq.n_used == 0 || n_missing <= 0 || (kept && !too_many)) {
        return;
    }
    const uint32_t now    = std::min(budget, kv.get_counts().budget_of(seq));
    const uint32_t n_room = now - std::min(seq.n_used, now);
    if (too_many || n_room + 1 < n_queries) {
        throw std::runtime_error(format("bounded KV state: made with policy '%s', and without the last %u queries by which '%s' ranks. There "
                    "is room for %u more entries, fewer than bring as many: use a budget of at least %u, or another policy",
                    o.policy.c_str(), n_queries, name, n_room, seq.n_used + n_latent + n_queries - 1));
    }
}

kv_cache::seq_state indexmem_state_adopt(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & from) {
    const auto & cfg  = kv.get_config();
    const auto   ours = indexmem_state_origin_of(kv);

    require_scores(kv, o, from);
    require_memory(kv, o, from);

    kv_cache::seq_state res = from;
    if (!kv.get_indexer()) {
        res.n_scored = 0;
    } else if (from.n_used == 0) {
        res.n_scored = res.n_seen;
    }
    const bool kept = indexmem_state_goes_on(o, ours, kv.get_indexer() ? INDEXMEM_STATE_QUERIES : INDEXMEM_STATE_RING);
    if (!kept) {
        res.ring_from = kv.get_n_ring() > 0 ? res.n_seen : 0;
    }
    if (kv.get_load_pin() >= 0) {
        const uint32_t pin = (uint32_t) kv.get_load_pin();
        res.pin = res.n_evictions > 0 ? std::min(pin, std::max(res.n_first, res.pin)) : pin; // its own, where only some heads have all of it
    }
    const uint64_t least = indexmem_kv_counts::budget_min(cfg.sinks, res.pin, cfg.window, kv.get_n_latent());
    if (cfg.budget < least) {
        throw std::runtime_error(format("bounded KV state: its pinned prefix of %u tokens needs a budget of at least %llu (max(sinks %u, pin) + "
                    "window %u + %u slots of the memory + 1), the budget is %u", res.pin, (unsigned long long) least, cfg.sinks,
                    cfg.window, kv.get_n_latent(), cfg.budget));
    }
    require_queries(kv, o, res, kept);
    return res;
}
