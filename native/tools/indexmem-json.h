#pragma once

//
// What JSON is parsed at all
//

#include <string>

// Whether a text, if it is JSON, is nested so deep that functions which call themselves for each level, of which llama.cpp has many,
// would run out of stack.
bool indexmem_json_is_deep(const std::string & text);

// Throws std::invalid_argument for such a text.
void indexmem_check_json(const std::string & text);
