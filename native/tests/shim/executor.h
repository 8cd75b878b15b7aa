#pragma once

// Runs a kernel written for a GPU on the CPU: the groups of a grid one after the other, the threads of a group as fibers
// that hand over only where they wait for each other. A kernel that leaves out a barrier therefore sees what the order of
// the threads makes of it: run it forward, reverse and shuffled.
//
//   order    forward, reverse, shuffled: of the groups, and of the simdgroups and threads between barriers; always the same
//   memory   of a group; filled with 0xFF (NaN, -1) before each group, and nothing behind it may be written
//   waiting  all threads of a group (or simdgroup, 32 of them) arrive at the same kind of barrier, or the program ends with
//            a message: threads that have ended or wait elsewhere would hang a GPU
//   atomics  need no help: a thread is never interrupted
//
// The language of a device goes on top of it (metal_shim.h): shim::run() starts a grid, the rest is called by threads.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

// Memory of a group that a kernel declares by itself: a variable with this attribute is static, and poisoned like the rest.
#define SHIM_GROUP_VARIABLE static __attribute__((section("shim_group")))
extern "C" __attribute__((weak)) char __start_shim_group[];
extern "C" __attribute__((weak)) char __stop_shim_group[];

namespace shim {

constexpr uint32_t WIDTH = 32; // threads of a simdgroup

struct extent {
    uint32_t x = 1, y = 1, z = 1;

    uint32_t count() const { return x*y*z; }
    extent   at(uint32_t i) const { return { i % x, i/x % y, i/x/y }; }
};

enum class order { forward, reverse, shuffled };

// INDEXMEM_SHIM_ORDER: forward if it is not set
inline order order_of_environment() {
    const char * name = getenv("INDEXMEM_SHIM_ORDER");
    const char * names[] = { "forward", "reverse", "shuffled" };
    for (int i = 0; name && i < 3; ++i) {
        if (strcmp(name, names[i]) == 0) {
            return (order) i;
        }
    }
    if (name) {
        fprintf(stderr, "INDEXMEM_SHIM_ORDER is %s, and not forward, reverse or shuffled\n", name);
        exit(EXIT_FAILURE);
    }
    return order::forward;
}

// what a thread knows of itself
struct thread {
    extent   grid;      // groups
    extent   group;     // index of the group in the grid
    extent   size;      // threads of the group
    extent   index;     // of the thread in the group
    uint32_t flat;      // the same as one number
    uint32_t lane;      // in its simdgroup
    uint32_t simdgroup;
    uint32_t n_lanes;   // of its simdgroup, less than 32 in a last one
    void   * memory;    // of the group
};

class executor {
public:
    static executor & get() {
        static executor res;
        return res;
    }

    void run(extent grid, extent size, size_t n_memory, order o, const std::function<void()> & kernel) {
        const uint32_t n = size.count();
        if (n_fibers() < n) {
            fibers.resize(n);
            stacks.reset(new char[n*STACK]);
        }
        simd.resize((n + WIDTH - 1)/WIDTH);
        memory.resize(n_memory + GUARD);
        this->kernel = &kernel;
        this->rng.seed(1);

        for (uint32_t ig : sequence(grid.count(), o)) {
            poison();
            for (uint32_t i = 0; i < n; ++i) {
                start(i, { grid, grid.at(ig), size, size.at(i), i, i % WIDTH, i/WIDTH,
                           std::min(WIDTH, n - i/WIDTH*WIDTH), memory.data() });
            }
            do {
                run_to_barrier(n, o);
            } while (!ended(n) && release_group(n));

            for (size_t i = 0; i < GUARD; ++i) {
                if (memory[n_memory + i] != POISON) {
                    fail("a thread wrote behind the memory of its group");
                }
            }
        }
    }

    const thread & here() const { return fibers[current].self; }

    // waits for all threads of the group
    void barrier() { wait(AT_GROUP, "a barrier"); }

    // waits for all threads of the simdgroup; `what` must be the same for all
    void simd_barrier(const char * what) { wait(AT_SIMD, what); }

    // values of all lanes; until the next exchange
    template <typename T>
    const T * exchange(T value, const char * what) {
        static_assert(sizeof(T) <= SLOT);
        fiber & f = fibers[current];
        // one place for odd exchanges, one for even ones: nobody writes where another lane may still be reading
        char * place = simd[f.self.simdgroup].data[f.n_exchanged++ % 2];
        memcpy(place + f.self.lane*sizeof(T), &value, sizeof(T));
        simd_barrier(what);
        return (const T *) place;
    }

private:
    static constexpr size_t STACK  = 256*1024;
    static constexpr size_t GUARD  = 64;
    static constexpr size_t SLOT   = 16;
    static constexpr char   POISON = (char) 0xFF;

    enum state { RUNS, AT_SIMD, AT_GROUP, ENDED };

    struct fiber {
        ucontext_t   context; // how it starts
        jmp_buf      place;   // where it goes on; contexts would cost two calls of the system each time
        bool         started;
        thread       self;
        state        at;
        const char * what;
        uint32_t     n_exchanged;
    };

    struct exchange_area {
        alignas(16) char data[2][WIDTH*SLOT];
    };

