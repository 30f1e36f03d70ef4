# Kernels of the emulator that are what nvcc compiled: its PTX, translated to C++ by tests/ptx.
find_program(MSFLOW_EXT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda REQUIRED)
find_package(Python COMPONENTS Interpreter REQUIRED)
set(translator ${CMAKE_SOURCE_DIR}/tests/ptx/translate.py)
set(reader ${CMAKE_SOURCE_DIR}/tests/ptx/ptx_reader.py)
set(headers tests/cuda_emulator tests/ptx csrc)
file(GLOB_RECURSE sources CONFIGURE_DEPENDS csrc/*.h csrc/*.cuh)

# Add kernels of a file of PTX to the set of kernels `set`. Further arguments are those of translate.py.
function(add_translated set ptx)
  get_filename_component(name ${ptx} NAME_WE)
  set(out ${CMAKE_CURRENT_BINARY_DIR}/ptx/${name}_as_${set}.cpp)
  add_custom_command(OUTPUT ${out} DEPENDS ${ptx} ${translator} ${reader} VERBATIM
    COMMAND ${Python_EXECUTABLE} ${translator} ${set} ${ptx} ${out} ${ARGN})
  target_sources(_C PRIVATE ${out})
  # Without optimization: these functions have thousands of lines, and run once. Integers overflow as in PTX.
  set_source_files_properties(${out} PROPERTIES COMPILE_OPTIONS "-O0;-w;-fwrapv;-ffp-contract=off;-mfma;-mf16c")
endfunction()

foreach(architecture ${MSFLOW_EXT_PTX})
  foreach(kernel ${cuda_kernels})
    file(RELATIVE_PATH name ${CMAKE_SOURCE_DIR}/csrc ${kernel})
    string(MAKE_C_IDENTIFIER ${name} name)
    set(ptx ${CMAKE_CURRENT_BINARY_DIR}/ptx/${name}_${architecture}.ptx)
    add_custom_command(OUTPUT ${ptx} DEPENDS ${kernel} ${sources} VERBATIM
      COMMAND ${MSFLOW_EXT_NVCC} -std=c++17 -O3 -arch=compute_${architecture} -ptx -I${CMAKE_SOURCE_DIR}/csrc ${kernel} -o ${ptx})
    add_translated(${architecture} ${ptx})
  endforeach()
endforeach()
file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/ptx)

# The faults that the tests must find are built into one kernel each.
list(GET MSFLOW_EXT_PTX 0 architecture)
set(coupling ${CMAKE_CURRENT_BINARY_DIR}/ptx/coupling_cuda_cu_${architecture}.ptx)
foreach(fault barriers loads)
  add_translated(without_${fault} ${coupling} --plant ${fault} --only forward_channels_last.*JobIff)
endforeach()

target_sources(_C PRIVATE tests/ptx/exports.cpp)
target_include_directories(_C PRIVATE tests/ptx)
target_compile_definitions(_C PRIVATE MSFLOW_EXT_PTX="${architecture}")
target_link_libraries(_C PRIVATE ${CMAKE_DL_LIBS})
