// Copies of sequences: what is put back is what was, of every kind of cache, and what lies on a device stays there.

#include "fake_device.h"
#include "state_contexts.h"
#include "test.h"

#include "indexmem-mixed.h"

#include <memory>

static state_contexts & on_host() {
    static state_contexts res("test-copy-");
    return res;
}

// never freed: their model belongs to it
static fake_device & device() {
    static auto & res = *new fake_device([](const ggml_tensor *) { return false; });
    return res;
}

static state_contexts & on_device() {
    static state_contexts res("test-copy-", &device().device);
    return res;
}

// something evicted in sequence 0, rebased if there is a span, and tokens that wait to be scored; nothing evicted in 1
static llama_context * filled(const state_contexts & contexts, int kind) {
    llama_context * ctx = contexts.get(kind);
    llama_memory_clear(llama_get_memory(ctx), true);
    CHECK(decode(ctx, 0, 30) && decode(ctx, 0, 1) && decode(ctx, 0, 2) && decode(ctx, 1, 7));
    return ctx;
}

struct held_copy {
    indexmem_copy * copy = indexmem_copy_new();

    ~held_copy() { indexmem_copy_free(copy); }

    bool take(llama_context * ctx, int32_t seq)       { return indexmem_copy_take(copy, ctx, seq); }
    bool put (llama_context * ctx, int32_t seq) const { return indexmem_copy_put (copy, ctx, seq); }

    uint64_t n_device() const { return indexmem_copy_bytes(copy, true); }
    uint64_t n_host()   const { return indexmem_copy_bytes(copy, false); }

    bytes state() const {
        bytes res(indexmem_copy_state(copy, nullptr, 0));
        CHECK(res.empty() || indexmem_copy_state(copy, res.data(), res.size() - 1) == 0);
        CHECK(indexmem_copy_state(copy, res.data(), res.size()) == res.size());
        return res;
    }
};

// bytes of the tensors that the state of a sequence is made of
static size_t n_tensor(llama_context * ctx, llama_seq_id seq) {
    struct writer : llama_io_write_i {
        size_t n = 0;
        void   write(const void *, size_t) override {}
        void   write_tensor(ggml_tensor *, size_t, size_t size) override { n += size; }
        size_t n_bytes() override { return n; }
    } io;
    llama_get_memory(ctx)->state_write(io, seq);
    return io.n;
}

// the logits after some more tokens
static std::vector<float> go_on(llama_context * ctx, llama_seq_id seq) {
    std::vector<float> res;
    for (int n : { 1, 9, 25, 1 }) {
        CHECK(decode(ctx, seq, n));
        const float * row = llama_get_logits_ith(ctx, -1);
        res.insert(res.end(), row, row + 24);
    }
    return res;
}

static bool equal_but_id(bytes a, bytes b) {
    size_t n = 0;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        n += a[i] != b[i];
    }
    return a.size() == b.size() && n <= 2;
}

// takes sequence 0, goes on, and comes back
static void there_and_back(llama_context * ctx, held_copy & copy) {
    const bytes  before = save(ctx, 0), other = save(ctx, 1);
    const size_t size   = indexmem_copy_size(ctx, 0);
    CHECK_MSG(copy.take(ctx, 0), "%s", indexmem_last_error());
    CHECK(copy.state() == before && size >= before.size());

    const auto logits = go_on(ctx, 0);
    CHECK(save(ctx, 0) != before);
    CHECK_MSG(copy.put(ctx, 0), "%s", indexmem_last_error());
    check_sequence(ctx, 0);
    CHECK(save(ctx, 0) == before && save(ctx, 1) == other);
    CHECK(go_on(ctx, 0) == logits);

    // as often as wanted, and as another sequence
    CHECK(copy.put(ctx, 2) && equal_but_id(save(ctx, 2), before));
    CHECK(go_on(ctx, 2) == logits);
    CHECK(copy.state() == before && save(ctx, 1) == other);
}

TEST(what_is_put_back_is_what_was) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        held_copy copy;
        llama_context * ctx = filled(on_host(), kind);
        const size_t size = indexmem_copy_size(ctx, 0);
        there_and_back(ctx, copy);
        CHECK(copy.n_device() == 0 && copy.n_host() == size);

        // one that has not evicted, over one that has; and none at all
        const bytes first = save(ctx, 1);
        CHECK(copy.take(ctx, 1) && copy.n_host() == size); // its memory is kept
        CHECK(copy.put(ctx, 0) && equal_but_id(save(ctx, 0), first));
        const auto logits = go_on(ctx, 1);
        CHECK(go_on(ctx, 0) == logits);
        llama_memory_seq_rm(llama_get_memory(ctx), 2, -1, -1);
        CHECK(copy.take(ctx, 2) && copy.put(ctx, 0) && n_seen(ctx, 0) == 0 && decode(ctx, 0, 9));
    }
}

