#include "indexmem-json.h"

#include <stdexcept>

static const int DEEPEST = 512; // a schema of tools has a few dozen levels

bool indexmem_json_is_deep(const std::string & text) {
    // the parser passes over a byte order mark
    const size_t start = text.find_first_not_of(" \t\r\n", text.compare(0, 3, "\xef\xbb\xbf") == 0 ? 3 : 0);
    if (start == std::string::npos || (text[start] != '{' && text[start] != '[')) {
        return false; // no JSON, a form with files for example, or a single value
    }
    int  depth  = 0;
    bool string = false;
    for (size_t i = start; i < text.size(); ++i) {
        const char c = text[i];
        if (string) {
            i     += c == '\\'; // and what it escapes
            string = c != '"';
        } else if (c == '"') {
            string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > DEEPEST) {
                return true;
            }
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
    return false;
}

void indexmem_check_json(const std::string & text) {
    if (indexmem_json_is_deep(text)) {
        throw std::invalid_argument("JSON that is nested more than " + std::to_string(DEEPEST) + " levels deep is refused");
    }
}
