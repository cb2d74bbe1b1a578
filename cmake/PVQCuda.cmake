# SPDX-License-Identifier: Apache-2.0
# Adds the CUDA kernels to the module _C if the machine has an nvcc. No GPU is needed to build them, and no torch.
#
#   PVQ_CUDA                  AUTO: build them if an nvcc is found; ON: fail without one; OFF: never
#   CMAKE_CUDA_COMPILER       the nvcc; else CUDACXX, PATH, CUDA_HOME, /usr/local/cuda
#   CMAKE_CUDA_ARCHITECTURES  the GPUs, such as "80-real;90a-real". "native": those of this machine, or 9.0 where there is none

# All that a release is built for. PTX of the first and the last serves every GPU that is not listed.
set(PVQ_CUDA_ALL_ARCHITECTURES 80 86-real 89-real 90a-real 100-real 120)

set(PVQ_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE PVQ_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT PVQ_CUDA STREQUAL "AUTO" AND NOT PVQ_CUDA)
  message(STATUS "PVQ: building for the CPU only (PVQ_CUDA is ${PVQ_CUDA})")
  return()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  find_program(PVQ_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
  if(DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
  elseif(PVQ_NVCC)
    set(CMAKE_CUDA_COMPILER ${PVQ_NVCC})
  elseif(PVQ_CUDA STREQUAL "AUTO")
    message(STATUS "PVQ: no nvcc found: building for the CPU only")
    return()
  else()
    message(FATAL_ERROR "PVQ: PVQ_CUDA is ON, but there is no nvcc: install the CUDA toolkit or set CMAKE_CUDA_COMPILER")
  endif()
endif()

if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native")
  find_program(PVQ_NVIDIA_SMI nvidia-smi)
  set(capabilities "")
  if(PVQ_NVIDIA_SMI)
    execute_process(COMMAND ${PVQ_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
  string(REPLACE "." "" architectures "${capabilities}")
  list(REMOVE_DUPLICATES architectures)
  list(TRANSFORM architectures REPLACE "^90$" "90a")
  if(NOT architectures)
    set(architectures 90a)
  endif()
  list(TRANSFORM architectures APPEND "-real")
elseif(CMAKE_CUDA_ARCHITECTURES)
  set(architectures ${CMAKE_CUDA_ARCHITECTURES})
else()
  set(architectures ${PVQ_CUDA_ALL_ARCHITECTURES})
endif()

# An older nvcc does not know the newest GPUs, a newer one not the oldest.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known RESULT_VARIABLE failed ERROR_QUIET)
string(REGEX MATCHALL "[0-9]+" known "${known}")
set(kept "")
foreach(architecture IN LISTS architectures)
  string(REGEX MATCH "^[0-9]+" number "${architecture}")
  if(failed OR number IN_LIST known)
    list(APPEND kept ${architecture})
  else()
    message(WARNING "PVQ: ${CMAKE_CUDA_COMPILER} makes no code for architecture ${architecture}: left out. Such a GPU runs "
      "what is compiled for an older one, if that has PTX, and slower: use a newer nvcc, or for an old GPU an older one")
  endif()
endforeach()
if(NOT kept)
  message(FATAL_ERROR "PVQ: nvcc knows none of the architectures ${architectures}: use another nvcc, or PVQ_CUDA=OFF")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${kept})
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

target_sources(_C PRIVATE
  csrc/cuda/bindings.cpp
  csrc/cuda/canonical.cu
  csrc/cuda/device.cpp
  csrc/cuda/dispatch.cu
  csrc/cuda/encode.cu
  csrc/cuda/expand.cu
  csrc/cuda/feedback.cu
  csrc/cuda/few_columns.cu
  csrc/cuda/many_columns.cu
  csrc/cuda/many_columns_wgmma.cu
  csrc/cuda/many_columns_wgmma_int8.cu
  csrc/cuda/many_columns_wgmma_pvq2.cu
  csrc/cuda/many_columns_wgmma_pvq3.cu
  csrc/cuda/many_columns_wgmma_pvq4.cu
  csrc/cuda/pack.cu
  csrc/cuda/plan.cpp
  csrc/cuda/prefill_wgmma.cu
  csrc/cuda/project_tokens.cu
  csrc/cuda/quantize.cu
  csrc/cuda/rotate_cluster.cu
  csrc/cuda/rotate_quantize.cu
  csrc/cuda/table.cpp
  csrc/cuda/warp_tiles.cu
  csrc/cuda/wgmma_schedule.cpp)
set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES "${kept}")
target_include_directories(_C PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
string(REPLACE ";" ", " names "${kept}")
string(REPLACE "-real" "" names "${names}")
target_compile_definitions(_C PRIVATE PVQ_WITH_CUDA PVQ_CUDA_ARCHITECTURES="${names}")
if("${kept}" MATCHES "90a")
  target_compile_definitions(_C PRIVATE PVQ_WITH_WGMMA)
endif()
# docs/format.md orders every float operation: -fmad=false on the GPU, as -ffp-contract=off on the CPU.
target_compile_options(_C PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 -fmad=false --expt-relaxed-constexpr
  -Xcompiler=-Wall,-Wno-unknown-pragmas,-fvisibility=hidden,-ffp-contract=off>)

# For a test: the choice of kernels on GPUs that are made up, with a runtime that launches nothing.
if(EXISTS ${PROJECT_SOURCE_DIR}/tests/test_cuda/dispatch_check.cpp)
  add_executable(dispatch_check EXCLUDE_FROM_ALL
    tests/test_cuda/dispatch_check.cpp
    tests/test_cuda/fake_runtime.cpp
    $<FILTER:$<TARGET_OBJECTS:_C>,EXCLUDE,/csrc/bindings|/csrc/cuda/bindings|/csrc/cpu/|/csrc/canonical_|/csrc/causal>)
  set_target_properties(dispatch_check PROPERTIES CUDA_RUNTIME_LIBRARY None LINKER_LANGUAGE CXX)
  target_include_directories(dispatch_check PRIVATE csrc/cuda ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
endif()

message(STATUS "PVQ: building for the CPU and for GPUs of architecture ${names} (nvcc ${CMAKE_CUDA_COMPILER_VERSION})")
