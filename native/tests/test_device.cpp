// Where the cache of a layer lies: with the device if it has all kernels, else in host memory. Of the usual kind of cache;
// test_device_context.cpp asks about real ones.

#include "fake_device.h"
#include "test.h"

#include "indexmem-device.h"
#include "indexmem.h"

static indexmem_device_question usual(const char * policy) {
    return [policy](ggml_context * ctx, ggml_context * host) { return indexmem_device_usual(ctx, host, indexmem_policy_find(policy)); };
}

// where a cache lies, and whether the device does without kernels of ours there
static ggml_backend_buffer_type_t buft_of(fake_device & dev, const char * policy, bool stock) {
    bool res = !stock;
    ggml_backend_buffer_type_t buft = indexmem_device_buft(&dev.device, usual(policy), res);
    CHECK(res == stock);
    return buft;
}

TEST(the_cpu_lacks_nothing) {
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        const std::string lacks = indexmem_device_lacks(cpu_device(), usual(indexmem_policy_get(policy)->name));
        CHECK_MSG(lacks.empty(), "%s", lacks.c_str());
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        CHECK(ggml_backend_dev_get(i) != cpu_device() || indexmem_device_supported(i));
    }
    CHECK(!indexmem_device_supported(ggml_backend_dev_count()));
}

TEST(each_kernel_is_asked_for) {
    const std::pair<indexmem_op, const char *> kinds[] = {
        { INDEXMEM_OP_RANK,        "the policy"                     },
        { INDEXMEM_OP_SELECT,      "selection of 544 entries"       },
        { INDEXMEM_OP_COMPACT,     "compaction of rows of type f16" },
        { INDEXMEM_OP_COMPACT_POS, "compaction of positions"        },
        { INDEXMEM_OP_CENTROID,    "centroid memories of which 544 entries are written at once" },
        { INDEXMEM_OP_RESIDUAL,    "residual memories with 64 features" },
        { INDEXMEM_OP_BIAS,        "masks with biases"              },
    };
    for (const auto & [kind, words] : kinds) {
        fake_device dev([kind = kind](const ggml_tensor * op) { return op_kind(op) == kind || op->op == GGML_OP_GET_ROWS; });
        const std::string lacks = indexmem_device_lacks(&dev.device, usual("snapkv"));
        CHECK_MSG(lacks == words, "'%s', expected '%s'", lacks.c_str(), words);
        CHECK(buft_of(dev, "snapkv", false) == ggml_backend_cpu_buffer_type());
    }
    fake_device no_rows([](const ggml_tensor * op) { return op->op == GGML_OP_SET_ROWS; });
    CHECK(indexmem_device_lacks(&no_rows.device, usual("random")) == "storing rows of type f16");
    fake_device no_flash([](const ggml_tensor * op) { return op->op == GGML_OP_FLASH_ATTN_EXT; });
    CHECK(indexmem_device_lacks(&no_flash.device, usual("random")) == "flash attention with heads of 128");
}

TEST(a_device_with_all_kernels_holds_the_cache) {
    fake_device dev([](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_ATTEND; }); // which only the CPU has
    CHECK(buft_of(dev, "indexer", false) == &dev.memory);
    fake_device none([](const ggml_tensor * op) { return op->op == GGML_OP_INDEXMEM; });
    CHECK(buft_of(none, "indexer", true) == &none.memory);
}

// it says what the devices that it is made of say, and cannot split our op between them
TEST(the_meta_device_never_does) {
    fake_device dev([](const ggml_tensor *) { return false; });
    CHECK(buft_of(dev, "indexer", false) == &dev.memory);
    dev.type = GGML_BACKEND_DEVICE_TYPE_META;
    CHECK(buft_of(dev, "indexer", false) == ggml_backend_cpu_buffer_type());
}

// what a device without kernels of ours needs, by policy
TEST(each_op_of_ggml_is_asked_for) {
    const auto lacks = [](ggml_op op, const char * policy) {
        fake_device dev([op](const ggml_tensor * node) { return node->op == GGML_OP_INDEXMEM || node->op == op; });
        const std::string res = indexmem_device_lacks_stock(&dev.device, usual(policy));
        CHECK(buft_of(dev, policy, res.empty()) == (res.empty() ? &dev.memory : ggml_backend_cpu_buffer_type()));
        return res;
    };
    for (int i = 0; indexmem_policy_get(i); ++i) {
        const char * policy = indexmem_policy_get(i)->name;
        CHECK(lacks(GGML_OP_COUNT,          policy).empty());
        CHECK(lacks(GGML_OP_GET_ROWS,       policy) == "reading rows of type f16");
        CHECK(lacks(GGML_OP_SET_ROWS,       policy) == "storing rows of type f16");
        CHECK(lacks(GGML_OP_FLASH_ATTN_EXT, policy) == "flash attention with heads of 128");
    }
    CHECK(lacks(GGML_OP_L2_NORM, "keydiff") == "L2_NORM" && lacks(GGML_OP_L2_NORM, "knorm").empty());
    CHECK(lacks(GGML_OP_SQRT,    "knorm")   == "SQRT"    && lacks(GGML_OP_SQRT,    "streaming").empty());
    for (const char * policy : { "tova", "snapkv" }) {
        CHECK(lacks(GGML_OP_SOFT_MAX, policy) == "SOFT_MAX");
    }
    CHECK(lacks(GGML_OP_CLAMP, "snapkv")    == "CLAMP"   && lacks(GGML_OP_CLAMP,    "tova").empty());
    CHECK(lacks(GGML_OP_SUM_ROWS, "expected") == "SUM_ROWS" && lacks(GGML_OP_SOFT_MAX, "expected").empty());
}