    std::vector<fiber>            fibers;
    std::unique_ptr<char[]>       stacks;
    std::vector<exchange_area>    simd;
    std::vector<char>             memory;
    const std::function<void()> * kernel  = nullptr;
    uint32_t                      current = 0;
    jmp_buf                       scheduler;
    std::mt19937                  rng;

    uint32_t n_fibers() const { return (uint32_t) fibers.size(); }

    std::vector<uint32_t> sequence(uint32_t n, order o) {
        std::vector<uint32_t> res(n);
        std::iota(res.begin(), res.end(), 0);
        if (o == order::reverse) {
            std::reverse(res.begin(), res.end());
        }
        if (o == order::shuffled) {
            std::shuffle(res.begin(), res.end(), rng);
        }
        return res;
    }

    void poison() {
        std::fill(memory.begin(), memory.end(), POISON);
        if (__start_shim_group) {
            std::fill(__start_shim_group, __stop_shim_group, POISON);
        }
    }

    static void entry() {
        executor & e = get();
        (*e.kernel)();
        e.wait(ENDED, "its end");
    }

    void start(uint32_t i, const thread & self) {
        fiber & f = fibers[i];
        f.self = self;
        f.started = false;
        f.at   = RUNS;
        f.what = "";
        f.n_exchanged = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = stacks.get() + i*STACK;
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link          = nullptr; // it ends in wait()
        makecontext(&f.context, entry, 0);
    }

    void wait(state at, const char * what) {
        fiber & f = fibers[current];
        f.at   = at;
        f.what = what;
        if (_setjmp(f.place) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    // until it waits
    void resume(uint32_t i) {
        fiber & f = fibers[current = i];
        if (_setjmp(scheduler) != 0) {
            return;
        }
        if (f.started) {
            _longjmp(f.place, 1);
        }
        f.started = true;
        setcontext(&f.context);
    }

    bool ended(uint32_t n) const {
        return std::all_of(fibers.begin(), fibers.begin() + n, [](const fiber & f) { return f.at == ENDED; });
    }

    // Until every thread has ended or waits for the group. In order, a simdgroup gets as far ahead of the others as it can;
    // shuffled, they alternate.
    void run_to_barrier(uint32_t n, order o) {
        std::vector<uint32_t> first_lane;
        for (uint32_t i : sequence((n + WIDTH - 1)/WIDTH, o)) {
            first_lane.push_back(i*WIDTH);
        }
        while (!first_lane.empty()) {
            const size_t next = o == order::shuffled ? rng() % first_lane.size() : 0;
            const uint32_t i0 = first_lane[next];
            const uint32_t i1 = std::min(n, i0 + WIDTH);
            for (uint32_t i : sequence(i1 - i0, o)) {
                if (fibers[i0 + i].at == RUNS) {
                    resume(i0 + i);
                }
            }
            if (!release(i0, i1, AT_SIMD)) {
                first_lane.erase(first_lane.begin() + next);
            }
        }
    }

    bool release_group(uint32_t n) {
        if (release(0, n, AT_GROUP)) {
            return true;
        }
        for (uint32_t i = 0; i < n; ++i) {
            if (i == 0 || strcmp(fibers[i].what, fibers[i - 1].what) != 0) {
                fprintf(stderr, "from thread %u on at %s\n", i, fibers[i].what);
            }
        }
        fail("threads wait for threads that never come");
    }

    // of threads that are all at the same kind of barrier
    bool release(uint32_t i0, uint32_t i1, state at) {
        for (uint32_t i = i0; i < i1; ++i) {
            if (fibers[i].at != at || strcmp(fibers[i].what, fibers[i0].what) != 0) {
                return false;
            }
        }
        for (uint32_t i = i0; i < i1; ++i) {
            fibers[i].at = RUNS;
        }
        return true;
    }

    [[noreturn]] void fail(const char * message) {
        const extent g = fibers[0].self.group;
        fprintf(stderr, "group (%u, %u, %u): %s\n", g.x, g.y, g.z, message);
        abort();
    }
};

inline void run(extent grid, extent size, size_t n_memory, order o, const std::function<void()> & kernel) {
    executor::get().run(grid, size, n_memory, o, kernel);
}

inline const thread & here()         { return executor::get().here(); }
inline void           barrier()      { executor::get().barrier(); }
inline void           simd_barrier() { executor::get().simd_barrier("a simdgroup barrier"); }

// Of the simdgroup: value of a lane; bits of those that say yes; all values taken together, the same bits for every lane.

template <typename T>
T shuffle(T value, uint32_t lane) {
    const T * all = executor::get().exchange(value, "a shuffle");
    return lane < here().n_lanes ? all[lane] : value;
}

inline uint32_t ballot(bool yes) {
    const bool * all = executor::get().exchange(yes, "a ballot");
    uint32_t res = 0;
    for (uint32_t i = 0; i < here().n_lanes; ++i) {
        res |= (uint32_t) all[i] << i;
    }
    return res;
}

template <typename T, typename F>
T reduce(T value, F && combine) {
    const T * all = executor::get().exchange(value, "a reduction");
    T res = all[0];
    for (uint32_t i = 1; i < here().n_lanes; ++i) {
        res = combine(res, all[i]);
    }
    return res;
}

} // namespace shim
