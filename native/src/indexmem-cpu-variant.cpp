#include "indexmem.h"

#include "indexmem-error.h"
#include "indexmem-loader.h"

const char * indexmem_cpu_variant(void) {
    indexmem_clear_error();
    static thread_local std::string name;
    std::string problem;
    name = indexmem_cpu_backend(problem);
    if (name.empty()) {
        indexmem_error_is(problem);
        return nullptr;
    }
    return name.c_str();
}
