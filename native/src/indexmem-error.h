#pragma once

#include "indexmem.h"

#include <string>

// The error of the calling thread, for indexmem_last_error() and indexmem_last_error_kind()

void indexmem_clear_error();

// records it and returns false
bool indexmem_error_is(const std::string & text, indexmem_error kind = INDEXMEM_ERROR_PARAMS);

// records it and throws it as std::runtime_error, which llama.cpp catches
[[noreturn]] void indexmem_fail(indexmem_error kind, const std::string & text);
