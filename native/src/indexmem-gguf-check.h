#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct llama_file;

//
// A strict reading of a GGUF header, before ggml sees it
//
// ggml's parser is for files one trusts: it converts whatever numbers it finds to enums, prints names as they are, allots
// a multiple of what the file holds to arrays and keys, and stops names at a zero byte. Whatever passes here is parsed by
// ggml without an error, so that nothing out of an untrusted file reaches its log either.
//
// Invariants
//   - reads no byte twice and none past the header; what is returned is what ggml gets to parse, even if the file changes
//   - memory and time are linear in the size of the header, which is at most HEADER_MAX
//   - every failure is an indexmem_sidecar_error or what llama_file throws; nothing aborts
//   - tensors of an accepted file lie within it, in order, aligned, without overlap and with the sizes their shapes have
//

// The bytes from the start of the file to the start of its tensor data. The file is at its start.
std::vector<uint8_t> indexmem_gguf_header(llama_file & file);

// bytes of a value of a gguf_type; 0 for strings, arrays and what does not exist
size_t indexmem_gguf_value_size(int32_t type);

// text of unknown origin for a message: printable ASCII, the rest escaped, at most 80 characters
std::string indexmem_printable(const std::string & text);
