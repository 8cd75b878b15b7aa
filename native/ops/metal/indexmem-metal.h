#pragma once

// Metal backend of GGML_OP_INDEXMEM (see indexmem-ops.h): what llama.cpp's Metal backend calls. ATTEND has no kernel here;
// flash attention takes its place.

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_metal_library;
struct ggml_metal_encoder;

// max_memory: bytes that a group of threads may have
bool ggml_indexmem_metal_supports(const struct ggml_tensor * op, size_t max_memory);

// bytes of scratch behind the result
size_t ggml_indexmem_metal_extra(const struct ggml_tensor * op);

void ggml_indexmem_metal_encode(struct ggml_metal_library * lib, struct ggml_metal_encoder * enc, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
