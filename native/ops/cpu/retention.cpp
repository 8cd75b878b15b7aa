#include "kernels.h"
#include "vec.h"

// A retention scorer for a few tokens, each by one thread. As a graph it is nine nodes, and a barrier after each costs more
// than the whole network does for one token.

namespace indexmem_cpu {

namespace {

const ggml_tensor * matrix_of(const ggml_tensor * op, bool first) {
    return op->src[first && op->src[3] ? 3 : 6];
}

struct retention_work {
    size_t hidden; // [n_embd] normalised
    size_t mid;    // [n_mid]
    size_t row;    // one of these in the type that a matrix takes
    size_t size;

    explicit retention_work(const ggml_tensor * op) {
        const ggml_tensor * in = op->src[3];

        hidden = 0;
        mid    = hidden + align_up(op->src[0]->ne[0]*sizeof(float));
        row    = mid    + align_up((in ? in->ne[1] : 0)*sizeof(float));
        size   = row;
        for (bool first : { true, false }) {
            const ggml_tensor * w = matrix_of(op, first);
            size = std::max(size, row + align_up(ggml_row_size(ggml_get_type_traits_cpu(w->type)->vec_dot_type, w->ne[0])));
        }
    }
};

void layer_norm(const float * x, float * y, int64_t n, const ggml_tensor * weight, const ggml_tensor * bias, float eps) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += x[i];
    }
    const float mean = (float) (sum/n);
    sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        y[i] = x[i] - mean;
        sum += (double) (y[i]*y[i]);
    }
    const float scale = 1.0f/std::sqrt((float) (sum/n) + eps);
    for (int64_t i = 0; i < n; ++i) {
        y[i] = y[i]*scale*((const float *) weight->data)[i] + ((const float *) bias->data)[i];
    }
}

// y = w x, as ggml computes it: x in the type that dot products with w take, made in `row`
void multiply(const ggml_tensor * w, const float * x, void * row, float * y, int64_t stride) {
    const auto * traits = ggml_get_type_traits_cpu(w->type);
    const void * data   = x;
    if (traits->vec_dot_type != GGML_TYPE_F32) {
        ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x, row, w->ne[0]);
        data = row;
    }
    for (int64_t i = 0; i < w->ne[1]; ++i) {
        traits->vec_dot((int) w->ne[0], y + i*stride, 0, (const char *) w->data + i*w->nb[1], 0, data, 0, 1);
    }
}

} // namespace

size_t retention_work_size(const ggml_tensor * op, int n_tasks) {
    return retention_work(op).size*n_tasks;
}

void retention(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x  = dst->src[0];
    const ggml_tensor * in = dst->src[3]; // null: the trunk is linear

    const float   eps     = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_EPS);
    const int64_t n_state = dst->ne[0];
    const int64_t n_head  = dst->ne[1];

    const retention_work layout(dst);
    char * work = (char *) params->wdata + params->ith*layout.size;
    float * hidden = (float *) (work + layout.hidden);
    float * mid    = (float *) (work + layout.mid);
    void  * row    = work + layout.row;

    for (int64_t t = params->ith; t < x->ne[1]; t += params->nth) {
        layer_norm((const float *) ((const char *) x->data + t*x->nb[1]), hidden, x->ne[0], dst->src[1], dst->src[2], eps);

        const float * trunk = hidden;
        if (in) {
            multiply(in, hidden, row, mid, 1);
            layer_norm(mid, mid, in->ne[1], dst->src[4], dst->src[5], eps);
            ggml_vec_gelu_erf_f32((int) in->ne[1], mid, mid);
            trunk = mid;
        }
        float * out = (float *) ((char *) dst->data + t*dst->nb[2]);
        multiply(dst->src[6], trunk, row, out, n_state);
        if (n_state == 1) {
            continue;
        }
        multiply(dst->src[7], trunk, row, out + 1, n_state);
        for (int64_t h = 0; h < n_head; ++h) {
            float & l = out[h*n_state + 1];
            l = -ggml_compute_softplus_f32(l + ((const float *) dst->src[8]->data)[h]);
        }
    }
}

} // namespace indexmem_cpu
