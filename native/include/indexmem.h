// indexmem: a KV cache of a size the user chooses, for llama.cpp
//
// Plain C, no dependency beyond llama.h's opaque types. None of the structs of llama.h change; a bounded cache is
// requested for the next context that the calling thread creates:
//
//     struct indexmem_params p = indexmem_default_params();
//     p.budget = 1024;
//     indexmem_next_context(&p);
//     struct llama_context * ctx = llama_init_from_model(model, cparams);   // flash attention must be on
//     if (!ctx) fputs(indexmem_last_error(), stderr);
//
// Invariants
//   - without a request the original llama.cpp cache is created and its code path is untouched
//   - the number of KV bytes of a bounded context is fixed when it is created
//   - after every ubatch each KV head holds at most `budget` entries. A ubatch counts when it has been computed: one that is
//     aborted has not happened, or, if it was to evict, leaves the sequence broken (indexmem_stats)
//   - protected entries (sinks, pinned prefix, recent window) are never evicted
//   - a state (llama_state_seq_set_data and the like) may come from a context with another budget, window, policy, ...: what it holds
//     beyond the budget is evicted when it is loaded, by the policy of this one. What that needs and a state does not have
//     is a reason to refuse it (indexmem_last_error)
//   - functions taking a context may be called from one thread at a time, like llama_decode; indexmem_set_cancel has a flag
//     that any thread may set

#ifndef INDEXMEM_H
#define INDEXMEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(__MINGW32__) // as in llama.h: MinGW exports everything, unless one function is marked
#    ifdef LLAMA_BUILD
#        define INDEXMEM_API __declspec(dllexport)
#    else
#        define INDEXMEM_API __declspec(dllimport)
#    endif
#else
#    define INDEXMEM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_model;
struct llama_context;
struct indexmem_copy; // of a sequence

#define INDEXMEM_API_VERSION 9

#define INDEXMEM_SPAN_TRAINED UINT32_MAX

#define INDEXMEM_CLASSES_MAX 4

// Values are fixed by the caller before the context exists. All counts are in tokens, per KV head.
struct indexmem_params {
    uint32_t     struct_size; // sizeof(struct indexmem_params), set by indexmem_default_params()
    uint32_t     budget;      // slots kept after every ubatch: sinks, pinned prefix, window and memory included; 0 = unbounded
    uint32_t     sinks;       // first tokens of a sequence that are never evicted (default 4)
    uint32_t     window;      // most recent tokens that are never evicted; 0 (default) = chosen: a quarter of what is not protected of
                              // the budget (where KV heads differ, of their mean, and at most half of the smallest), at least 128
    uint32_t     pin;         // length of the pinned prefix of every sequence (default 0; see indexmem_set_pin)
    uint32_t     evict_step;  // entries evicted at once when the cache is full during decode; 0 = chosen from the budget
    double       budget_ratio; // above 0: keep at most this share of the tokens seen, and never more than the budget
    uint64_t     seed;        // for policies that draw numbers
    const char * policy;      // name out of indexmem_policy_name(), NULL = "indexer" with a sidecar that has one, else "streaming"
    const char * sidecar;     // file with a trained indexer or memory, see docs/sidecar.md; NULL = none
    const char * memory;      // kind out of indexmem_memory_name(), or "off"; NULL = that of the sidecar, without one "off"
    uint32_t     memory_slots; // of a memory that has slots, part of the budget; 0 = as in the sidecar, without one 64
    uint32_t     span;        // rotary positions that are used: before they come up to it, entries get new ones. Default
                              // INDEXMEM_SPAN_TRAINED: as many as the model was trained for, if that can be; 0 = they grow without end
    const char * layer_budgets; // with an indexer, "sidecar": layers, and their KV heads, share what all may keep as its sidecar says, if it does;
                              // "equal": each keeps as much as the others; NULL = "sidecar"
};

