// States of the bounded cache: what is written and how, and that whatever is refused leaves no trace. What a restored cache
// answers is compared with the original by tests/.

#include "state_attack.h"
#include "test.h"

#include "llama-io.h"
#include "llama-memory.h"

#include <filesystem>
#include <iterator>

static state_contexts & contexts() {
    static state_contexts res("");
    return res;
}

static const std::string FILE_PATH = "test-state.bin";

static std::string write_file(const bytes & content) {
    std::ofstream(FILE_PATH, std::ios::binary).write((const char *) content.data(), (std::streamsize) content.size());
    return FILE_PATH;
}

static bytes read_file(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    return bytes(std::istreambuf_iterator<char>(file), {});
}

// something evicted in sequence 0, rebased if there is a span, and tokens that wait to be scored; nothing evicted in 1; nothing at all in 2
static llama_context * filled(int kind) {
    llama_context * ctx = contexts().get(kind);
    llama_memory_clear(llama_get_memory(ctx), true);
    CHECK(decode(ctx, 0, 30) && decode(ctx, 0, 1) && decode(ctx, 0, 2) && decode(ctx, 1, 7));
    contexts().take_log();
    return ctx;
}

// what differs between states of equal sequences is their id, twice
static bool equal_but_id(const bytes & a, const bytes & b) {
    if (a.size() != b.size()) {
        return false;
    }
    size_t n = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        n += a[i] != b[i];
    }
    return n <= 2;
}

//
// writing
//

struct counting_writer : llama_io_write_i {
    size_t n_data = 0, n_tensor = 0;
    std::vector<uint32_t> streams; // that K is read from

    void write(const void *, size_t size) override { n_data += size; }

    void write_tensor(ggml_tensor * t, size_t offset, size_t size) override {
        n_tensor += size;
        CHECK(offset + size <= ggml_nbytes(t));
        if (std::string(t->name).find("bounded_k") == 0) {
            streams.push_back((uint32_t) (offset/t->nb[3]));
        }
    }

    size_t n_bytes() override { return n_data + n_tensor; }
};

TEST(counting_reads_no_tensor) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        llama_memory_t  mem = llama_get_memory(ctx);

        counting_writer whole;
        mem->state_write(whole, -1);
        CHECK(whole.n_data < 700 && whole.n_tensor > 1000);
        CHECK(save(ctx, -1).size() > whole.n_bytes()); // the architecture is beside it

        counting_writer one;
        mem->state_write(one, 0);
        CHECK(one.n_data < 700 && one.n_bytes() + 8 == save(ctx, 0).size());
    }
}

TEST(copies_that_wait_are_saved_from_their_source) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        llama_memory_t  mem = llama_get_memory(ctx);

        const bytes first = save(ctx, 0), second = save(ctx, 1);
        llama_memory_seq_cp(mem, 0, 2, -1, -1);
        llama_memory_seq_cp(mem, 1, 0, -1, -1);
        llama_memory_seq_cp(mem, 2, 1, -1, -1); // of a copy
        for (int i = 0; i < 2; ++i) {
            CHECK(llama_state_seq_get_size(ctx, 2) == first.size());
            CHECK(equal_but_id(save(ctx, 2), first));
            CHECK(equal_but_id(save(ctx, 1), first));
            CHECK(equal_but_id(save(ctx, 0), second));
        }
        const auto streams_of = [&](llama_seq_id seq) {
            counting_writer io;
            mem->state_write(io, seq);
            std::sort(io.streams.begin(), io.streams.end());
            io.streams.erase(std::unique(io.streams.begin(), io.streams.end()), io.streams.end());
            return io.streams;
        };
        CHECK(streams_of(2) == std::vector<uint32_t>{ 0 }); // saving has copied nothing
        CHECK(streams_of(1) == std::vector<uint32_t>{ 0 });
        CHECK(streams_of(0) == std::vector<uint32_t>{ 1 });

        // the source is forgotten, and what it remembered is to be cleared
        llama_memory_seq_rm(mem, 0, -1, -1);
        llama_memory_seq_rm(mem, 1, -1, -1);
        CHECK(equal_but_id(save(ctx, 2), first));

        // a state takes the place of what a copy that waits is made from
        CHECK(load(ctx, 0, second));
        CHECK(streams_of(2) == std::vector<uint32_t>{ 2 });
        CHECK(equal_but_id(save(ctx, 2), first) && save(ctx, 0).size() == second.size());
        CHECK(decode(ctx, 2, 1) && decode(ctx, 0, 1));
    }
}

