#pragma once

// What a device can do for a bounded cache that lies in its memory, the CPU among them.

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>

struct llama_hparams;

// of a layer, what decides which kernels its cache needs
struct indexmem_device_needs {
    ggml_type type_k;
    ggml_type type_v;
    int64_t   n_embd_k;
    int64_t   n_embd_v;
    int64_t   n_head_kv;
    int64_t   n_group; // query heads of a KV head
    int       policy;  // index into policies.def

    static indexmem_device_needs of_layer(
            const llama_hparams & hparams, uint32_t il, ggml_type type_k, ggml_type type_v, int policy);
};

// The first thing the device has no kernel for, or null. Such a cache has to lie in host memory: what is written in place is
// computed where it lies.
const char * indexmem_device_lacks(ggml_backend_dev_t dev, const indexmem_device_needs & needs);

// Memory for the cache of a layer next to `dev`: that of the device, or the host's if the device lacks something. Logs the
// reason once a device.
ggml_backend_buffer_type_t indexmem_device_buft(ggml_backend_dev_t dev, const indexmem_device_needs & needs);

// Whether our op attends to keys that lie where these do: in host memory, if the CPU backend's kernels have vectors. It is
// faster there than flash attention at every length, and the only one of the two with values summed in fp32 throughout; one
// lane at a time it would be several times slower.
bool indexmem_device_attends(const ggml_tensor * k);
