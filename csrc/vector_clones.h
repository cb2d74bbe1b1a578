// SPDX-License-Identifier: Apache-2.0
#pragma once

// One build serves every x86-64: a function marked so is compiled for each instruction set, with all that it calls.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PVQ_VECTOR_CLONES __attribute__((flatten, target_clones("avx512f", "avx2", "default")))
#else
#define PVQ_VECTOR_CLONES
#endif