TEST(a_copy_stays_on_the_device) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(on_device(), kind);
        held_copy copy;
        there_and_back(ctx, copy);

        ctx = filled(on_device(), kind);
        const size_t n = n_tensor(ctx, 0);
        auto & moved = device().moved;
        moved = {};
        CHECK(copy.take(ctx, 0));
        CHECK_MSG(moved.n_in == 0 && moved.n_out == 0 && moved.n_inside == n, "%s: %zu in, %zu out, %zu of %zu inside", STATE_KINDS[kind].name,
                moved.n_in, moved.n_out, moved.n_inside, n);
        CHECK(copy.n_device() >= n && copy.n_host() < 1000);
        CHECK(copy.n_device() + copy.n_host() == indexmem_copy_size(ctx, 0));
        const bytes before = save(ctx, 0);
        CHECK(decode(ctx, 0, 25));

        moved = {};
        CHECK(copy.put(ctx, 0));
        CHECK_MSG(moved.n_in == 0 && moved.n_out == 0 && moved.n_inside == n, "%s: %zu in, %zu out, %zu of %zu inside", STATE_KINDS[kind].name,
                moved.n_in, moved.n_out, moved.n_inside, n);
        CHECK(save(ctx, 0) == before);
    }
}

// whatever room there is, the bytes are the same
TEST(a_device_without_room) {
    auto & dev = device();
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(on_device(), kind);
        const bytes  before = save(ctx, 0);
        const size_t n      = n_tensor(ctx, 0);

        // none, some, enough; of what is free an eighth of all stays free
        for (size_t room : { (size_t) 0, n/2, 2*n + 10000 }) {
            held_copy copy;
            dev.n_free = dev.n_total/8 + room;
            dev.moved  = {};
            CHECK(copy.take(ctx, 0));
            CHECK((copy.n_device() > 0) == (room > 0) && copy.n_device() <= room);
            CHECK(dev.moved.n_out + dev.moved.n_inside == n && (dev.moved.n_out == 0) == (room > n));
            CHECK(copy.n_host() >= dev.moved.n_out);
            CHECK(copy.state() == before);
            CHECK(decode(ctx, 0, 25));
            dev.moved = {};
            CHECK(copy.put(ctx, 0) && save(ctx, 0) == before);
            CHECK(dev.moved.n_in + dev.moved.n_inside == n);
            there_and_back(ctx, copy);
            CHECK(copy.put(ctx, 0));
        }
        dev.n_free = dev.n_total;

        // it says that it has room, and has none
        held_copy copy;
        dev.refuses = 1;
        CHECK(copy.take(ctx, 0) && copy.n_device() == 0 && copy.state() == before);
        dev.refuses = SIZE_MAX;
        // and now it has some
        CHECK(copy.take(ctx, 0) && copy.n_device() >= n && copy.state() == before && copy.put(ctx, 0) && save(ctx, 0) == before);

        // it does not say, or has only small buffers
        dev.n_free = dev.n_total = 0;
        held_copy unsaid;
        CHECK(unsaid.take(ctx, 0) && unsaid.n_device() >= n && unsaid.state() == before);
        dev.n_free = dev.n_total = 1u << 30;
        dev.n_max  = 1000;
        held_copy cut;
        dev.moved = {};
        CHECK(cut.take(ctx, 0) && dev.moved.n_inside == n && cut.n_device() >= n && cut.state() == before);
        CHECK(decode(ctx, 0, 25) && cut.put(ctx, 0) && save(ctx, 0) == before);
        dev.n_max = SIZE_MAX;
    }
}

