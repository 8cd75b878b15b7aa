#include "indexmem-error.h"

#include <stdexcept>

static thread_local std::string    error_last;
static thread_local indexmem_error error_last_kind;

void indexmem_clear_error() {
    error_last_kind = INDEXMEM_ERROR_NONE;
    error_last.clear();
}

bool indexmem_error_is(const std::string & text, indexmem_error kind) {
    error_last_kind = kind;
    error_last      = text;
    return false;
}

void indexmem_fail(indexmem_error kind, const std::string & text) {
    indexmem_error_is(text, kind);
    throw std::runtime_error(text);
}

const char * indexmem_last_error(void) {
    return error_last.c_str();
}

indexmem_error indexmem_last_error_kind(void) {
    return error_last_kind;
}
