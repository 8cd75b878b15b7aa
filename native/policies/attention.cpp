#include "policy.h"
#include "policy-math.h"

#include <algorithm>
#include <cmath>

// shared by the policies that look at attention: tova, snapkv
void indexmem_attention_row(const indexmem_rank_view & view, int64_t g, int32_t p, float * prob) {
    const float * q = view.query(g, p);

    float max = -INFINITY;
    for (int64_t i = 0; i < view.n; ++i) {
        if (view.pos[i] > p) {
            prob[i] = -INFINITY;
            continue;
        }
        float logit = view.scale*indexmem_dot(q, view.k + i*view.n_embd, view.n_embd);
        if (view.softcap != 0.0f) {
            logit = view.softcap*std::tanh(logit/view.softcap);
        }
        prob[i] = logit;
        max = logit > max ? logit : max;
    }
    if (max == -INFINITY) {
        for (int64_t i = 0; i < view.n; ++i) {
            prob[i] = 0.0f;
        }
        return;
    }

    const double sink = view.sinks ? view.sinks[g] : -INFINITY;
    max = std::max(max, (float) sink);

    const double sum = ggml_vec_soft_max_f32((int) view.n, prob, prob, max) + std::exp(sink - max);
    ggml_vec_scale_f32((int) view.n, prob, (float) (1.0/sum));
}