// as any state; and a copy is still one when its context is gone
TEST(in_another_context) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        held_copy copy;
        bytes before;
        {
            const state_contexts there("test-copy-", &device().device);
            llama_context * ctx = filled(there, kind);
            before = save(ctx, 0);
            CHECK(copy.take(ctx, 0) && copy.n_device() > 0);
        }
        CHECK(copy.state() == before);
        for (const auto * contexts : { &on_host(), &on_device() }) {
            llama_context * ctx = filled(*contexts, kind);
            CHECK_MSG(copy.put(ctx, 0), "%s", indexmem_last_error());
            CHECK(save(ctx, 0) == before && decode(ctx, 0, 25));
        }
        llama_context * large = on_host().get_large(kind);
        llama_memory_clear(llama_get_memory(large), true);
        CHECK(copy.put(large, 0) && n_seen(large, 0) == 33);

        // more than there is room for: the policy evicts
        CHECK(decode(large, 0, 30) && copy.take(large, 0));
        llama_context * small = filled(on_host(), kind);
        CHECK_MSG(copy.put(small, 0), "%s", indexmem_last_error());
        check_counts(small, 0);
        CHECK(n_seen(small, 0) == 63);

        // of a model with other layers
        for (int other : { 0, 5, 6, 7 }) {
            if (kind == other || (kind < N_PLAIN_KINDS && other < N_PLAIN_KINDS)) {
                continue;
            }
            llama_context * wrong = filled(on_host(), other);
            const bytes whole = save(wrong, -1);
            CHECK(!copy.put(wrong, 0) && std::string(indexmem_last_error()).find("KV state: ") != std::string::npos);
            CHECK(save(wrong, -1) == whole);
        }
    }
}

TEST(what_cannot_be_copied) {
    for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
        llama_context * ctx = filled(on_host(), kind);
        held_copy copy, good;
        const auto why = [] { return std::string(indexmem_last_error()); };
        CHECK(!copy.put(ctx, 0) && why().find("no copy") != std::string::npos);
        CHECK(indexmem_copy_state(copy.copy, nullptr, 0) == 0 && why().find("no copy") != std::string::npos);
        for (int32_t seq : { -1, (int32_t) STATE_N_SEQ }) {
            CHECK(!copy.take(ctx, seq) && why().find("no sequence") != std::string::npos);
            CHECK(indexmem_copy_size(ctx, seq) == 0 && !why().empty());
        }
        CHECK(good.take(ctx, 0));
        for (int32_t seq : { -1, (int32_t) STATE_N_SEQ }) {
            CHECK(!good.put(ctx, seq) && why().find("no sequence") != std::string::npos);
        }
        const bytes before = save(ctx, 0);
        CHECK(copy.take(ctx, 0));
        indexmem_bounded(llama_get_memory(ctx))->spoil(0);
        CHECK(!copy.take(ctx, 0) && why().find("broken") != std::string::npos && !copy.put(ctx, 1)); // of what was there there is no copy now
        CHECK(!decode(ctx, 0, 1));
        CHECK(good.put(ctx, 0) && save(ctx, 0) == before && decode(ctx, 0, 25));
    }
}

// copies between sequences that wait
TEST(copies_that_wait) {
    for (const auto * contexts : { &on_host(), &on_device() }) {
        for (int kind = 0; kind < N_STATE_KINDS; ++kind) {
            llama_context * ctx = filled(*contexts, kind);
            llama_memory_t  mem = llama_get_memory(ctx);
            const bytes first = save(ctx, 0), second = save(ctx, 1);
            held_copy a, b;
            llama_memory_seq_cp(mem, 0, 2, -1, -1);
            CHECK(a.take(ctx, 2) && equal_but_id(a.state(), first));
            CHECK(b.take(ctx, 1) && b.put(ctx, 0)); // of which the copy was made
            CHECK(equal_but_id(save(ctx, 0), second) && equal_but_id(save(ctx, 2), first));
            CHECK(a.put(ctx, 1) && equal_but_id(save(ctx, 1), first));
            CHECK(decode(ctx, 0, 1) && decode(ctx, 1, 1) && decode(ctx, 2, 1));
        }
    }
}

TEST(another_pin) {
    llama_context * ctx = filled(on_host(), 0);
    held_copy copy;
    CHECK(copy.take(ctx, 1));
    CHECK(indexmem_set_load_pin(ctx, 5) && copy.put(ctx, 1));
    indexmem_stats stats = {};
    stats.struct_size = sizeof(stats);
    CHECK(indexmem_get_stats(ctx, 1, &stats) && stats.pin == 5);
    CHECK(indexmem_set_load_pin(ctx, -1) && copy.put(ctx, 1));
    CHECK(indexmem_get_stats(ctx, 1, &stats) && stats.pin == 0);
}
