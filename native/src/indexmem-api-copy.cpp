#include "indexmem.h"

#include "indexmem-copy.h"
#include "indexmem-error.h"

#include "llama-context.h"

#include <stdexcept>

// copies of sequences

// what it gives, or, with an error, nothing
template <typename F>
static auto without_throwing(F f) -> decltype(f()) {
    indexmem_clear_error();
    try {
        return f();
    } catch (const std::exception & err) {
        indexmem_error_is(err.what());
        return {};
    }
}

indexmem_copy * indexmem_copy_new(void) {
    return without_throwing([] { return new indexmem_copy; });
}

void indexmem_copy_free(indexmem_copy * copy) {
    delete copy;
}

uint64_t indexmem_copy_size(llama_context * ctx, int32_t seq_id) {
    return without_throwing([&] { return indexmem_copy::size(*ctx, seq_id); });
}

bool indexmem_copy_take(indexmem_copy * copy, llama_context * ctx, int32_t seq_id) {
    return without_throwing([&] {
        copy->take(*ctx, seq_id);
        return true;
    });
}

bool indexmem_copy_put(const indexmem_copy * copy, llama_context * ctx, int32_t seq_id) {
    return without_throwing([&] {
        copy->put(*ctx, seq_id);
        return true;
    });
}

uint64_t indexmem_copy_bytes(const indexmem_copy * copy, bool on_device) {
    return copy->n_bytes(on_device);
}

uint64_t indexmem_copy_state(const indexmem_copy * copy, uint8_t * dst, uint64_t size) {
    return without_throwing([&] {
        const uint64_t n = copy->state_size();
        if (n == 0) {
            throw std::runtime_error("there is no copy");
        }
        if (dst && size < n) {
            throw std::runtime_error("the state of the copy has more bytes than there is room for");
        }
        if (dst) {
            copy->state(dst);
        }
        return n;
    });
}
