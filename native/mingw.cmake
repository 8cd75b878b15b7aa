# What the compilers of MinGW need. Included by CMakeLists.txt before llama.cpp is.

# Their own libraries become part of ours, which then run where there is no MinGW, and do not export them again.
add_link_options(-static -Wl,--exclude-libs,ALL)

# OpenMP, too, which CMake would find as a DLL.
execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libgomp.a OUTPUT_VARIABLE gomp OUTPUT_STRIP_TRAILING_WHITESPACE)
if(IS_ABSOLUTE "${gomp}")
    set(OpenMP_gomp_LIBRARY "${gomp}" CACHE FILEPATH "")
endif()

# Windows aligns the stack to 16 bytes, and gcc does not align vectors of 32 and 64 bytes on it (gcc bug 54412): its aligned
# moves fault. The assembler makes unaligned ones of them, which are as fast on aligned data. (Debian's gcc does so itself.)
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-Wa,-muse-unaligned-vector-move INDEXMEM_UNALIGNED_MOVES)
if(INDEXMEM_UNALIGNED_MOVES)
    add_compile_options(-Wa,-muse-unaligned-vector-move)
elseif(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    message(FATAL_ERROR "The assembler is older than binutils 2.38, and with it vectors on the stack crash (gcc bug 54412): "
                        "install newer binutils")
endif()

# Headers before mingw-w64 11 lack what ggml-cpu.c asks for; processes have a structure of the same layout.
include(CheckCSourceCompiles)
check_c_source_compiles("#include <windows.h>
    int main(void) { THREAD_POWER_THROTTLING_STATE t; return sizeof(t) == 0; }" INDEXMEM_THREAD_THROTTLING)
if(NOT INDEXMEM_THREAD_THROTTLING)
    add_compile_definitions(THREAD_POWER_THROTTLING_STATE=PROCESS_POWER_THROTTLING_STATE
        THREAD_POWER_THROTTLING_CURRENT_VERSION=1 THREAD_POWER_THROTTLING_EXECUTION_SPEED=1)
endif()
