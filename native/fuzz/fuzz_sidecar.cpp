// Sidecars from bytes of all sorts, for libFuzzer:
//
//   cmake -B build/fuzz -G Ninja -DINDEXMEM_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++
//   cmake --build build/fuzz --target fuzz_sidecar
//   mkdir -p build/corpus && build/fuzz/fuzz_sidecar -dict=native/fuzz/sidecar.dict -timeout=10 -rss_limit_mb=2048
//       -max_total_time=600 build/corpus native/fuzz/corpus                                             (one line)
//
// corpus/ began as files of native/tests/sidecar_file.h and is what -merge=1 keeps of all that was found since.
// test_sidecar_bytes loads every file of it.

#include "indexmem-sidecar.h"

#include <cstdio>
#include <cstdlib>

#include <sys/mman.h>
#include <unistd.h>

static void require(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const int fd = memfd_create("sidecar", 0);
    static const std::string path = "/proc/self/fd/" + std::to_string(fd);

    require(fd >= 0 && ftruncate(fd, 0) == 0, "no file in memory");
    require(pwrite(fd, data, size, 0) == (ssize_t) size, "no room for the input");

    // what ggml gets to parse has been checked: it has no error to log, with names out of the file in it
    ggml_log_set([](ggml_log_level, const char * text, void *) { require(false, text); }, nullptr);

    try {
        const indexmem_sidecar sidecar(path);
        require(sidecar.get_hash() != 0, "the hash is 0");
        require(sidecar.get_geometry().n_layer >= 1 && sidecar.get_geometry().n_layer <= 4096, "impossible geometry");
        require(sidecar.size_bytes() == 0, "weights without load()");
    } catch (const indexmem_sidecar_error & err) {
        const std::string text = err.what();
        require(!text.empty() && text.size() < 2000, "an error without an end, or without a beginning");
        for (const char c : text) {
            require(c >= 0x20 && c < 0x7F, "an error that cannot be printed");
        }
        require(text != "cannot read " + path + ": ggml cannot parse it as GGUF", "ggml refuses what the check accepts");
    }
    return 0;
}
