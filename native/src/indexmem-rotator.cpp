#include "indexmem-rotator.h"

#include "indexmem-nodes.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <numeric>

// of one graph; it has fewer
static constexpr size_t N_TENSORS = 32;

ggml_backend_t indexmem_rotator::cpu_backend(const llama_context & lctx) {
    if (!cpu) {
        cpu.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    }
    if (cpu) {
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
        auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set) {
            set(cpu.get(), lctx.get_cparams().n_threads_batch);
        }
    }
    return cpu.get();
}

size_t indexmem_rotator::size_bytes() const {
    size_t res = 0;
    for (const auto & [buft, allocator] : allocators) {
        res += ggml_gallocr_get_buffer_size(allocator.get(), 0);
    }
    return res;
}

// the context's backend for the device in whose memory t lies, or null
static ggml_backend_t backend_of(const llama_context & lctx, const ggml_tensor * t) {
    ggml_backend_sched_t sched = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(t->buffer))) {
            return backend;
        }
    }
    return nullptr;
}

namespace {

// get rows, turn them, set rows
struct turning {
    ggml_context_ptr ctx;

    ggml_cgraph * gf;

    ggml_tensor * store; // of rows that do not lie in the cache but were brought here, else null
    ggml_tensor * read;  // I32 [n_rows]
    ggml_tensor * write; // I64 [n_rows]
    ggml_tensor * delta; // I32 [n_rows*n_parts]
    ggml_tensor * factors;
    ggml_tensor * hadamard;

    turning(ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot, int64_t n_rows, bool staged) :
        ctx(ggml_init({ N_TENSORS*ggml_tensor_overhead() + ggml_graph_overhead_custom(N_TENSORS, false), nullptr, true })),
        gf(ggml_new_graph_custom(ctx.get(), N_TENSORS, false)) {
        ggml_context * c = ctx.get();

        store = nullptr;
        ggml_tensor * rows;
        if (staged) {
            rows = store = indexmem_new_input(c, "turn_store", t->type, n, n_rows);
            ggml_set_output(store);
        } else {
            rows = ggml_view_2d(c, t, n, ggml_nrows(t), t->nb[1], 0);
        }
        read     = indexmem_new_input(c, "turn_read",  GGML_TYPE_I32, n_rows);
        write    = indexmem_new_input(c, "turn_write", GGML_TYPE_I64, n_rows);
        delta    = indexmem_new_input(c, "turn_delta", GGML_TYPE_I32, n_rows*rotation.n_parts());
        factors  = rotation.factors.empty() ? nullptr : indexmem_new_input(c, "turn_factors", GGML_TYPE_F32, rotation.factors.size());
        hadamard = rot == 0 ? nullptr : indexmem_new_input(c, "turn_hadamard", GGML_TYPE_F32, rot, rot);

        // the Hadamard matrix is its own inverse
        ggml_tensor * cur = ggml_get_rows(c, rows, read);
        cur = hadamard ? llama_mul_mat_hadamard(c, cur, hadamard) : cur;
        cur = rotation.build(c, ggml_reshape_3d(c, cur, n, 1, n_rows), delta, factors);
        cur = ggml_reshape_2d(c, cur, n, n_rows);
        cur = hadamard ? llama_mul_mat_hadamard(c, cur, hadamard) : cur;
        ggml_build_forward_expand(gf, ggml_set_rows(c, rows, cur, write));
    }

    bool is_supported(ggml_backend_t backend) const {
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
                return false;
            }
        }
        return true;
    }
};

// calls f(first, n) for stretches of neighbouring rows
template <typename F>
void for_each_stretch(const int32_t * rows, int64_t n_rows, F f) {
    for (int64_t i = 0; i < n_rows;) {
        int64_t n = 1;
        while (i + n < n_rows && rows[i + n] == rows[i] + n) {
            ++n;
        }
        f(i, n);
        i += n;
    }
}

} // namespace

