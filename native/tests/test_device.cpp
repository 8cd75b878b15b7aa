// Where the cache of a layer lies: with the device if it has all kernels, else in host memory.

#include "test.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "indexmem-device.h"
#include "indexmem-ops.h"
#include "indexmem.h"

#include <cstring>

static ggml_backend_dev_t cpu() {
    if (ggml_backend_reg_count() == 0) {
        ggml_backend_load_all();
    }
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// A device like the CPU, with memory that the host does not see, which lacks one kind of our op, or all if it is -1.
struct lacking_device {
    int                      kind;
    ggml_backend_buffer_type memory;
    ggml_backend_device      device;

    explicit lacking_device(int kind) : kind(kind), memory(*ggml_backend_cpu_buffer_type()), device(*cpu()) {
        memory.iface.is_host          = [](ggml_backend_buffer_type_t) { return false; };
        device.context                = this;
        device.iface.get_name         = [](ggml_backend_dev_t) { return "a test device"; };
        device.iface.get_buffer_type  = [](ggml_backend_dev_t dev) { return &((lacking_device *) dev->context)->memory; };
        device.iface.supports_op      = [](ggml_backend_dev_t dev, const ggml_tensor * op) {
            const int kind = ((lacking_device *) dev->context)->kind;
            return op->op != GGML_OP_INDEXMEM || (kind != -1 && kind != ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP));
        };
    }
};

static indexmem_device_needs needs_of(const char * policy, ggml_type type = GGML_TYPE_F16) {
    return { type, type, 64, 64, 3, 3, indexmem_policy_find(policy) };
}

TEST(the_cpu_lacks_nothing) {
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            const char * lacks = indexmem_device_lacks(cpu(), needs_of(indexmem_policy_get(policy)->name, type));
            CHECK_MSG(!lacks, "%s", lacks);
        }
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        CHECK(ggml_backend_dev_get(i) != cpu() || indexmem_device_supported(i));
    }
    CHECK(!indexmem_device_supported(ggml_backend_dev_count()));
}

TEST(each_kernel_is_asked_for) {
    const std::pair<indexmem_op, const char *> kinds[] = {
        { INDEXMEM_OP_RANK,        "the policy"              },
        { INDEXMEM_OP_SELECT,      "selection"               },
        { INDEXMEM_OP_COMPACT,     "compaction of keys"      },
        { INDEXMEM_OP_COMPACT_POS, "compaction of positions" },
        { INDEXMEM_OP_CENTROID,    "centroid memories"       },
        { INDEXMEM_OP_RESIDUAL,    "residual memories"       },
        { INDEXMEM_OP_BIAS,        "masks with biases"       },
    };
    for (const auto & [kind, name] : kinds) {
        lacking_device dev(kind);
        const char * lacks = indexmem_device_lacks(&dev.device, needs_of("snapkv"));
        CHECK_MSG(lacks && strcmp(lacks, name) == 0, "%s, expected %s", lacks ? lacks : "nothing", name);
        CHECK(indexmem_device_buft(&dev.device, needs_of("snapkv")) == ggml_backend_cpu_buffer_type());
    }
}

TEST(a_device_with_all_kernels_holds_the_cache) {
    lacking_device dev(INDEXMEM_OP_ATTEND); // which only the CPU has
    CHECK(indexmem_device_buft(&dev.device, needs_of("indexer")) == &dev.memory);
    lacking_device none(-1);
    CHECK(indexmem_device_buft(&none.device, needs_of("indexer")) == ggml_backend_cpu_buffer_type());
}
