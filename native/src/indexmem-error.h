#pragma once

#include "indexmem.h"

#include <string>

// records the error of this thread, for indexmem_last_error() and indexmem_last_error_kind(), and throws it as
// std::runtime_error, which llama.cpp catches
[[noreturn]] void indexmem_fail(indexmem_error kind, const std::string & text);