bool indexmem_rotator::turn_some(ggml_backend_t backend, bool staged, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation,
        int64_t rot, const int32_t * rows, const int32_t * deltas, int64_t n_rows, std::string & error) {
    turning g(t, n, rotation, rot, n_rows, staged);

    if (!ggml_gallocr_alloc_graph(allocator_for(backend), g.gf)) {
        allocators.erase(ggml_backend_get_default_buffer_type(backend)); // it would take what it could not get for there
        error = format("no memory of %s to turn %d keys", ggml_backend_name(backend), (int) n_rows);
        return false;
    }

    std::vector<int32_t> read (rows, rows + n_rows);
    std::vector<int64_t> write(rows, rows + n_rows);
    std::vector<uint8_t> bytes;

    const size_t row_size = ggml_row_size(t->type, n);
    if (staged) {
        std::iota(read .begin(), read .end(), 0);
        std::iota(write.begin(), write.end(), 0);
        bytes.resize(n_rows*row_size);
        for_each_stretch(rows, n_rows, [&](int64_t i, int64_t n_next) {
            ggml_backend_tensor_get_2d(t, bytes.data() + i*row_size, rows[i]*t->nb[1], row_size, n_next, t->nb[1], row_size);
        });
        ggml_backend_tensor_set(g.store, bytes.data(), 0, bytes.size());
    }
    ggml_backend_tensor_set(g.read,  read.data(),  0, ggml_nbytes(g.read));
    ggml_backend_tensor_set(g.write, write.data(), 0, ggml_nbytes(g.write));
    ggml_backend_tensor_set(g.delta, rotation.positions(deltas, n_rows).data(), 0, ggml_nbytes(g.delta));
    if (g.factors) {
        ggml_backend_tensor_set(g.factors, rotation.factors.data(), 0, ggml_nbytes(g.factors));
    }
    if (g.hadamard) {
        ggml_backend_tensor_set(g.hadamard, indexmem_hadamard(rot).data(), 0, ggml_nbytes(g.hadamard));
    }

    const auto status = ggml_backend_graph_compute(backend, g.gf);
    if (status != GGML_STATUS_SUCCESS) {
        error = format("%s could not turn %d keys: %s", ggml_backend_name(backend), (int) n_rows, ggml_status_to_string(status));
        return false;
    }
    if (staged) {
        ggml_backend_tensor_get(g.store, bytes.data(), 0, bytes.size());
        for_each_stretch(rows, n_rows, [&](int64_t i, int64_t n_next) {
            ggml_backend_tensor_set_2d(t, bytes.data() + i*row_size, rows[i]*t->nb[1], row_size, n_next, t->nb[1], row_size);
        });
    }
    return true;
}

ggml_gallocr_t indexmem_rotator::allocator_for(ggml_backend_t backend) {
    ggml_backend_buffer_type_t buft = ggml_backend_get_default_buffer_type(backend);

    auto & allocator = allocators[buft];
    if (!allocator) {
        allocator.reset(ggml_gallocr_new(buft));
    }
    return allocator.get();
}

ggml_backend_t indexmem_rotator::backend_for(llama_context & lctx, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot,
        bool & staged) {
    staged = false;
    if (!ggml_backend_buffer_is_host(t->buffer)) {
        ggml_backend_t backend = backend_of(lctx, t);
        if (backend && turning(t, n, rotation, rot, N_ROWS, false).is_supported(backend)) {
            return backend;
        }
        staged = true;
    }
    return cpu_backend(lctx);
}

void indexmem_rotator::reserve(llama_context & lctx, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot) {
    bool staged;
    if (ggml_backend_t backend = backend_for(lctx, t, n, rotation, rot, staged)) {
        const int64_t n_rows = std::min<int64_t>(N_ROWS, ggml_nrows(t));
        if (!ggml_gallocr_reserve(allocator_for(backend), turning(t, n, rotation, rot, n_rows, staged).gf)) {
            allocators.erase(ggml_backend_get_default_buffer_type(backend)); // tried again when it is needed
        }
    }
}

bool indexmem_rotator::turn(llama_context & lctx, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot,
        const indexmem_turn & what, std::string & error) {
    const int64_t n_total = what.rows.size();
    if (!rotation.rotates || n_total == 0) {
        return true;
    }
    bool staged;
    ggml_backend_t backend = backend_for(lctx, t, n, rotation, rot, staged);
    if (!backend) {
        error = "there is no CPU backend";
        return false;
    }
    for (int64_t i = 0; i < n_total; i += N_ROWS) {
        const int64_t n_rows = std::min<int64_t>(n_total - i, N_ROWS);
        if (!turn_some(backend, staged, t, n, rotation, rot, what.rows.data() + i, what.deltas.data() + i, n_rows, error)) {
            return false;
        }
    }
    return true;
}
