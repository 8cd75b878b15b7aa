#pragma once

#include "indexmem.h"

#include "llama-arch.h"

#include <cstdint>
#include <string>

struct llama_model;

// Why a bounded cache cannot be made for the model, "" if it can. Every architecture whose attention goes through the
// ordinary KV cache, alone or beside windows and recurrent layers, is supported.
std::string indexmem_unsupported_reason(const llama_model & model);

// why none of the models of an architecture can have one, "" if that depends on the model
const char * indexmem_unsupported_arch(llm_arch arch);

// what a layer of a supported model keeps: flags of enum indexmem_layer
uint32_t indexmem_layer_kind(const llama_model & model, uint32_t il);
