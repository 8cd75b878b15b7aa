# Tests of the CUDA kernels on machines without a GPU.
#
#   test_<name>_cuda     the tests of the ops, with the kernels executed on the CPU (shim/executor.h)
#   cuda_kernels_compile the kernels compiled by nvcc, where there is one

add_library(indexmem_cuda_shim OBJECT ${cuda_sources} native/tests/shim/cuda/elsewhere.cpp)
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)
target_compile_features(indexmem_cuda_shim PRIVATE cxx_std_17)
target_compile_options(indexmem_cuda_shim PRIVATE -Wno-ignored-attributes)
target_include_directories(indexmem_cuda_shim BEFORE PRIVATE native/tests/shim/cuda native/tests/shim native/tests native/ops/cuda
                                                             ${indexmem_includes})
target_link_libraries(indexmem_cuda_shim PRIVATE ggml ggml-base)

foreach(test test_evict test_rank test_memory test_indexer)
    add_executable(${test}_cuda native/tests/${test}.cpp)
    target_compile_features(${test}_cuda PRIVATE cxx_std_17)
    target_include_directories(${test}_cuda PRIVATE native/tests ${indexmem_includes})
    target_link_libraries(${test}_cuda PRIVATE indexmem_cuda_shim ggml ggml-cpu ggml-base)
    add_dependencies(indexmem_tests ${test}_cuda)
    if(SKBUILD)
        set_target_properties(${test}_cuda PROPERTIES EXCLUDE_FROM_ALL ON)
    endif()
    foreach(order forward reverse shuffled)
        add_test(NAME ${test}_cuda_${order} COMMAND ${test}_cuda)
        set_tests_properties(${test}_cuda_${order} PROPERTIES TIMEOUT 300 ENVIRONMENT INDEXMEM_SHIM_ORDER=${order})
    endforeach()
endforeach()