// Counts of one sequence.
struct indexmem_stats {
    uint32_t struct_size;    // sizeof(struct indexmem_stats), set by the caller
    uint32_t budget;         // where KV heads differ, this one, budget_now, n_slots, n_kept and n_evicted are means over them, rounded up
    uint32_t n_slots;        // slots for entries per KV head: the budget plus one ubatch of working room, padded
    uint32_t budget_now;     // the budget at this length: smaller than `budget` only with a budget_ratio
    uint32_t n_kept;         // entries held now, per KV head
    uint64_t n_seen;         // tokens evaluated so far (the logical length)
    uint64_t n_evicted;      // entries evicted so far, per KV head: n_seen - n_kept
    uint32_t sinks;
    uint32_t window;         // of this sequence
    uint32_t pin;            // of this sequence
    uint32_t evict_step;
    uint64_t kv_bytes;       // K and V of the whole context, all layers and sequences: fixed at creation
    uint64_t meta_bytes;     // positions, state of policy, indexer and memory, likewise fixed
    uint64_t indexer_bytes;  // the part of meta_bytes that the indexer keeps
    uint64_t memory_bytes;   // the part of meta_bytes that the latent memory keeps
    uint64_t sidecar_bytes;  // weights of the sidecar in memory
    uint64_t sidecar_hash;   // identity of the sidecar, 0 = none
    int64_t  evict_us;       // wall time spent in ranking, selection and compaction on the CPU since creation
    uint64_t n_evictions;    // ubatches that evicted from this sequence
    uint32_t memory_slots;   // slots of the latent memory, of the budget; 0 without one or if its kind has none
    uint32_t memory_layers;  // layers that have a latent memory
    char     memory[16];     // kind of the latent memory, or "off"
    uint32_t broken;         // 1: evaluating the sequence was interrupted while entries moved. Nothing but clearing it, copying
                             // another one over it, or loading a state goes on from there
    uint64_t compute_bytes;  // compute buffers of the context, of all its graphs: what a ubatch takes, whatever the length
    uint64_t work_bytes;     // of the CPU, what an op of the cache takes at most; taken at the first eviction, if not before
    uint64_t n_rebases;      // times that the entries of the sequence got new rotary positions
    uint64_t next_position;  // rotary position of the next token; n_seen until the first of these
    int64_t  rebase_us;      // wall time spent in these since creation, of all sequences
    uint32_t span;           // in force; 0 = positions grow without end (indexmem_span_reason)
    uint64_t window_bytes;    // caches of layers that look at a window, of the whole context: as large as the window and a ubatch
    uint64_t recurrent_bytes; // states of recurrent layers, likewise
    uint32_t room;            // entries that can come before any leaves, in all layers, at this length
    uint32_t n_classes;       // classes of KV heads: those of one have the same budget; at most INDEXMEM_CLASSES_MAX
    uint32_t class_budget[INDEXMEM_CLASSES_MAX]; // of each class, ascending
    uint32_t class_heads [INDEXMEM_CLASSES_MAX]; // how many KV heads it has, of all bounded layers
    uint32_t class_kept  [INDEXMEM_CLASSES_MAX]; // entries that the sequence holds there now
    uint32_t n_first;         // first tokens that stay in every KV head: sinks and pin, of which small heads may keep only the beginning
};

// what a layer keeps of the past
enum indexmem_layer {
    INDEXMEM_LAYER_BOUNDED   = 1, // the entries that a budget bounds
    INDEXMEM_LAYER_WINDOW    = 2, // those of a window
    INDEXMEM_LAYER_RECURRENT = 4, // a state of fixed size
    INDEXMEM_LAYER_READS     = 8, // nothing: it reads the entries of another layer
};

INDEXMEM_API int          indexmem_api_version(void);
INDEXMEM_API const char * indexmem_build_info (void); // "llama.cpp <commit>; ..." for humans

// The CPU backend in use, loaded if it was not: the variant that was chosen for this CPU ("haswell", ...; INDEXMEM_CPU_VARIANT
// names another), or how the only one of this build was compiled: "native", for the CPU that built it, or "generic".
// NULL with an error if there is none, or another than INDEXMEM_CPU_VARIANT asks for.
INDEXMEM_API const char * indexmem_cpu_variant(void);

INDEXMEM_API struct indexmem_params indexmem_default_params(void);

// Asks that the next context created by this thread be bounded; NULL withdraws. The request is used up by one creation, whether
// that succeeds or not; a context of a model loaded with no_alloc (a dry run) is made as if bounded and leaves it standing.
// Returns false, with an error, when a field is out of range by itself (what depends on the model is checked when the context
// is created).
INDEXMEM_API bool indexmem_next_context(const struct indexmem_params * params);

// Text of the last failure on this thread, "" if none. A bounded context that was asked for and not created is one, whoever
// refused it. Valid until the next indexmem or llama call on the thread.
INDEXMEM_API const char * indexmem_last_error(void);

