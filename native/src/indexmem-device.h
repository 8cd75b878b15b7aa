#pragma once

// What a device can do for a bounded cache that lies in its memory, the CPU among them.

#include "ggml-backend.h"
#include "ggml.h"

#include <functional>
#include <string>
#include <vector>

// Builds the nodes that a cache takes part in, in contexts without memory. host: the same context as `ctx`, or another one for a
// device without kernels of ours (indexmem-stock.h), for what then lies in the host's memory.
typedef std::function<std::vector<ggml_tensor *>(ggml_context * ctx, ggml_context * host)> indexmem_device_question;

// The first of the nodes, and of those that they are computed from, that the device has no kernel for, in words; "" if it has
// all. Not asked about are ops that every backend has, as long as they write nothing in place, and what an indexer computes
// from its own state: ggml's scheduler gives those to the CPU if need be.
std::string indexmem_device_lacks(ggml_backend_dev_t dev, const indexmem_device_question & question);

// The same of a device that is to do without kernels of ours. It is asked about all nodes but those that the CPU computes: ours that
// do not read the cache itself, and what writes into the host's memory.
std::string indexmem_device_lacks_stock(ggml_backend_dev_t dev, const indexmem_device_question & question);

// Memory for a cache next to `dev`: that of the device, with kernels of ours or (stock) without, or the host's if the device lacks
// something either way, because what is written in place is computed where it lies, and keys and values are too large to be
// copied. Logs the reason once a device.
ggml_backend_buffer_type_t indexmem_device_buft(ggml_backend_dev_t dev, const indexmem_device_question & question, bool & stock);

// The question about caches of the usual kind, f16 and heads of 128: when there is no cache yet. With all kinds of memory, which ask for
// nothing more of a device without kernels of ours
std::vector<ggml_tensor *> indexmem_device_usual(ggml_context * ctx, ggml_context * host, int policy);

// Whether our op attends to keys that lie where these do: in host memory, if the CPU backend's kernels have vectors. It is
// faster there than flash attention at every length, and the only one of the two with values summed in fp32 throughout; one
// lane at a time it would be several times slower.
bool indexmem_device_attends(const ggml_tensor * k);
