#include "indexmem-loader.h"

#include "ggml-backend-dl.h"
#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#    include <cpuid.h>
#elif defined(_MSC_VER) && defined(_M_X64)
#    include <intrin.h>
#endif

static const char * const VARIABLE = "INDEXMEM_CPU_VARIANT";

// the library that holds an address
static fs::path file_of(const void * address) {
#ifdef _WIN32
    HMODULE module = nullptr;
    if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                (LPCWSTR) address, &module)) {
        return {};
    }
    std::vector<wchar_t> path(32768);
    const DWORD n = GetModuleFileNameW(module, path.data(), (DWORD) path.size());
    return std::wstring(path.data(), n);
#else
    Dl_info info;
    return dladdr(address, &info) && info.dli_fname ? fs::path(info.dli_fname) : fs::path();
#endif
}

// Asked when this library is loaded: a path relative to the current directory is right only until that changes.
static const fs::path folder = [] {
    std::error_code ec;
    return fs::absolute(file_of(&VARIABLE), ec).parent_path();
}();

const fs::path & indexmem_backend_folder() {
    return folder;
}

// haswell of libggml-cpu-haswell.so and ggml-cpu-haswell.dll, nothing of other libraries and of libggml-cpu-indexmem.so, the only one of a build
static std::string variant_of(const fs::path & file) {
    static const std::string prefix = "ggml-cpu-";
    std::string name = file.stem().u8string();
    name.erase(0, name.rfind("lib", 0) == 0 ? 3 : 0);
    const std::string variant = name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : "";
    return variant == "indexmem" ? "" : variant;
}

static std::string wanted_variant() {
    const char * value = getenv(VARIABLE);
    return value ? value : "";
}

#if defined(__x86_64__) || (defined(_MSC_VER) && defined(_M_X64))

// what a score is made of: 1 + these (ggml-cpu/arch/x86/cpu-feats.cpp)
enum {
    NEEDS_AVX    = 1 << 4,
    NEEDS_AVX512 = 1 << 7,
    NEEDS_AMX    = 1 << 11,
};

// Parts of the state of a thread that the operating system saves (XCR0). The CPU may have more than that.
static uint64_t saved_registers() {
#ifdef _MSC_VER
    int regs[4];
    __cpuid(regs, 1);
    return regs[2] & (1 << 27) ? _xgetbv(0) : 0;
#else
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) {
        return 0;
    }
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t) d << 32 | a;
#endif
}

static bool can_run(int score) {
    constexpr uint64_t AVX = 0x6, AVX512 = 0xe6, AMX = 0x60000;
    const uint64_t needed = (score - 1) & NEEDS_AMX ? AVX512 | AMX : (score - 1) & NEEDS_AVX512 ? AVX512 :
        (score - 1) & NEEDS_AVX ? AVX : 0;
    return score > 0 && (saved_registers() & needed) == needed;
}

#else

static bool can_run(int score) {
    return score > 0;
}

#endif

int indexmem_backend_score(const fs::path & file, int score) {
    const std::string variant = variant_of(file);
    const std::string wanted  = wanted_variant();
    if (variant.empty()) {
        return score;
    }
    return can_run(score) && (wanted.empty() || variant == wanted) ? score : 0;
}

static std::string joined(const std::vector<std::string> & names) {
    std::string res;
    for (const auto & name : names) {
        res += (res.empty() ? "" : ", ") + name;
    }
    return res;
}

// why no CPU backend was loaded
static std::string describe_missing() {
    std::vector<std::string> usable, others;
    std::error_code ec;
    for (const auto & entry : fs::directory_iterator(folder, ec)) {
        const std::string variant = variant_of(entry.path());
        if (variant.empty()) {
            continue;
        }
        dl_handle_ptr handle { dl_load_library(entry.path()) };
        const auto score = handle ? (ggml_backend_score_t) dl_get_sym(handle.get(), "ggml_backend_score") : nullptr;
        (score && can_run(score()) ? usable : others).push_back(variant);
    }
    const std::string where = " in " + folder.u8string();
    if (usable.empty() && others.empty()) {
        return "there is no CPU backend" + where + ": install the package again";
    }
    std::sort(usable.begin(), usable.end());
    std::sort(others.begin(), others.end());
    if (wanted_variant().empty()) {
        return "this CPU can run none of the variants" + where + ": " + joined(others);
    }
    return std::string(VARIABLE) + " is '" + wanted_variant() + "': this CPU can run " + joined(usable) +
        (others.empty() ? "" : ", and cannot run " + joined(others));
}

std::string indexmem_cpu_backend(std::string & problem) {
    if (ggml_backend_reg_count() == 0) {
        ggml_backend_load_all();
    }
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
    if (!reg) {
        problem = describe_missing();
        return "";
    }
    const std::string variant = variant_of(file_of((const void *) reg->iface.get_name));
    const std::string found   = variant.empty() ? INDEXMEM_CPU_BUILD : variant;
    const std::string wanted  = wanted_variant();
    if (!wanted.empty() && wanted != found) {
        problem = std::string(VARIABLE) + " is '" + wanted + "', but the CPU backend in use is '" + found + (variant.empty() ?
            "', the only one of this build: unset the variable, or install a wheel for all CPUs (make wheel)" :
            "': set the variable before the library is first used");
        return "";
    }
    return found;
}