TEST(flags_change_nothing) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        const bytes state = save(ctx, 0);
        for (llama_state_seq_flags flags : { LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE, 3 }) {
            bytes other(llama_state_seq_get_size_ext(ctx, 0, flags));
            CHECK(llama_state_seq_get_data_ext(ctx, other.data(), other.size(), 0, flags) == other.size());
            CHECK(other == state);
            CHECK(decode(ctx, 0, 3));
            CHECK(llama_state_seq_set_data_ext(ctx, other.data(), other.size(), 0, flags) == other.size());
            CHECK(save(ctx, 0) == state);
        }
        // of too few bytes
        bytes small(state.size() - 1);
        CHECK(llama_state_seq_get_data(ctx, small.data(), small.size(), 0) == 0);
        CHECK(llama_state_seq_get_size(ctx, 3) == 0 || !load(ctx, 3, state));
    }
}

//
// refused without a trace
//

TEST(truncated_everywhere) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        const llama_token none = 0;
        for (llama_seq_id seq : { -1, 0 }) {
            const bytes state = save(ctx, seq);
            const bytes file  = file_of(seq, state.data(), state.size());
            seq == -1 ? (void) llama_state_save_file    (ctx, FILE_PATH.c_str(), &none, 0)
                      : (void) llama_state_seq_save_file(ctx, FILE_PATH.c_str(), seq, &none, 0);
            CHECK(read_file(FILE_PATH) == file);

            // another cache than the one that was saved
            CHECK(decode(ctx, 0, 3) && decode(ctx, 2, 25));
            const bytes before = save(ctx, -1);
            for (size_t n = 0; n < state.size(); n += n < 300 || n > state.size() - 9 ? 1 : 7) {
                CHECK(!load(ctx, seq, state.data(), n));
            }
            CHECK(save(ctx, -1) == before);
            for (size_t n = 0; n < file.size(); n += n < 200 || n > file.size() - 9 ? 3 : 61) {
                CHECK(!load_file(ctx, seq, write_file({ file.begin(), file.begin() + (std::ptrdiff_t) n })));
            }
            CHECK(save(ctx, -1) == before);

            // and with something behind it, which a buffer may have
            bytes longer = file;
            longer.push_back(0);
            contexts().take_log();
            CHECK(!load_file(ctx, seq, write_file(longer)));
            CHECK_MSG(contexts().take_log().find("behind") != std::string::npos, "another reason");
            CHECK(save(ctx, -1) == before);
            longer = state;
            longer.push_back(0);
            CHECK(load(ctx, seq, longer) && save(ctx, seq) == state);

            CHECK(load(ctx, -1, before));
            CHECK_MSG(load_file(ctx, seq, write_file(file)), "%s", contexts().take_log().c_str());
            CHECK(save(ctx, seq) == state);
        }
        remove(FILE_PATH.c_str());
    }
}

// where the parts of the state of a sequence begin, of a model whose layers are of one kind
struct parts {
    size_t head, table, rows;

    parts(llama_context * ctx, const bytes & state) {
        counting_writer empty; // the header, the number of sequences and the head of one
        llama_get_memory(ctx)->state_write(empty, 2);
        table = 8 + empty.n_data;
        head  = table - 56;
        rows  = table + (rebased(state) ? 2 : 1)*4*sizeof(int32_t)*number(state, 3); // 2 layers with 2 heads
    }

    bool rebased(const bytes & state) const { return number(state, 10) > 0; }

    // i: as in put_head()
    uint32_t number(const bytes & state, size_t i) const {
        uint32_t res;
        memcpy(&res, state.data() + head + i*sizeof(res), sizeof(res));
        return res;
    }
};

