#pragma once

#include "indexmem.h"

#include <string>

// the last error of this thread, for indexmem_last_error() and indexmem_last_error_kind()
void indexmem_set_error(indexmem_error kind, const std::string & text);

// records the error and throws it as std::runtime_error, for code that llama.cpp calls
[[noreturn]] void indexmem_fail(indexmem_error kind, const std::string & text);
