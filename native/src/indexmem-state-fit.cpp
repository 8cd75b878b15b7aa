#include "indexmem-state-reader.h"

#include "indexmem-graph.h"
#include "indexmem-layer-nodes.h"
#include "indexmem-nodes.h"

#include "llama-model.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <thread>

using kv_cache = llama_kv_cache_bounded;

//
// A state that does not fit: more entries than the budget, or more tokens that wait to be scored than may
//
// It is read into a cache like ours, of its size and in the host's memory, and the graph of an eviction is computed there, of a step of
// no tokens. What is left has the size that ours has room for.
//

namespace {

// the bytes of a state that have been read already
class memory_reader : public llama_io_read_i {
public:
    explicit memory_reader(const std::vector<uint8_t> & data) : data(data) {}

    void read(void * dst, size_t size) override {
        if (size > data.size() - done) {
            throw std::runtime_error("bounded KV state: ends too early");
        }
        memcpy(dst, data.data() + done, size);
        done += size;
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        std::vector<uint8_t> buf(size);
        read(buf.data(), size);
        ggml_backend_tensor_set(tensor, buf.data(), offset, size);
    }

    size_t n_bytes() override { return done; }

private:
    const std::vector<uint8_t> & data;

    size_t done = 0;
};

bool in_host(const ggml_tensor * t) {
    return !t || !t->buffer || ggml_backend_buffer_is_host(t->buffer);
}

// Weights of a sidecar that lie on a device are read again for the CPU.
std::shared_ptr<const indexmem_sidecar> sidecar_of_host(const kv_cache & kv) {
    const auto & cfg = kv.get_config();
    bool host = true;
    for (const auto & l : kv.get_layers()) {
        for (const auto & [_, t] : cfg.sidecar ? cfg.sidecar->get_layer(l.il) : indexmem_weights()) {
            host = host && in_host(t);
        }
    }
    if (host) {
        return cfg.sidecar;
    }
    auto res = std::make_shared<indexmem_sidecar>(cfg.sidecar->get_path());
    res->load(kv.get_model(), false, kv.get_indexer() != nullptr, kv.get_memory() && !kv.get_memory()->tensors().empty());
    if (res->get_hash() != cfg.sidecar->get_hash()) {
        throw std::runtime_error("bounded KV state: the sidecar " + cfg.sidecar->get_path() + " has changed since this context was made");
    }
    return res;
}

// a cache like ours with room for what a sequence holds, in the host's memory
std::unique_ptr<kv_cache> cache_for(const kv_cache & kv, const kv_cache::seq_state & seq) {
    kv_cache::config cfg = kv.get_config();
    const uint32_t n_pending = kv.get_indexer() ? seq.n_pending() : 0; // without one nothing waits
    cfg.budget  = std::max(seq.n_used + kv.get_n_latent(), n_pending*indexmem_kv_counts::WAIT_SHARE);
    cfg.budget  = std::max(cfg.budget, kv.get_config().budget);
    for (uint32_t c = 0; c < cfg.budgets.size(); ++c) {
        cfg.budgets[c] = std::max(cfg.budgets[c], seq.of(c).n_used + kv.get_n_latent());
    }
    cfg.pin     = 0; // of a sequence that is empty
    cfg.span    = kv.get_span();
    cfg.sidecar = sidecar_of_host(kv);

    const auto & l = kv.get_layers()[0];
    return std::make_unique<kv_cache>(kv.get_model(), l.k->type, l.v->type, false, 1, 1, cfg,
            [&](int32_t il) { return kv.get_layer(il) != nullptr; });
}

// the tables and the rows of a sequence, however many it says there are
std::vector<uint8_t> read_sequence(llama_io_read_i & io, const indexmem_state_origin & o, const kv_cache & kv, const kv_cache::seq_state & from) {
    std::vector<uint8_t> res;
    const auto of = [&](const indexmem_slice & slice) { return from.of(kv.get_layer(slice.il, slice.head)->cls); };
    for (const auto & slice : o.slices) {
        indexmem_state_some(io, (uint64_t) of(slice).n_fixed*sizeof(int32_t)*slice.n_head*(from.n_rebases > 0 ? 2 : 1), &res);
    }
    for (size_t i = 0; i < o.slices.size(); ++i) {
        for (int part = 0; part < INDEXMEM_STATE_N_PARTS; ++part) {
            indexmem_state_some(io, o.sizes[i][part]*o.n_rows((indexmem_state_part) part, of(o.slices[i])), &res);
        }
    }
    return res;
}

ggml_backend_ptr cpu_backend() {
    ggml_backend_ptr res(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!res) {
        throw std::runtime_error("bounded KV state: there is no CPU backend to evict with");
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(res.get()));
    auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(res.get(), (int) std::max(1u, std::min(4u, std::thread::hardware_concurrency())));
    }
    return res;
}