TEST(numbers_that_lie) {
    for (int kind = 0; kind < N_PLAIN_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        const bytes state  = save(ctx, 0);
        const bytes before = save(ctx, -1);

        const size_t n_header = parts(ctx, state).table;
        const size_t n_before = parts(ctx, state).head;

        for (size_t at = 0; at + 4 <= n_header; ++at) {
            for (uint32_t value : { 2u, 1000u, 1u << 20, 30000000u, 200000000u, (uint32_t) INT32_MAX, 1u << 31, UINT32_MAX }) {
                bytes lie = state;
                memcpy(lie.data() + at, &value, sizeof(value));
                if (lie == state) {
                    continue;
                }
                contexts().take_log();
                if (load(ctx, 0, lie)) { // a number that may be this one, too
                    check_sequence(ctx, 0);
                    CHECK(decode(ctx, 0, 9) || lacks_queries(contexts().take_log()));
                    CHECK(load(ctx, -1, before));
                    // which sidecar it was does not matter to the memory that has no weights
                    const bool sidecar = kind == 2 && at >= 43 && at < 51;
                    CHECK_MSG(value <= 1000 || at < 8 || at % 4 != n_header % 4 || at == n_before || sidecar, "%u at %zu", value, at);
                } else {
                    CHECK(!contexts().take_log().empty());
                }
            }
        }
        CHECK(save(ctx, -1) == before);
    }
}

// accepted, whatever they hold: no step after that may fail
TEST(rows_of_any_bytes) {
    for (int kind = 0; kind < N_PLAIN_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        const bytes state = save(ctx, 0);
        const parts at(ctx, state);
        for (int value : { 0x00, 0x7C, 0x7F, 0x80, 0xFC, 0xFF }) { // zeros, infinite, not a number
            bytes other = state;
            std::fill(other.begin() + (std::ptrdiff_t) at.rows, other.end(), (uint8_t) value);
            CHECK(load(ctx, 0, other) && save(ctx, 0) == other);
            for (int n : { 1, 9, 25, 1, 1 }) {
                CHECK(decode(ctx, 0, n));
                check_sequence(ctx, 0);
            }
        }
    }
}

TEST(far_ahead) {
    for (int kind = 0; kind < N_PLAIN_KINDS; ++kind) {
        llama_context * ctx = filled(kind);
        const bytes state = save(ctx, 0);
        const parts at(ctx, state);
        const uint32_t n_seen = at.number(state, 1);
        for (uint32_t n_ahead : { 100000u, 1u << 30, (1u << 30) + 1, (uint32_t) INT32_MAX }) {
            bytes other = state;
            other.resize(other.size() + (1 << 16)); // with that many tokens rings of queries are full
            const auto move = [&](size_t offset, uint32_t from) {
                uint32_t x;
                memcpy(&x, other.data() + offset, sizeof(x));
                x += x >= from ? n_ahead - n_seen : 0;
                memcpy(other.data() + offset, &x, sizeof(x));
            };
            move(at.head + 4,  1); // n_seen
            move(at.head + 20, 1); // n_scored
            const size_t n_table = 2*sizeof(int32_t)*at.number(state, 3); // of a layer
            for (size_t i = at.table; i < at.rows; i += 4) {
                if (!at.rebased(state) || (i - at.table)/n_table % 2 == 0) { // not the rotary positions
                    move(i, n_seen - STATE_WINDOW);
                }
            }
            if (at.rebased(state)) {
                move(at.head + 36, 0); // the shift
            }
            if (n_ahead > 1u << 30) {
                CHECK(!load(ctx, 0, other));
                continue;
            }
            contexts().take_log();
            CHECK_MSG(load(ctx, 0, other), "%s", contexts().take_log().c_str());
            for (int n : { 1, 9, 25, 1 }) {
                CHECK(decode(ctx, 0, n));
                check_sequence(ctx, 0);
            }
        }
    }
}

