#pragma once

// A GPU that is the CPU: its memory is not the host's for all that can be asked, and it lacks what a test wants it to lack. It counts
// what goes in and out of its memory, and what stays there.

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "indexmem-ops.h"

#include <cstring>
#include <functional>

inline ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// kind of our op, or -1
inline int op_kind(const ggml_tensor * op) {
    return op->op == GGML_OP_INDEXMEM ? ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP) : -1;
}

struct fake_device {
    std::function<bool(const ggml_tensor *)> lacks;

    enum ggml_backend_dev_type type = GGML_BACKEND_DEVICE_TYPE_GPU;

    ggml_backend_buffer_type memory;
    ggml_backend_device      device;

    size_t n_free  = 1u << 30; // bytes that it says it has left, of so many in all
    size_t n_total = 1u << 30;
    size_t refuses = SIZE_MAX; // allocations of at least so many bytes
    size_t n_max   = SIZE_MAX; // bytes of a buffer

    // bytes, and how often
    struct counts {
        size_t n_in = 0, n_out = 0, n_inside = 0; // from the host, to it, and neither
        int    n_inside_calls = 0;
    };
    counts moved;

    explicit fake_device(std::function<bool(const ggml_tensor *)> lacks) :
        lacks(lacks), memory(*ggml_backend_cpu_buffer_type()), device(*cpu_device()) {
        memory.device         = &device;
        memory.iface.get_name = [](ggml_backend_buffer_type_t) { return "FAKE"; };
        memory.iface.is_host  = [](ggml_backend_buffer_type_t) { return false; };
        memory.iface.get_max_size = [](ggml_backend_buffer_type_t buft) { return of(buft->device)->n_max; };
        memory.iface.alloc_buffer = [](ggml_backend_buffer_type_t buft, size_t size) -> ggml_backend_buffer_t {
            if (size >= of(buft->device)->refuses) {
                return nullptr;
            }
            ggml_backend_buffer_t res = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
            res->buft             = buft;
            res->iface.set_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t n) {
                memcpy((char *) t->data + offset, data, n);
                of(buffer->buft->device)->moved.n_in += n;
            };
            res->iface.get_tensor = [](ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset, size_t n) {
                memcpy(data, (const char *) t->data + offset, n);
                of(buffer->buft->device)->moved.n_out += n;
            };
            res->iface.cpy_tensor = [](ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
                if (src->buffer->buft != buffer->buft) {
                    return false;
                }
                memcpy(dst->data, src->data, ggml_nbytes(src));
                of(buffer->buft->device)->moved.n_inside += ggml_nbytes(src);
                of(buffer->buft->device)->moved.n_inside_calls++;
                return true;
            };
            return res;
        };
        device.context               = this;
        device.iface.get_name        = [](ggml_backend_dev_t) { return "FAKE0"; };
        device.iface.get_description = [](ggml_backend_dev_t) { return "a test device"; };
        device.iface.get_memory      = [](ggml_backend_dev_t dev, size_t * free, size_t * total) {
            *free  = of(dev)->n_free;
            *total = of(dev)->n_total;
        };
        device.iface.get_type        = [](ggml_backend_dev_t dev) { return of(dev)->type; };
        device.iface.get_props       = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
            *props = {};
            props->name         = "FAKE0";
            props->description  = "a test device";
            props->type         = of(dev)->type;
            props->memory_free  = of(dev)->n_free;
            props->memory_total = of(dev)->n_total;
        };
        device.iface.init_backend = [](ggml_backend_dev_t dev, const char *) {
            ggml_backend_t res = ggml_backend_cpu_init();
            res->device = dev;
            return res;
        };
        device.iface.get_buffer_type = [](ggml_backend_dev_t dev) { return &of(dev)->memory; };
        device.iface.supports_buft   = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &of(dev)->memory; };
        device.iface.supports_op     = [](ggml_backend_dev_t dev, const ggml_tensor * op) {
            return !of(dev)->lacks(op) && ggml_backend_dev_supports_op(cpu_device(), op);
        };
        device.iface.buffer_from_host_ptr = nullptr;
    }

    fake_device(const fake_device &) = delete;

private:
    static fake_device * of(ggml_backend_dev_t dev) { return (fake_device *) dev->context; }
};
