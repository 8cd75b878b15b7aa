#include "indexmem-metadata.h"

#include "indexmem-gguf-check.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>

// what holds for an array and its elements alike
static std::string type_text(const gguf_context * gguf, int64_t id) {
    const gguf_type type = gguf_get_kv_type(gguf, id);
    return type == GGUF_TYPE_ARRAY ?
        format("an array of %s", gguf_type_name(gguf_get_arr_type(gguf, id))) : std::string(gguf_type_name(type));
}

int64_t indexmem_metadata::find(const char * key, gguf_type type) const {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0) {
        throw indexmem_sidecar_error(format("key '%s' is missing: convert it again with indexmem-convert", key));
    }
    if (gguf_get_kv_type(gguf, id) != type) {
        throw indexmem_sidecar_error(format("key '%s' is %s, expected %s: convert it again with indexmem-convert", key,
                    type_text(gguf, id).c_str(), type == GGUF_TYPE_ARRAY ? "an array" : gguf_type_name(type)));
    }
    return id;
}

int64_t indexmem_metadata::find_array(const char * key, gguf_type type, size_t n) const {
    const int64_t id = find(key, GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(gguf, id) != type) {
        throw indexmem_sidecar_error(format("key '%s' is %s, expected an array of %s: convert it again with indexmem-convert", key,
                    type_text(gguf, id).c_str(), gguf_type_name(type)));
    }
    if (gguf_get_arr_n(gguf, id) != n) {
        throw indexmem_sidecar_error(format("key '%s' has %zu values, expected %zu: convert it again with indexmem-convert", key,
                    gguf_get_arr_n(gguf, id), n));
    }
    return id;
}

uint32_t indexmem_metadata::u32(const char * key, uint32_t min, uint32_t max) const {
    const uint32_t res = gguf_get_val_u32(gguf, find(key, GGUF_TYPE_UINT32));
    if (res < min || res > max) {
        throw indexmem_sidecar_error(min == max ?
                format("key '%s' is %u, expected %u", key, res, min) :
                format("key '%s' is %u, expected %u to %u", key, res, min, max));
    }
    return res;
}

float indexmem_metadata::f32(const char * key) const {
    const float res = gguf_get_val_f32(gguf, find(key, GGUF_TYPE_FLOAT32));
    if (!std::isfinite(res)) {
        throw indexmem_sidecar_error(format("key '%s' is %g, expected a finite number", key, res));
    }
    return res;
}

float indexmem_metadata::f32_pos(const char * key) const {
    const float res = f32(key);
    if (res <= 0.0f) {
        throw indexmem_sidecar_error(format("key '%s' is %g, expected a number above 0", key, res));
    }
    return res;
}

bool indexmem_metadata::boolean(const char * key) const {
    return gguf_get_val_bool(gguf, find(key, GGUF_TYPE_BOOL));
}

std::string indexmem_metadata::str(const char * key) const {
    return gguf_get_val_str(gguf, find(key, GGUF_TYPE_STRING));
}

size_t indexmem_metadata::choice(const char * key, const std::vector<const char *> & choices) const {
    const std::string found = str(key);

    std::string known;
    for (size_t i = 0; i < choices.size(); ++i) {
        if (found == choices[i]) {
            return i;
        }
        known += std::string(i ? ", " : "") + choices[i];
    }
    throw indexmem_sidecar_error(format("key '%s' is '%s', and this version of indexmem-edge knows: %s", key,
                indexmem_printable(found).c_str(), known.c_str()));
}

std::vector<float> indexmem_metadata::f32s(const char * key, size_t n) const {
    const int64_t id   = find_array(key, GGUF_TYPE_FLOAT32, n);
    const float * data = (const float *) gguf_get_arr_data(gguf, id);

    const std::vector<float> res(data, data + n);
    for (size_t i = 0; i < n; ++i) {
        if (!std::isfinite(res[i])) {
            throw indexmem_sidecar_error(format("value %zu of key '%s' is %g, expected a finite number", i, key, res[i]));
        }
    }
    return res;
}

std::vector<bool> indexmem_metadata::bools(const char * key, size_t n) const {
    const int64_t  id   = find_array(key, GGUF_TYPE_BOOL, n);
    const int8_t * data = (const int8_t *) gguf_get_arr_data(gguf, id);
    return std::vector<bool>(data, data + n);
}

size_t indexmem_metadata::size(const char * key) const {
    return gguf_get_arr_n(gguf, find(key, GGUF_TYPE_ARRAY));
}

std::vector<uint32_t> indexmem_metadata::counts(const char * key, size_t n, uint32_t end) const {
    const int32_t * data = (const int32_t *) gguf_get_arr_data(gguf, find_array(key, GGUF_TYPE_INT32, n));
    for (size_t i = 0; i < n; ++i) {
        if (data[i] < 0 || data[i] >= (int64_t) end) {
            throw indexmem_sidecar_error(format("value %zu of key '%s' is %d, expected one from 0 to %u", i, key, data[i], end - 1));
        }
    }
    return { data, data + n };
}

std::vector<uint32_t> indexmem_metadata::ascending(const char * key, uint32_t end) const {
    const int64_t id = gguf_find_key(gguf, key);
    const size_t  n  = id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY ? gguf_get_arr_n(gguf, id) : 0;

    const int32_t * data = (const int32_t *) gguf_get_arr_data(gguf, find_array(key, GGUF_TYPE_INT32, std::max<size_t>(n, 1)));
    for (size_t i = 0; i < n; ++i) {
        if (data[i] < (i > 0 ? data[i - 1] + 1 : 0) || data[i] >= (int64_t) end) {
            throw indexmem_sidecar_error(format("value %zu of key '%s' is %d, expected numbers from 0 to %u that ascend", i, key, data[i], end - 1));
        }
    }
    return { data, data + n };
}
