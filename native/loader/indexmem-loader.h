#pragma once

// Loadable backends, above all the variants of the CPU backend: a build for every CPU has one for each family of CPUs
// (libggml-cpu-haswell.so, ...), and the loader of ggml takes the one with the highest score. Ours says where it looks,
// and which of them may be taken:
//   - they lie beside the library of ggml, nowhere else: what lies in the current directory or beside the program is
//     somebody else's
//   - a variant whose registers the operating system does not save is none, whatever the CPU says
//   - INDEXMEM_CPU_VARIANT=haswell takes that one or none

#include "ggml.h"

#include <filesystem>
#include <string>

// the folder of the library of ggml
const std::filesystem::path & indexmem_backend_folder();

// The score of a loadable backend: `score`, which is what it gave itself, or 0 if it must not be taken.
int indexmem_backend_score(const std::filesystem::path & file, int score);

// The CPU backend that is loaded: the name of a variant, or how the only one was built ("native", for the CPU of the
// machine that built it, or "generic"). Empty, with the reason in `problem`, if there is none, or another than
// INDEXMEM_CPU_VARIANT asks for.
GGML_API std::string indexmem_cpu_backend(std::string & problem);
