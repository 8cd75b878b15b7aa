// A program that is linked with this multiplies the weights of the buffer type "AMX" with the tiles of tiles.h.

#include "amx/amx.h"
#include "traits.h"

#include <cstring>

static const bool elsewhere = [] {
    auto & types = ggml_backend_cpu_get_extra_buffer_types();
    for (auto & type : types) {
        if (strcmp(ggml_backend_buft_name(type), "AMX") == 0) {
            type = ggml_backend_amx_buffer_type(); // of this program, not of the library
            return true;
        }
    }
    types.insert(types.begin(), ggml_backend_amx_buffer_type());
    return true;
}();
