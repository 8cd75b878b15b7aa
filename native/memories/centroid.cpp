#include "memory.h"

#include "indexmem-ops.h"

#include "ggml-backend.h"

// Centroid memory of IndexMem++: R slots in the softmax, each the mean of the keys and of the values it has taken up, with
// the logarithm of their number as its bias. Means and counts are fp32; attention reads a copy of the means in rows of K and
// V, of whatever type the cache has.
class memory_centroid : public indexmem_memory {
public:
    static constexpr uint32_t SLOTS_DEFAULT = 64;
    static constexpr uint32_t SLOTS_MAX     = 4096;

    memory_centroid(const indexmem_geometry & geometry, const indexmem_metadata * meta) {
        if (!meta) {
            return;
        }
        R    = meta->u32("indexmem.centroid.slot_count", 1, SLOTS_MAX);
        on   = meta->bools("indexmem.centroid.enabled",  geometry.n_layer);
        gate = meta->f32s ("indexmem.centroid.gate",     geometry.n_layer);
        for (float g : gate) {
            if (!(g > 0.0f)) {
                throw indexmem_sidecar_error("key 'indexmem.centroid.gate' has a value that is not above 0: a layer is switched off "
                        "in 'indexmem.centroid.enabled'");
            }
        }
    }

    const char * kind() const override { return "centroid"; }

    bool enabled(uint32_t il) const override { return on.empty() || on[il]; }

    uint32_t n_slots() const override { return R; }

    bool set_slots(uint32_t n) override {
        if (n < 1 || n > SLOTS_MAX) {
            return false;
        }
        R = n;
        return true;
    }

    std::vector<indexmem_memory_shape> shapes(int64_t n_embd_k, int64_t n_embd_v) const override {
        return { { n_embd_k + n_embd_v, R }, { R, 1 } };
    }

    int keyed_state() const override { return 0; }

    std::vector<ggml_tensor *> build_write(ggml_context * ctx, const indexmem_memory_view & m, const indexmem_memory_leaving & e) const override {
        ggml_tensor * means = ggml_indexmem_centroid(ctx, m.state[0], count_of(ctx, m), e.k, e.v, e.plan, e.ctl);

        // To another device go rows without gaps: a copy of the view, which has them, writes past the end of its buffer on Vulkan.
        const bool elsewhere = buffer_type(m.state[0]) != buffer_type(e.k_slots);

        const auto part = [&](int64_t n, int64_t first) {
            ggml_tensor * view = ggml_view_4d(ctx, means, n, means->ne[1], means->ne[2], means->ne[3], means->nb[1], means->nb[2],
                    means->nb[3], first*sizeof(float));
            return elsewhere ? ggml_cont(ctx, view) : view;
        };
        return {
            means,
            ggml_set_rows(ctx, e.k_slots, part(e.k->ne[0], 0),          e.rows),
            ggml_set_rows(ctx, e.v_slots, part(e.v->ne[0], e.k->ne[0]), e.rows),
        };
    }

    ggml_tensor * build_count(ggml_context * ctx, const indexmem_memory_view & m) const override {
        ggml_tensor * count = count_of(ctx, m);
        const float g = gate.empty() ? 1.0f : gate[m.il];
        return g == 1.0f ? count : ggml_scale(ctx, count, g);
    }

private:
    static ggml_backend_buffer_type_t buffer_type(const ggml_tensor * t) {
        const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
        return buffer ? ggml_backend_buffer_get_type(buffer) : nullptr;
    }

    static ggml_tensor * count_of(ggml_context * ctx, const indexmem_memory_view & m) {
        ggml_tensor * t = m.state[1];
        return ggml_view_3d(ctx, t, t->ne[0], t->ne[2], t->ne[3], t->nb[2], t->nb[3], 0);
    }

    uint32_t R = SLOTS_DEFAULT;

    std::vector<bool>  on;   // [n_layer]; empty: all
    std::vector<float> gate; // [n_layer] factor of the counts; empty: 1
};

std::unique_ptr<indexmem_memory> indexmem_make_memory_centroid(const indexmem_geometry & geometry, const indexmem_metadata * meta) {
    return std::make_unique<memory_centroid>(geometry, meta);
}
