#pragma once

// Bytes of all sorts as states, for the fuzz target and for the test that replays its corpus.

#include "state_contexts.h"

#include <functional>
#include <memory>

// The first byte of an input chooses what it is loaded into, and how. The rest is the state.
enum : uint8_t {
    ATTACK_KIND   = 0x07, // index into STATE_KINDS, modulo their number
    ATTACK_PADDED = 0x08, // as many zeros follow as any state needs: inputs are short then
    ATTACK_WHOLE  = 0x10, // the state of the context, not of a sequence
    ATTACK_FILE   = 0x20, // out of a file
};

class state_attack {
public:
    // write_file(bytes) -> path
    state_attack(const std::string & folder, std::function<std::string(const bytes &)> write_file) :
        contexts(folder), write_file(std::move(write_file)) {
        for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
            base.push_back(make_base(contexts.get(kind)));
        }
    }

    // Whether the state is accepted. Throws when something does not hold that has to.
    bool run(const uint8_t * data, size_t size) {
        const uint8_t how = size > 0 ? *data : 0;

        bytes state(data + std::min<size_t>(size, 1), data + size);
        if ((how & ATTACK_PADDED) && !(how & ATTACK_FILE)) {
            state.resize(std::max(state.size(), N_PADDED));
        }
        const int          kind = (how & ATTACK_KIND) % N_STATE_KINDS;
        const llama_seq_id seq  = how & ATTACK_WHOLE ? -1 : 1;

        llama_context * ctx = contexts.get(kind);
        require(load(ctx, -1, base[kind]), "a state of this context is refused");

        contexts.take_log();
        const bool accepted = how & ATTACK_FILE ? load_file(ctx, seq, write_file(file_of(seq, state.data(), state.size())))
                                                : load(ctx, seq, state);
        if (!accepted) {
            require(save(ctx, -1) == base[kind], "a state that is refused changes the cache");
            check_log();
            return false;
        }
        go_on(ctx);
        return true;
    }

    // inputs that are accepted, of every kind
    std::vector<bytes> seeds() {
        std::vector<bytes> res;
        const auto add = [&](bytes state, int how) {
            state.insert(state.begin(), (uint8_t) how);
            res.push_back(std::move(state));
        };
        for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
            llama_context * ctx = contexts.get(kind);
            for (int n : { 0, 3, 9, 33 }) {
                require(load(ctx, -1, base[kind]), "a state of this context is refused");
                llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1);
                if (n > 0) {
                    require(decode(ctx, 0, std::min(n, 30)), "no decode");
                    require(n <= 30 || decode(ctx, 0, n - 30), "no decode");
                }
                for (int how : { 0, (int) ATTACK_PADDED, (int) ATTACK_WHOLE, (int) ATTACK_FILE }) {
                    bytes state = save(ctx, how & ATTACK_WHOLE ? -1 : 0);
                    if (how & ATTACK_PADDED) {
                        if (kind >= N_PLAIN_KINDS) {
                            continue; // numbers of the other layers come after the rows of the first
                        }
                        state.resize(std::min<size_t>(state.size(), 1024)); // header and positions
                    }
                    add(std::move(state), how | kind);
                }
            }
            // more than the budget has room for, of one sequence and of two
            llama_context * large = contexts.get_large(kind);
            llama_memory_clear(llama_get_memory(large), true);
            require(decode(large, 0, 32) && decode(large, 0, 30) && decode(large, 2, 27), "no decode");
            for (int how : { 0, (int) ATTACK_WHOLE, (int) ATTACK_FILE }) {
                add(save(large, how & ATTACK_WHOLE ? -1 : 0), how | kind);
            }
            // of caches with other policies, indexers and memories
            for (int other = 0; other < N_PLAIN_KINDS && kind < N_PLAIN_KINDS; ++other) {
                for (llama_context * from : { contexts.get(other), contexts.get_large(other) }) {
                    llama_memory_clear(llama_get_memory(from), true);
                    for (int n : { 9, 24 }) {
                        require(decode(from, 0, n), "no decode");
                        const bytes state = save(from, 0);
                        if (kind != other && load(contexts.get(kind), 1, state)) {
                            add(state, kind);
                        }
                    }
                }
            }
        }
        return res;
    }

private:
    static constexpr size_t N_PADDED = 1 << 16;

    static void require(bool ok, const std::string & what) {
        if (!ok) {
            throw std::runtime_error(what);
        }
    }

    // something evicted in one sequence, nothing yet in another
    static bytes make_base(llama_context * ctx) {
        require(decode(ctx, 0, 30) && decode(ctx, 0, 1) && decode(ctx, 1, 7), "no decode");
        return save(ctx, -1);
    }

    // the next steps of a program that has loaded the state
    void go_on(llama_context * ctx) {
        llama_memory_t mem = llama_get_memory(ctx);

        for (llama_seq_id s = 0; s < (llama_seq_id) STATE_N_SEQ; ++s) {
            check_counts(ctx, s);
            const bytes again = save(ctx, s);
            require(load(ctx, s, again) && save(ctx, s) == again, "a state that was accepted is not the same again");
            require(indexmem_copy_take(copy.get(), ctx, s) && indexmem_copy_put(copy.get(), ctx, s) && save(ctx, s) == again,
                    "a copy of a state that was accepted is not the same");
        }
        const auto goes_on = [&](llama_seq_id seq, int n) { return decode(ctx, seq, n) || lacks_queries(contexts.take_log()); };
        require(goes_on(0, 1) && goes_on(1, 1), "no token after a state that was accepted");
        llama_memory_seq_rm(mem, 1, n_seen(ctx, 1) - 1, -1);
        require(goes_on(1, 25), "no text after a state that was accepted");
        llama_memory_seq_cp(mem, 1, 0, -1, -1);
        const bytes copied = save(ctx, 0);
        require(goes_on(0, 9), "no text after a copy");
        for (llama_seq_id s = 0; s < (llama_seq_id) STATE_N_SEQ; ++s) {
            check_counts(ctx, s);
        }
        require(load(ctx, 1, copied), "a copy is refused");
    }

    // there is a reason, and one of ours is a printable line
    void check_log() {
        const std::string text = contexts.take_log();
        require(!text.empty(), "refused without a reason");
        if (text.find("bounded KV state: ") != std::string::npos) {
            require(text.size() < 1000 && text.find('\n') == text.size() - 1, "an error without an end");
            require(std::all_of(text.begin(), text.end() - 1, [](char c) { return c >= 0x20 && c < 0x7F; }),
                    "an error that cannot be printed");
        }
    }

    state_contexts contexts;

    std::unique_ptr<indexmem_copy, decltype(&indexmem_copy_free)> copy = { indexmem_copy_new(), indexmem_copy_free };

    std::function<std::string(const bytes &)> write_file;

    std::vector<bytes> base; // [kind]
};
