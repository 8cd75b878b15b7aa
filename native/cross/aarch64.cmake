# Debian's cross compiler for 64-bit ARM (g++-aarch64-linux-gnu); what it makes runs under qemu-aarch64 (qemu-user).
#
#   cmake -B build/arm -G Ninja --toolchain native/cross/aarch64.cmake -DINDEXMEM_ARM_CPU=cortex-a53 \
#         -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8-a -DINDEXMEM_TESTS=ON
#
# INDEXMEM_ARM_CPU is a model of `qemu-aarch64 -cpu help`; it has to have all that GGML_CPU_ARM_ARCH names.

set(CMAKE_SYSTEM_NAME      Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER       aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER     aarch64-linux-gnu-g++)

# libraries and headers of ARM only, programs of this machine
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

set(INDEXMEM_ARM_CPU max CACHE STRING "the CPU that qemu-aarch64 is")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES INDEXMEM_ARM_CPU)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu ${INDEXMEM_ARM_CPU} -L /usr/aarch64-linux-gnu)
