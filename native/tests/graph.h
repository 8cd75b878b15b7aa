#pragma once

// one op in a graph of its own: on the CPU backend, on the device that INDEXMEM_TEST_DEVICE names, or wherever
// op_elsewhere takes it

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h" // types alone: the CPU backend may be a library that is loaded at run time
#include "ggml-impl.h"
#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

// Set by a program that runs kernels of a device on the CPU: computes a node whose tensors are in host memory, and returns
// false if the device has no such op (the CPU backend takes it then).
inline std::function<bool(ggml_tensor *)> op_elsewhere;

inline ggml_backend_t op_backend() {
    if (ggml_backend_reg_count() == 0) {
        ggml_backend_load_all();
    }
    const char * name = getenv("INDEXMEM_TEST_DEVICE");
    ggml_backend_t res = name ? ggml_backend_init_by_name(name, nullptr) :
        ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (!res) {
        fprintf(stderr, "there is no device %s\n", name ? name : "of the CPU");
        exit(EXIT_FAILURE);
    }
    return res;
}

// INDEXMEM_TEST_THREADS, or what a test asks for
inline int test_threads(int n_threads) {
    const char * all = getenv("INDEXMEM_TEST_THREADS");
    return all ? atoi(all) : n_threads;
}

// one of the buffer types in which the CPU backend lays out weights in another way, or null if this CPU or build has none of the name
inline ggml_backend_buffer_type_t op_extra_buffer_type(const char * name) {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto get = (ggml_backend_dev_get_extra_bufts_t)
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get ? get(dev) : nullptr; buft && *buft; ++buft) {
        if (strcmp(ggml_backend_buft_name(*buft), name) == 0) {
            return *buft;
        }
    }
    return nullptr;
}

inline void op_set_n_threads(ggml_backend_t backend, int n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    const auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(backend, n_threads);
    }
}

class op_graph {
public:
    op_graph() : ctx(ggml_init({ 128*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true })), backend(op_backend()) {
    }

    ~op_graph() {
        ggml_backend_buffer_free(buffer);
        ggml_backend_free(backend);
        ggml_free(ctx);
    }

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    }

    // after all tensors exist
    void alloc() {
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    }

    template <typename T>
    void set(ggml_tensor * t, const std::vector<T> & data) {
        GGML_ASSERT(data.size()*sizeof(T) == ggml_nbytes(t));
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }

    template <typename T>
    std::vector<T> get(const ggml_tensor * t) {
        std::vector<T> data(ggml_nbytes(t)/sizeof(T));
        ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
        return data;
    }

    void compute(const std::vector<ggml_tensor *> & outputs, int n_threads) {
        ggml_cgraph * gf = ggml_new_graph(ctx);
        for (ggml_tensor * t : outputs) {
            ggml_build_forward_expand(gf, t);
        }
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
                fprintf(stderr, "%s does not support %s\n", ggml_backend_name(backend), ggml_op_desc(ggml_graph_node(gf, i)));
                exit(EXIT_FAILURE);
            }
        }
        op_set_n_threads(backend, test_threads(n_threads));
        if (!op_elsewhere) {
            GGML_ASSERT(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);
            return;
        }
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!op_elsewhere(ggml_graph_node(gf, i))) {
                ggml_cgraph one = ggml_graph_view(gf, i, i + 1);
                GGML_ASSERT(ggml_backend_graph_compute(backend, &one) == GGML_STATUS_SUCCESS);
            }
        }
    }

    // whether the device of the tests has an op: ours always, ggml's own perhaps for other shapes only
    bool has(const ggml_tensor * op) const { return ggml_backend_supports_op(backend, op); }

    ggml_context * ctx;

private:
    ggml_backend_t        backend;
    ggml_backend_buffer_t buffer = nullptr;
};

// a tensor of any type from fp32 values
inline std::vector<uint8_t> to_type(ggml_type type, const std::vector<float> & values, int64_t n_per_row) {
    const int64_t n_rows = (int64_t) values.size()/n_per_row;
    std::vector<uint8_t> data(ggml_row_size(type, n_per_row)*n_rows);
    if (type == GGML_TYPE_F32) {
        memcpy(data.data(), values.data(), data.size());
    } else {
        ggml_quantize_chunk(type, values.data(), data.data(), 0, n_rows, n_per_row, nullptr);
    }
    return data;
}

inline std::vector<float> from_type(ggml_type type, const std::vector<uint8_t> & data, int64_t n) {
    std::vector<float> values(n);
    if (type == GGML_TYPE_F32) {
        memcpy(values.data(), data.data(), data.size());
    } else {
        ggml_get_type_traits(type)->to_float(data.data(), values.data(), n);
    }
    return values;
}
