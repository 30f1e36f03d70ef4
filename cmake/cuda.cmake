# CUDA kernels for the module _C, where a toolkit works: MSFLOW_EXT_CUDA = AUTO, ON or OFF.
if(MSFLOW_EXT_CUDA STREQUAL "OFF" OR MSFLOW_EXT_SANITIZE)
  return()
endif()

if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  find_program(MSFLOW_EXT_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    PATHS /usr/local/cuda /opt/cuda)
  if(MSFLOW_EXT_NVCC)
    set(ENV{CUDACXX} ${MSFLOW_EXT_NVCC})
  endif()
endif()

# While CMake tests the compiler, it must not ask for architectures that this nvcc may not know. They are set below.
set(architectures_of_user ${CMAKE_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_ARCHITECTURES OFF)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(MSFLOW_EXT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MSFLOW_EXT_CUDA is ON, but no working nvcc was found (looked in PATH, CUDA_HOME, CUDA_PATH "
      "and /usr/local/cuda): install a CUDA toolkit of 12.4 or later, or set MSFLOW_EXT_CUDA=OFF")
  endif()
  message(STATUS "No working CUDA toolkit: the kernels are built for the CPU only")
  return()
endif()

# check_language only looks for the file. Use nvcc only if it compiles and links a program.
set(probe ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe)
file(WRITE ${probe}.cu "#include <cuda_runtime.h>\n__global__ void f() {}\nint main() { f<<<1, 1>>>(); return cudaGetLastError(); }\n")
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 -o ${probe} ${probe}.cu
  RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(failed)
  if(MSFLOW_EXT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MSFLOW_EXT_CUDA is ON, but ${CMAKE_CUDA_COMPILER} does not compile a small program:\n${said}")
  endif()
  message(STATUS "${CMAKE_CUDA_COMPILER} does not compile: the kernels are built for the CPU only\n${said}")
  return()
endif()
enable_language(CUDA)

if(architectures_of_user)
  set(architectures ${architectures_of_user})
else()
  # Machine code (-real) for GPUs in use, and PTX for later ones, as far as this nvcc supports them.
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known)
  set(architectures)
  foreach(architecture 75-real 80-real 86-real 89-real 90 100-real 120)
    string(REGEX MATCH "^[0-9]+" number ${architecture})
    if(known MATCHES "sm_${number}\n")
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
endif()

target_sources(_C PRIVATE ${cuda_kernels})
list(JOIN architectures " " names)
target_compile_definitions(_C PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:MSFLOW_EXT_CUDA=\"${names}\">")
set_target_properties(_C PROPERTIES
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
set(cuda_flags -O3 -Xcompiler=-Wall,-Wextra)
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --help OUTPUT_VARIABLE help)
if(help MATCHES "--compress-mode")
  list(APPEND cuda_flags --compress-mode=size)
endif()
if(MSFLOW_EXT_WERROR)
  list(APPEND cuda_flags -Werror=all-warnings -Xcompiler=-Werror)
endif()
target_compile_options(_C PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
# Hide the symbols of the static CUDA runtime.
target_link_options(_C PRIVATE $<$<CXX_COMPILER_ID:GNU,Clang>:LINKER:--exclude-libs,ALL>)
message(STATUS "CUDA kernels for ${names} by ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}")
