#pragma once

#include "indexmem-state.h"

#include "ggml-cpp.h"

#include <map>
#include <vector>

struct llama_context;

//
// A copy of a sequence in memory, to come back to
//
// It is what a state holds (indexmem-state.h), each piece in memory of the kind that it came from: what lies on a device is copied
// there, as long as the device has room, and does not pass through the host. The rest lies in the host's memory.
//
// Invariants
//   - put back where it came from it has no check: nobody else has written it. Anywhere else it is read as any state is
//   - memory is kept for the next copy, and only replaced by more
//   - of a device's memory some is left for what computes there: what does not get any ends the process
//
struct indexmem_copy {
    // bytes that a copy of the sequence takes
    static uint64_t size(llama_context & ctx, llama_seq_id seq_id);

    // these throw; of what take() throws there is no copy, and what put() throws leaves the sequence as it was, or broken
    void take(llama_context & ctx, llama_seq_id seq_id);
    void put (llama_context & ctx, llama_seq_id seq_id) const;

    uint64_t n_bytes(bool on_device) const;

    // as llama_state_seq_get_data() would have given it, of so many bytes; 0: there is no copy
    uint64_t state_size() const;
    void     state(uint8_t * dst) const;

private:
    // a tensor of bytes that takes a buffer up
    struct block {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor           * tensor;
    };

    // memory of one kind
    struct store {
        std::vector<block> blocks;

        uint64_t n_bytes() const;
    };

    // numbers of a state that come before so many bytes of its pieces
    struct section {
        std::vector<uint8_t> head;
        uint64_t             n_bytes;
    };

    // what a state consists of
    struct content {
        std::vector<section>              sections;
        std::vector<indexmem_state_piece> pieces;
    };

    class recorder;

    static content content_of(llama_context & ctx, llama_seq_id seq_id);

    // a place for each piece, or for parts of it, in order
    std::vector<indexmem_state_piece> find_places(const std::vector<indexmem_state_piece> & pieces);

    uint64_t owner = 0; // id of the cache that it came from, 0: there is no copy

    llama_kv_cache_bounded::seq_state seq;
    llama_pos                         n_window = 0; // positions of a window, if there is one

    std::vector<section>              sections;
    std::vector<indexmem_state_piece> places;

    std::map<ggml_backend_buffer_type_t, store> stores;
};

// Copies the bytes of pieces to others of as many in all. Neighbours on one device stay there, if it is one of the context's.
void indexmem_copy_pieces(llama_context & ctx, const std::vector<indexmem_state_piece> & from, const std::vector<indexmem_state_piece> & to);