// What the last failure was about.
enum indexmem_error {
    INDEXMEM_ERROR_NONE    = 0,
    INDEXMEM_ERROR_PARAMS  = 1, // parameters, of the cache or of the context
    INDEXMEM_ERROR_MODEL   = 2, // the model cannot have a bounded cache
    INDEXMEM_ERROR_SIDECAR = 3, // the sidecar is damaged, or for another model
    INDEXMEM_ERROR_CONTEXT = 4, // llama.cpp could not create the context, for a reason that is not the cache's
};
INDEXMEM_API enum indexmem_error indexmem_last_error_kind(void);

// Whether a file is a sidecar and whole; with a model, also whether it is for that model. Reads everything, keeps nothing.
INDEXMEM_API bool indexmem_sidecar_check(const char * path, const struct llama_model * model);

// Fingerprint of a model as sidecars record it (docs/sidecar.md): 16 hexadecimal digits and a terminating zero.
INDEXMEM_API void indexmem_model_fingerprint(const struct llama_model * model, char out[17]);

// The table of indexer kinds.
INDEXMEM_API int          indexmem_indexer_count(void);
INDEXMEM_API const char * indexmem_indexer_name (int i); // NULL out of range
INDEXMEM_API const char * indexmem_indexer_help (int i); // one line

// The table of kinds of latent memory.
INDEXMEM_API int          indexmem_memory_count(void);
INDEXMEM_API const char * indexmem_memory_name (int i); // NULL out of range
INDEXMEM_API const char * indexmem_memory_help (int i); // one line

// Whether a bounded cache can be made for the model; if not, the reason is written to `reason` (may be NULL).
INDEXMEM_API bool indexmem_model_supported(const struct llama_model * model, char * reason, size_t reason_size);

// What layer `il` of a supported model keeps: flags of enum indexmem_layer, 0 for one without attention or state, -1 out of range.
INDEXMEM_API int32_t indexmem_model_layer(const struct llama_model * model, int32_t il);

// Numbers that a token leaves in the keys of layer `il`, or in its values; 0 if the layer has no cache of its own.
INDEXMEM_API uint32_t indexmem_model_row(const struct llama_model * model, int32_t il, bool values);

// The i-th architecture that the library knows, as files name it; NULL out of range.
INDEXMEM_API const char * indexmem_architecture(int i);

// Why none of its models can have a bounded cache; "" if that depends on the model.
INDEXMEM_API const char * indexmem_architecture_refused(int i);

// Whether the i-th device of ggml (ggml_backend_dev_get) has kernels for bounded caches of the usual kind, f16 and heads of 128, with
// all policies and memories.
INDEXMEM_API bool indexmem_device_supported(size_t i);

// Whether it can hold those with this policy, with kernels of ours or with ops of ggml alone. If not, the caches of the layers it
// computes lie in host memory.
INDEXMEM_API bool indexmem_device_supported_policy(size_t i, int32_t policy);

INDEXMEM_API bool indexmem_is_bounded(const struct llama_context * ctx);

// Bytes of what the context keeps of the past, bounded or llama.cpp's own.
INDEXMEM_API uint64_t indexmem_cache_bytes(const struct llama_context * ctx);

// Bytes of the weights of its model, in all forms that they are kept in.
INDEXMEM_API uint64_t indexmem_model_bytes(const struct llama_context * ctx);

// Bytes of its compute buffers, bounded or not: those that were reserved, and those of the graphs that are kept. Each kind of kept
// graph gets its own when it first occurs. Of a model loaded with no_alloc, of all three, what would be taken.
INDEXMEM_API uint64_t indexmem_compute_bytes(const struct llama_context * ctx);

INDEXMEM_API bool indexmem_get_stats(struct llama_context * ctx, int32_t seq_id, struct indexmem_stats * stats);

// Positions held by one KV head of one layer, in slot order (not sorted). Returns the number of entries, or -1.
// `pos` may be NULL to ask for the number alone.
INDEXMEM_API int32_t indexmem_get_positions(struct llama_context * ctx, int32_t seq_id, int32_t il, int32_t head,
                                            int32_t * pos, int32_t capacity);

// The same for the rotary positions of these entries, by which their keys are rotated.
INDEXMEM_API int32_t indexmem_get_rotary(struct llama_context * ctx, int32_t seq_id, int32_t il, int32_t head,
                                         int32_t * pos, int32_t capacity);

// Why no span is in force although the trained length was to be kept; "" if one is, or if none was wanted. Valid as long as the
// context.
INDEXMEM_API const char * indexmem_span_reason(const struct llama_context * ctx);

// KV heads of layer `il` (0: the layer has no cache of its own), or -1 out of range.
INDEXMEM_API int32_t indexmem_n_head_kv(const struct llama_context * ctx, int32_t il);

