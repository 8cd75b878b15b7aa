# Tests of the CUDA kernels on machines without a GPU.
#
#   test_<name>_cuda     the tests of the ops, with the kernels executed on the CPU (shim/executor.h)
#   indexmem_cuda_check  the kernels compiled by nvcc, where there is one

if(CMAKE_SYSTEM_NAME STREQUAL Linux) # executor.h needs it
    add_library(indexmem_cuda_shim OBJECT ${cuda_sources} native/tests/shim/cuda/elsewhere.cpp)
    set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)
    if(SKBUILD)
        set_target_properties(indexmem_cuda_shim PROPERTIES EXCLUDE_FROM_ALL ON)
    endif()
    target_compile_features(indexmem_cuda_shim PRIVATE cxx_std_17)
    target_compile_options(indexmem_cuda_shim PRIVATE -Wno-ignored-attributes)
    target_include_directories(indexmem_cuda_shim BEFORE PRIVATE native/tests/shim/cuda native/tests/shim native/tests native/ops/cuda
                                                                 ${indexmem_includes})
    target_link_libraries(indexmem_cuda_shim PRIVATE ggml ggml-base)

    foreach(test test_evict test_rank test_memory test_indexer)
        add_executable(${test}_cuda native/tests/${test}.cpp)
        target_compile_features(${test}_cuda PRIVATE cxx_std_17)
        target_include_directories(${test}_cuda PRIVATE native/tests ${indexmem_includes})
        target_link_libraries(${test}_cuda PRIVATE indexmem_cuda_shim ggml ggml-base)
        add_dependencies(indexmem_tests ${test}_cuda)
        if(SKBUILD)
            set_target_properties(${test}_cuda PROPERTIES EXCLUDE_FROM_ALL ON)
        endif()
        add_test(NAME ${test}_cuda COMMAND ${test}_cuda)
        set_tests_properties(${test}_cuda PROPERTIES TIMEOUT 600)
    endforeach()
endif()

# All kernels as one unit, which is a matter of seconds. Headers of ggml's backend want those of cuBLAS.
find_program(NVCC_PROGRAM nvcc HINTS /usr/local/cuda/bin)
mark_as_advanced(NVCC_PROGRAM)
if(NVCC_PROGRAM AND NOT WIN32)
    set(unit "${PROJECT_BINARY_DIR}/indexmem_cuda.cu")
    list(TRANSFORM cuda_sources REPLACE "(.+)" "#include \"\\1\"" OUTPUT_VARIABLE lines)
    list(JOIN lines "\n" lines)
    file(CONFIGURE OUTPUT "${unit}" CONTENT "${lines}\n" @ONLY)
    set(nvcc_includes "${source}/llama.cpp/ggml/include" ${indexmem_includes}
                      "${PROJECT_SOURCE_DIR}/native/ops/cuda")
    list(TRANSFORM nvcc_includes PREPEND -I)
    file(GLOB cuda_headers CONFIGURE_DEPENDS native/ops/cuda/*.cuh)
    add_custom_command(OUTPUT indexmem_cuda.o
        COMMAND ${CMAKE_CUDA_COMPILER_LAUNCHER} ${NVCC_PROGRAM} -std=c++17 -arch=sm_80 -use_fast_math -Werror all-warnings
                ${nvcc_includes} -Xcompiler -idirafter,${PROJECT_SOURCE_DIR}/native/tests/shim/nvcc -c ${unit} -o indexmem_cuda.o
        DEPENDS ${cuda_sources} ${cuda_headers} "${unit}" native/ops/indexmem-ops.h native/policies/policies.def
        COMMENT "compiling the CUDA kernels with ${NVCC_PROGRAM}" VERBATIM)
    add_custom_target(indexmem_cuda_check DEPENDS indexmem_cuda.o)
    add_dependencies(indexmem_tests indexmem_cuda_check)
else()
    message(STATUS "There is no nvcc: the CUDA kernels are tested as C++ only")
endif()