// The step, in layer i of the cache. What is protected is what `target` protects, whose budget is smaller.
void compute(ggml_backend_t backend, const kv_cache & kv, const kv_cache & target, size_t i, const kv_cache::step & of_all) {
    kv_cache::layer         l    = kv.get_layers()[i];
    const kv_cache::layer & ours = target.get_layers()[i];
    const auto st = of_all.of(l.cls);

    ggml_context_ptr holder(ggml_init({ indexmem_layer_nodes::N_TENSORS*ggml_tensor_overhead() +
                ggml_graph_overhead_custom(indexmem_layer_nodes::N_TENSORS, false), nullptr, true }));
    ggml_context * ctx = holder.get();
    ggml_cgraph  * gf  = ggml_new_graph_custom(ctx, indexmem_layer_nodes::N_TENSORS, false);

    const uint32_t n_leaving = st.before[0].n_used - st.after[0].n_used;

    ggml_tensor * sinks = ours.sinks;
    if (!in_host(sinks)) {
        l.sinks = indexmem_new_input(ctx, "fit_sinks", sinks->type, sinks->ne[0]);
    }
    if (l.ahead) { // the cache of this step has seen no graph of the model, from which rotations are known
        std::vector<uint8_t> data(ggml_nbytes(l.ahead));
        ggml_backend_tensor_get(ours.ahead, data.data(), 0, data.size());
        ggml_backend_tensor_set(l.ahead, data.data(), 0, data.size());
    }
    std::optional<indexmem_latent>  latent;
    std::optional<indexmem_scoring> scoring;
    if (kv.get_memory()) {
        latent.emplace(kv, st);
    }
    const auto expand = [&](const std::vector<ggml_tensor *> & list) {
        for (ggml_tensor * t : list) {
            ggml_build_forward_expand(gf, t);
        }
    };
    if (st.score) {
        scoring.emplace(ctx, kv, l.cls, st, 0);
        std::vector<ggml_tensor *> nodes;
        ggml_tensor * scores = scoring->build_scores(ctx, kv, *kv.get_layer(l.il), nullptr, nodes);
        if (scores) {
            nodes.push_back(scoring->build_store(ctx, l, scores, kv.get_n_head_kv(l.il)));
        }
        expand(nodes);
    }
    ggml_tensor * ctl        = nullptr;
    ggml_tensor * ctl_rotary = nullptr;
    if (st.evict) {
        ctl        = indexmem_new_input(ctx, "fit_ctl", GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1);
        ctl_rotary = st.rotary ? indexmem_new_input(ctx, "fit_ctl_rotary", GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1) : nullptr;
        const indexmem_layer_nodes nodes(ctx, kv, l, 0, 1, n_leaving);
        expand(nodes.evict(nullptr, ctl, ctl_rotary, ours.scale, ours.softcap, latent ? &*latent : nullptr, scoring ? &*scoring : nullptr,
                nullptr)); // the cache lies in the host's memory
    }

    struct deleter { void operator()(ggml_gallocr_t a) const { ggml_gallocr_free(a); } };
    std::unique_ptr<std::remove_pointer_t<ggml_gallocr_t>, deleter> allocator(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!ggml_gallocr_alloc_graph(allocator.get(), gf)) {
        throw std::runtime_error("bounded KV state: there is no memory to evict what the budget has no room for");
    }
    if (ctl) {
        const auto data = indexmem_ctl_of(target, st.before[0], st.after[0], 0, l.cls);
        ggml_backend_tensor_set(ctl, data.data(), 0, ggml_nbytes(ctl));
    }
    if (ctl_rotary) {
        auto data = indexmem_ctl_of(target, st.before[0], st.after[0], 0, l.cls);
        data[INDEXMEM_CTL_POS_TAIL] -= st.before[0].shift;
        ggml_backend_tensor_set(ctl_rotary, data.data(), 0, ggml_nbytes(ctl_rotary));
    }
    if (l.sinks != sinks) {
        std::vector<uint8_t> data(ggml_nbytes(sinks));
        ggml_backend_tensor_get(sinks, data.data(), 0, data.size());
        ggml_backend_tensor_set(l.sinks, data.data(), 0, data.size());
    }
    if (latent) {
        latent->set_input();
    }
    if (scoring) {
        scoring->set_input(kv, st);
    }
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("bounded KV state: evicting what the budget has no room for failed");
    }
}

} // namespace

void indexmem_state_hold_fitted(llama_io_read_i & io, const indexmem_state_origin & o, const kv_cache & kv,
        const kv_cache::seq_state & from, const kv_cache::step & what, uint32_t stream, std::vector<indexmem_state_held> & held) {
    kv_cache::step st = what;
    st.s0 = 0; // the only one there
    if (kv.get_layers().empty()) {
        return;
    }
    const auto data = read_sequence(io, o, kv, from); // first: what it says of its size is not to be trusted
    const auto wide = cache_for(kv, st.before[0]);

    {
        memory_reader reader(data);
        std::vector<indexmem_state_held> rows;
        indexmem_state_hold_sequence(reader, o, *wide, from, st.before[0], 0, rows);
        for (const auto & h : rows) {
            h.apply();
        }
    }
    const auto backend = cpu_backend();
    for (size_t i = 0; i < kv.get_layers().size(); ++i) {
        compute(backend.get(), *wide, kv, i, st);
    }

    // the same pieces of both, which lie elsewhere
    const auto move = [&](const std::vector<indexmem_state_piece> & source, const std::vector<indexmem_state_piece> & target) {
        const auto bytes = indexmem_state_get(source);
        size_t done = 0;
        for (const auto & piece : target) {
            GGML_ASSERT(done + piece.size <= bytes.size());
            held.push_back({ piece, { bytes.begin() + done, bytes.begin() + done + piece.size } });
            done += piece.size;
        }
        GGML_ASSERT(done == bytes.size());
    };
    for (const auto & l : kv.get_layers()) {
        move(indexmem_state_table(*wide, l.heads(), st.after[0], 0), indexmem_state_table(kv, l.heads(), st.after[0], stream));
        const auto source = indexmem_state_rows_of(*wide, l.heads(), st.after[0], 0);
        const auto target = indexmem_state_rows_of(kv, l.heads(), st.after[0], stream);
        for (int part = 0; part < INDEXMEM_STATE_N_PARTS; ++part) {
            move(source[part], target[part]);
        }
    }
}
