#pragma once

#include <string>

struct llama_model;

// Why a bounded cache cannot be made for the model, "" if it can. Every architecture whose attention goes through the
// ordinary KV cache is supported.
std::string indexmem_unsupported_reason(const llama_model & model);
