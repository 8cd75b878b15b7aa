#pragma once

// A GPU that is the CPU: its memory is not the host's for all that can be asked, and it lacks what a test wants it to lack.

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "indexmem-ops.h"

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

    explicit fake_device(std::function<bool(const ggml_tensor *)> lacks) :
        lacks(lacks), memory(*ggml_backend_cpu_buffer_type()), device(*cpu_device()) {
        memory.device         = &device;
        memory.iface.get_name = [](ggml_backend_buffer_type_t) { return "FAKE"; };
        memory.iface.is_host  = [](ggml_backend_buffer_type_t) { return false; };
        device.context               = this;
        device.iface.get_name        = [](ggml_backend_dev_t) { return "FAKE0"; };
        device.iface.get_description = [](ggml_backend_dev_t) { return "a test device"; };
        device.iface.get_memory      = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 1u << 30; };
        device.iface.get_type        = [](ggml_backend_dev_t dev) { return of(dev)->type; };
        device.iface.get_props       = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
            *props = {};
            props->name         = "FAKE0";
            props->description  = "a test device";
            props->type         = of(dev)->type;
            props->memory_free  = props->memory_total = 1u << 30;
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
