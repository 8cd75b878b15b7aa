// States from bytes of all sorts, for libFuzzer. What is accepted has to survive the steps that follow.
//
//   cmake -B build/fuzz -G Ninja -DINDEXMEM_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++
//   cmake --build build/fuzz --target fuzz_state                                           (compiles all of llama.cpp)
//   mkdir -p build/corpus-state && build/fuzz/fuzz_state -timeout=20 -max_len=24576 -max_total_time=600
//       build/corpus-state native/fuzz/corpus-state                                                     (one line)
//
// `fuzz_state --seeds <folder>` writes real states, with which corpus-state/ began; it is what -merge=1 keeps of all that
// was found since. test_state loads every file of it.

#include "state_attack.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include <sys/mman.h>
#include <unistd.h>

static std::unique_ptr<state_attack> attack;

// the same file each time, in memory
static std::string write_file(const bytes & content) {
    static const int fd = memfd_create("state", 0);
    if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, content.data(), content.size(), 0) != (ssize_t) content.size()) {
        throw std::runtime_error("no file in memory");
    }
    return "/proc/self/fd/" + std::to_string(fd);
}

extern "C" int LLVMFuzzerInitialize(int * argc, char *** argv) {
    attack = std::make_unique<state_attack>("/tmp/" + std::to_string(getpid()) + "-", write_file);
    if (*argc == 3 && strcmp((*argv)[1], "--seeds") == 0) {
        int n = 0;
        for (const auto & seed : attack->seeds()) {
            const std::string path = (*argv)[2] + std::string("/seed") + std::to_string(n++);
            std::ofstream(path, std::ios::binary).write((const char *) seed.data(), (std::streamsize) seed.size());
        }
        exit(0);
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    try {
        attack->run(data, size);
    } catch (const std::exception & err) {
        fprintf(stderr, "%s\n", err.what());
        abort();
    }
    return 0;
}
