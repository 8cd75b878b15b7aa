# Products of weights with the tiles of AMX, on machines without AMX.
#
#   test_amx           with the instructions; skipped where the CPU or the build has none
#   test_amx_software  llama.cpp's sources of them, compiled once more, with tiles in software (shim/amx/tiles.h)

include(CheckCXXCompilerFlag)

check_cxx_compiler_flag(-mamx-tile INDEXMEM_HAVE_AMX_FLAG)
if(INDEXMEM_HAVE_AMX_FLAG) # the test releases and configures tiles itself
    target_compile_options(test_amx PRIVATE -mamx-tile)
endif()

set(amx_flags -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
check_cxx_compiler_flag("${amx_flags}" INDEXMEM_HAVE_AVX512_FLAGS)
if(NOT CMAKE_SYSTEM_NAME STREQUAL Linux OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    message(STATUS "Not Linux on x86-64: the products with AMX are not tested with tiles in software")
elseif(NOT INDEXMEM_HAVE_AVX512_FLAGS)
    message(STATUS "The compiler has no AVX-512 with VNNI: the products with AMX are not tested with tiles in software")
else()
    set(amx_folder "${source}/llama.cpp/ggml/src/ggml-cpu")
    set(amx_shim "${PROJECT_SOURCE_DIR}/native/tests/shim/amx")
    add_library(amx_shim OBJECT "${amx_folder}/amx/amx.cpp" "${amx_folder}/amx/mmq.cpp"
                                "${amx_shim}/tiles.cpp" "${amx_shim}/elsewhere.cpp")
    if(sanitizer_options) # llama.cpp reads 32 bits at odd places there, which x86 allows
        target_compile_options(amx_shim PRIVATE -fno-sanitize=alignment)
    endif()
    target_compile_options(amx_shim PRIVATE -include "${amx_shim}/tiles.h" ${amx_flags} -w)
    set_target_properties(amx_shim PROPERTIES CXX_VISIBILITY_PRESET hidden) # the library may have the same functions
    target_compile_features(amx_shim PRIVATE cxx_std_17)
    target_include_directories(amx_shim PRIVATE ${indexmem_includes} "${amx_folder}")
    target_link_libraries(amx_shim PRIVATE ggml ggml-cpu ggml-base)

    indexmem_test(test_amx_software native/tests/test_amx.cpp $<TARGET_OBJECTS:amx_shim>)
    target_compile_options(test_amx_software PRIVATE -include "${amx_shim}/tiles.h")
    target_compile_definitions(test_amx_software PRIVATE INDEXMEM_SOFTWARE_TILES)
endif()
if(SKBUILD AND TARGET amx_shim)
    set_target_properties(amx_shim PROPERTIES EXCLUDE_FROM_ALL ON)
endif()
