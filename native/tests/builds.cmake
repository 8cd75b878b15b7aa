# The tests of the ops with builds of our kernels that other CPUs have:
#
#   test_<name>_avx2    x86 without AVX-512
#   test_<name>_plain   without vectors (simd.h): what is left for all CPUs it does not know
#
# Only our own sources are compiled again. They are part of the program, and a program comes first where the calls of a shared
# library are resolved, so ggml-cpu calls these; build.cpp proves it. That is how ELF has it, hence Linux.

set(op_builds plain)
set(build_plain_vectors     none)
set(build_plain_options)
set(build_plain_definitions INDEXMEM_PLAIN)

set(build_avx2_vectors     AVX2)
set(build_avx2_options     -mavx2 -mfma -mf16c -mbmi2)
set(build_avx2_definitions)

include(CheckCXXSourceRuns)
list(JOIN build_avx2_options " " CMAKE_REQUIRED_FLAGS)
check_cxx_source_runs("int main() {
    return !__builtin_cpu_supports(\"avx2\") || !__builtin_cpu_supports(\"fma\") || !__builtin_cpu_supports(\"bmi2\");
}" INDEXMEM_RUNS_AVX2)
unset(CMAKE_REQUIRED_FLAGS)
if(INDEXMEM_RUNS_AVX2)
    list(APPEND op_builds avx2)
else()
    message(STATUS "The compiler or this CPU has no AVX2: the ops are not tested with it")
endif()

foreach(build IN LISTS op_builds)
    add_library(indexmem_ops_${build} OBJECT ${cpu_sources})
    target_compile_definitions(indexmem_ops_${build} PRIVATE
        ggml_compute_forward_indexmem=build_compute_forward_indexmem
        ggml_indexmem_mul_mat=build_indexmem_mul_mat
        ggml_indexmem_mul_mat_q4_0x8=build_indexmem_mul_mat_q4_0x8)

    # what is not of that build: the proof, and the tests as they are
    add_library(indexmem_build_${build} OBJECT native/tests/build.cpp)
    target_compile_definitions(indexmem_build_${build} PRIVATE INDEXMEM_BUILD="${build_${build}_vectors}")

    foreach(library indexmem_ops_${build} indexmem_build_${build})
        target_compile_features(${library} PRIVATE cxx_std_17)
        target_include_directories(${library} PRIVATE native/tests ${indexmem_includes} "${source}/llama.cpp/ggml/src/ggml-cpu")
        target_link_libraries(${library} PRIVATE ggml ggml-cpu ggml-base)
        if(SKBUILD)
            set_target_properties(${library} PROPERTIES EXCLUDE_FROM_ALL ON)
        endif()
    endforeach()

    file(MAKE_DIRECTORY "${PROJECT_BINARY_DIR}/tests_${build}") # for the files that programs of the same name write
    set(kernel_tests ${op_tests} test_cache)
    list(REMOVE_ITEM kernel_tests test_amx test_kv_counts) # nothing of these kernels is in them
    foreach(test IN LISTS kernel_tests)
        set(test_itself $<TARGET_OBJECTS:${test}>)
        if(test STREQUAL test_simd)
            set(test_itself native/tests/test_simd.cpp)
        endif()
        indexmem_test(${test}_${build} ${test_itself} $<TARGET_OBJECTS:indexmem_ops_${build}> $<TARGET_OBJECTS:indexmem_build_${build}>)
        set_property(TEST ${test}_${build} PROPERTY WORKING_DIRECTORY "${PROJECT_BINARY_DIR}/tests_${build}")
    endforeach()
    target_link_libraries(test_cache_${build} PRIVATE llama) # all of llama.cpp, with that build

    foreach(target indexmem_ops_${build} test_simd_${build})
        target_compile_options(${target} PRIVATE ${build_${build}_options})
        target_compile_definitions(${target} PRIVATE ${build_${build}_definitions})
    endforeach()
endforeach()