// a state of another kind, or with more than the budget, is taken up or refused with a reason, and what was taken up goes on
TEST(states_of_other_caches) {
    int n_accepted = 0;
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        for (int other = 0; other < N_STATE_KINDS; ++other) {
            for (bool large : { false, true }) {
                llama_context * from = large ? contexts().get_large(other) : filled(other);
                llama_memory_clear(llama_get_memory(from), true);
                for (int n : { 7, 22, 23, 9, 1, 1 }) {
                    CHECK(decode(from, 0, n));
                    const bytes state = save(from, 0);

                    llama_context * ctx = filled(kind);
                    const bytes before = save(ctx, -1);
                    contexts().take_log();
                    if (load(ctx, 0, state)) {
                        n_accepted++;
                        check_counts(ctx, 0);
                        CHECK(load(ctx, 2, save(ctx, 0)) && equal_but_id(save(ctx, 2), save(ctx, 0)));
                        CHECK(decode(ctx, 0, 1) && decode(ctx, 0, 20));
                        check_counts(ctx, 0);
                    } else {
                        const std::string log = contexts().take_log();
                        CHECK_MSG(log.find("KV state: ") != std::string::npos, "%s", log.c_str());
                        CHECK(indexmem_last_error() != std::string() && log.find(indexmem_last_error()) != std::string::npos);
                        CHECK(save(ctx, -1) == before);
                    }
                    if (kind == other) {
                        CHECK(load(from, 0, state) && save(from, 0) == state);
                    }
                }
            }
        }
    }
    CHECK(n_accepted > 60);
}

// ranked, remembered and moved when they are read
TEST(rows_of_any_bytes_that_do_not_fit) {
    for (int kind = 0; kind < N_PLAIN_KINDS; ++kind) {
        llama_context * from = contexts().get_large(kind);
        llama_memory_clear(llama_get_memory(from), true);
        CHECK(decode(from, 0, 32) && decode(from, 0, 30));
        const bytes state = save(from, 0);
        const size_t rows = parts(from, state).rows;
        for (int value : { 0x00, 0x7C, 0x7F, 0x80, 0xFC, 0xFF }) {
            bytes other = state;
            std::fill(other.begin() + (std::ptrdiff_t) rows, other.end(), (uint8_t) value);
            llama_context * ctx = filled(kind);
            CHECK_MSG(load(ctx, 0, other), "%s", contexts().take_log().c_str());
            for (int n : { 1, 9, 25, 1 }) {
                check_sequence(ctx, 0);
                CHECK(decode(ctx, 0, n));
            }
        }
    }
}

// sizes of parts that are skipped are the state's own word
TEST(sizes_that_lie_are_not_allocated) {
    llama_context * from = filled(3); // of an indexer
    const bytes state = save(from, 0);
    llama_context * ctx = filled(0);
    const bytes before = save(ctx, -1);
    const size_t at_layers = parts(from, state).head - 4 - 2*12*4;
    for (int layer = 0; layer < 2; ++layer) {
        for (int part = 0; part < 6; ++part) {
            for (uint32_t value : { 0u, 1u, 1u << 20, 1u << 30, UINT32_MAX }) {
                bytes lie = state;
                memcpy(lie.data() + at_layers + layer*48 + 24 + part*4, &value, sizeof(value));
                if (lie != state && load(ctx, 0, lie)) {
                    check_counts(ctx, 0); // what is skipped may be less
                    CHECK(decode(ctx, 0, 9) && load(ctx, -1, before));
                }
                CHECK(save(ctx, -1) == before);
            }
        }
    }
}

TEST(corpus_of_the_fuzzer) {
    state_attack attack("", write_file);
    size_t n = 0, n_accepted = 0;
    for (const auto & entry : std::filesystem::directory_iterator(INDEXMEM_CORPUS)) {
        const bytes input = read_file(entry.path().string());
        try {
            n_accepted += attack.run(input.data(), input.size());
        } catch (const std::exception & err) {
            CHECK_MSG(false, "%s: %s", entry.path().string().c_str(), err.what());
        }
        n++;
    }
    CHECK(n > 50 && n_accepted > 10);
    for (const auto & seed : attack.seeds()) {
        CHECK_MSG(attack.run(seed.data(), seed.size()), "%02x: %s", seed[0], indexmem_last_error());
    }
    remove(FILE_PATH.c_str());
}