// Pins the first `n` tokens of a sequence. Fails once something has been evicted and `n` exceeds the current pin,
// and when pin and window leave no room in the budget.
INDEXMEM_API bool indexmem_set_pin(struct llama_context * ctx, int32_t seq_id, uint32_t n);

// The longest prefix that the budget has room to pin; 0 without a budget. KV heads that have less room keep its beginning.
INDEXMEM_API uint32_t indexmem_pin_room(const struct llama_context * ctx);

// Of `n` guessed tokens (drafts) that a batch is to have behind the next token of a sequence, how many it may have, so that those
// which turn out to be wrong can be taken out again (llama_memory_seq_rm), and then nothing is left of them: the cache is the one
// that has never seen them. For that, nothing in the batch evicts, renews positions or is scored by the indexer, and all of it is
// within what layers with a window or a recurrent state can go back. 0: evaluate the next token alone. Contexts without a
// budget: `n`. (With an indexer another sequence of the batch that evicts, or has a prompt read, has all of them scored: ranks of the
// drafts that were right then follow from another product, to the last bits.)
INDEXMEM_API uint32_t indexmem_draft_room(const struct llama_context * ctx, int32_t seq_id, uint32_t n);

// The same for a program that puts back a copy of a recurrent state, and evaluates again what was right: then how far that state can
// go back does not count.
INDEXMEM_API uint32_t indexmem_draft_room_copied(const struct llama_context * ctx, int32_t seq_id, uint32_t n);

// States that are loaded from now on bring the pinned prefix that they were saved with (n < 0, the default), or get one of n tokens,
// of a sequence that has evicted as far as all of it is still there.
INDEXMEM_API bool indexmem_set_load_pin(struct llama_context * ctx, int32_t n);

// Copies of a sequence, to come back to: any number, each with memory that it keeps for the next one taken into it. What lies on a
// device is copied there without passing through the host, as far as the device has room, and the rest to the host's memory. Only
// slots in use are copied. A copy may outlive its context.
INDEXMEM_API struct indexmem_copy * indexmem_copy_new (void);
INDEXMEM_API void                   indexmem_copy_free(struct indexmem_copy * copy);

// Bytes that a copy of the sequence takes; 0, with an error, if there can be none: of a broken one, or without a bounded cache.
INDEXMEM_API uint64_t indexmem_copy_size(struct llama_context * ctx, int32_t seq_id);

// False with an error: nothing is copied then, and there is no copy any more.
INDEXMEM_API bool indexmem_copy_take(struct indexmem_copy * copy, struct llama_context * ctx, int32_t seq_id);

// Makes a sequence what the copied one was. In the context that it came from nothing is checked; any other takes it up as it does a
// state, or refuses it with an error.
INDEXMEM_API bool indexmem_copy_put(const struct indexmem_copy * copy, struct llama_context * ctx, int32_t seq_id);

// Bytes that it takes, in memory of devices or in that of the host.
INDEXMEM_API uint64_t indexmem_copy_bytes(const struct indexmem_copy * copy, bool on_device);

// The same as llama_state_seq_get_data() gave at that time: writes it to `dst` (may be NULL), which has room for `size` bytes, and
// returns how many it has; 0 with an error.
INDEXMEM_API uint64_t indexmem_copy_state(const struct indexmem_copy * copy, uint8_t * dst, uint64_t size);

// Computations of the context stop after the node they are at once *flag is not 0, and llama_decode then returns 2, as with
// llama_set_abort_callback, which this calls: the flag is read without a lock, by the thread that computes, so any thread may
// set it. It must outlive the context, or NULL be set before. GPU backends do not look at it within a ubatch.
//
// A ubatch that was stopped does not count (llama_memory_seq_pos_max). If it would have evicted, its sequence
// is broken: nothing can be evaluated or saved until it is cleared or its state restored. So it is if the model has recurrent
// layers, unless the context was created with an abort callback (llama_context_params), whichever that was: then it keeps a
// second state of each sequence to go back to, which takes memory (recurrent_bytes) and no time.
INDEXMEM_API void indexmem_set_cancel(struct llama_context * ctx, const int32_t * flag);

// The table of policies.
INDEXMEM_API int          indexmem_policy_count(void);
INDEXMEM_API const char * indexmem_policy_name (int i); // NULL out of range
INDEXMEM_API const char * indexmem_policy_help (int i); // one line

#ifdef __cplusplus
}
#endif

#endif // INDEXMEM_H
