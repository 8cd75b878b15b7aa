#include "memory.h"

#include "indexmem-ops.h"

#include "ggml-backend.h"

#include <cmath>

// Residual memory of IndexMem (arXiv 2605.25475, as its code has it): with f(x) = phi x, a matrix A and a normaliser b
//
//   write, once per eviction    A = decay*A + rate * sum f(k)^T v      b = decay*b + rate * sum f(k)^2
//   read, for every query       o + gate * f(q) A / max(f(q)^2 . b, eps)
class memory_residual : public indexmem_memory {
public:
    memory_residual(const indexmem_geometry & geometry, const indexmem_metadata * meta) {
        if (!meta) {
            throw indexmem_sidecar_error("the memory 'residual' needs trained weights: pass a sidecar that has them");
        }
        n_feature = meta->u32("indexmem.residual.feature_dim", 1, 65536);
        n_dim     = meta->u32("indexmem.residual.head_dim",    1, 65536);
        eps       = meta->f32_pos("indexmem.residual.eps");
        gate      = meta->f32s ("indexmem.residual.gate_logit",  geometry.n_layer);
        rate      = meta->f32s ("indexmem.residual.eta_raw",     geometry.n_layer);
        decay     = meta->f32s ("indexmem.residual.decay_logit", geometry.n_layer);
        on        = meta->bools("indexmem.residual.enabled",     geometry.n_layer);
        for (uint32_t il = 0; il < geometry.n_layer; ++il) {
            gate [il] = sigmoid(gate[il]);
            rate [il] = softplus(rate[il]);
            decay[il] = sigmoid(decay[il]);
        }
    }

    const char * kind() const override { return "residual"; }

    bool enabled(uint32_t il) const override { return on[il]; }

    std::vector<indexmem_tensor_spec> tensors() const override {
        return { { "phi_proj.weight", { n_dim, n_feature }, false } };
    }

    uint32_t n_embd_head() const override { return n_dim; }

    // phi (M x) = (phi M) x, and the matrix is symmetric
    void rotate_weights(const indexmem_weights & weights, const std::vector<float> & rotation, int64_t n) const override {
        ggml_tensor * t = weights.at("phi_proj.weight");

        std::vector<float> phi(ggml_nelements(t)), res(phi.size(), 0.0f);
        ggml_backend_tensor_get(t, phi.data(), 0, ggml_nbytes(t));
        for (size_t i = 0; i < phi.size(); ++i) {
            const size_t i0 = i/n*n; // of the block
            for (int64_t j = 0; j < n; ++j) {
                res[i] += rotation[(i - i0)*n + j]*phi[i0 + j];
            }
        }
        ggml_backend_tensor_set(t, res.data(), 0, ggml_nbytes(t));
    }

    std::vector<indexmem_memory_shape> shapes(int64_t n_embd_k, int64_t n_embd_v) const override {
        GGML_UNUSED(n_embd_k);
        return { { n_feature, n_embd_v + 1 } };
    }

    std::vector<ggml_tensor *> build_write(ggml_context * ctx, const indexmem_memory_view & m, const indexmem_memory_leaving & e) const override {
        ggml_tensor * phi = m.weights->at("phi_proj.weight");
        return { ggml_indexmem_residual(ctx, m.state[0], phi, e.k, e.v, e.plan, e.ctl, rate[m.il], decay[m.il]) };
    }

    ggml_tensor * build_add(ggml_context * ctx, const indexmem_memory_view & m, ggml_tensor * q, ggml_tensor * cur) const override {
        ggml_tensor * s = m.state[0];

        const int64_t n_embd_v = cur->ne[0];
        const int64_t n_rows   = cur->ne[1]*cur->ne[2]; // queries of a KV head
        const int64_t n_stream = cur->ne[3];            // (KV head, sequence): neighbours in memory

        const auto rows_of_state = [&](int64_t first, int64_t n) {
            return ggml_view_3d(ctx, s, n_feature, n, n_stream, s->nb[1], s->nb[2], first*s->nb[1]);
        };
        // Devices multiply many rows of F32 in half precision (Metal) or TF32 (CUDA), whatever is asked for, and sums of squares do not
        // fit in that. A few rows they do not, so there each is a matrix of its own.
        const bool on_host = s->buffer && ggml_backend_buffer_is_host(s->buffer);
        const auto product = [&](ggml_tensor * a, ggml_tensor * b) {
            const int64_t n = b->ne[2];
            if (!on_host && a->ne[2] == 1) { // weights: of all rows
                b = ggml_reshape_3d(ctx, b, b->ne[0], 1, n_rows*n);
            } else if (!on_host) {
                a = ggml_view_4d(ctx, a, a->ne[0], a->ne[1], 1, n, a->nb[1], a->nb[2], a->nb[2], 0);
                b = ggml_reshape_4d(ctx, b, b->ne[0], 1, n_rows, n);
            }
            ggml_tensor * res = ggml_mul_mat(ctx, a, b);
            ggml_prec_set_acc(res, GGML_PREC_F32);
            return ggml_reshape_3d(ctx, res, res->ne[0], n_rows, n);
        };
        q = ggml_permute(ctx, q, 0, 2, 1, 3); // as the output: [n_embd_k, G, T, H*S]
        if (!ggml_is_contiguous(q)) {
            q = ggml_cont(ctx, q);
        }
        q = ggml_reshape_3d(ctx, q, q->ne[0], n_rows, n_stream);

        ggml_tensor * f   = product(m.weights->at("phi_proj.weight"), q);
        ggml_tensor * num = product(rows_of_state(0, n_embd_v), f);
        ggml_tensor * den = product(rows_of_state(n_embd_v, 1), ggml_sqr(ctx, f));
        ggml_tensor * out = ggml_div(ctx, num, ggml_clamp(ctx, den, eps, INFINITY));

        return ggml_add(ctx, cur, ggml_reshape_4d(ctx, ggml_scale(ctx, out, gate[m.il]), n_embd_v, cur->ne[1], cur->ne[2], n_stream));
    }

private:
    static float sigmoid (float x) { return (float) (1.0/(1.0 + std::exp(-(double) x))); }
    static float softplus(float x) { return (float) (x > 20.0f ? (double) x : std::log1p(std::exp((double) x))); }

    uint32_t n_feature;
    uint32_t n_dim;
    float    eps;

    // [n_layer]
    std::vector<float> gate;
    std::vector<float> rate;
    std::vector<float> decay;
    std::vector<bool>  on;
};

std::unique_ptr<indexmem_memory> indexmem_make_memory_residual(const indexmem_geometry & geometry, const indexmem_metadata * meta) {
    return std::make_unique<memory_residual>(geometry, meta);
}
