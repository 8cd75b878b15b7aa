#pragma once

#include "indexmem-state.h"

#include "llama-impl.h"

#include <cstring>
#include <stdexcept>

// numbers and names of a state, each of which is compared with something
class indexmem_state_reader {
public:
    explicit indexmem_state_reader(llama_io_read_i & io) : io(io) {}

    template <typename T>
    T get() {
        T value;
        io.read(&value, sizeof(value));
        return value;
    }

    void expect(uint32_t expected, const char * what, int32_t il = -1) {
        const uint32_t found = get<uint32_t>();
        if (found != expected) {
            const std::string where = il >= 0 ? format(" of layer %d", il) : "";
            throw std::runtime_error(format("bounded KV state: %s%s is %u in the state and %u in this context",
                        what, where.c_str(), found, expected));
        }
    }

    // not read_string(): its length is not to be trusted
    std::string get_name(const char * what) {
        const uint32_t n = get<uint32_t>();
        if (n > N_NAME_MAX) {
            throw std::runtime_error(format("bounded KV state: the name of the %s has %u characters, more than any has", what, n));
        }
        std::string res(n, '\0');
        io.read(&res[0], n);
        for (char & c : res) {
            c = c >= 0x20 && c < 0x7F ? c : '?'; // it may be printed
        }
        return res;
    }

private:
    static constexpr uint32_t N_NAME_MAX = 64;

    llama_io_read_i & io;
};

// what a state of this cache says of it, but for its slices
indexmem_state_origin indexmem_state_origin_of(const llama_kv_cache_bounded & kv);

// whether what a state has of a part goes on in a cache of ours
bool indexmem_state_goes_on(const indexmem_state_origin & o, const indexmem_state_origin & ours, int part);

// of a state, in the order of put_header(). Throws if its keys and values have no meaning in this cache, or if it is damaged
indexmem_state_origin indexmem_state_get_header(indexmem_state_reader & in, const llama_kv_cache_bounded & kv);

// What a sequence of such a state is in this cache, if that has room for it: without what it has no use for. Throws, with the reason, if
// it needs what the state does not have.
llama_kv_cache_bounded::seq_state indexmem_state_adopt(const llama_kv_cache_bounded & kv, const indexmem_state_origin & origin,
        const llama_kv_cache_bounded::seq_state & from);
