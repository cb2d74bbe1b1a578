// SPDX-License-Identifier: Apache-2.0
// A parallel loop on the OpenMP threads that are already in the process.
//
// torch brings an OpenMP runtime of its own under a private file name. Linking another one would give the process two pools of
// spinning threads, which on few cores costs more than the kernels themselves, and would ignore the cores that vLLM pins its
// pool to. So the runtime is looked up at run time: the one already loaded first, then the system's libgomp, then none.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pvq {

// Threads that parallel_for would use now: 1 inside a parallel region or without a runtime.
int max_threads();

using RangeFunction = void (*)(void* context, std::int64_t begin, std::int64_t end, int slot);
void parallel_range(std::int64_t count, std::int64_t grain, RangeFunction function, void* context);

// The same in chunks of `chunk`, more of them than threads: whoever is done first takes the next.
void parallel_chunks(std::int64_t count, std::int64_t chunk, RangeFunction function, void* context);

template <typename Body>
void call_body(void* context, std::int64_t begin, std::int64_t end, int slot) {
  (*static_cast<Body*>(context))(begin, end, slot);
}

// Calls body(begin, end, slot) on disjoint ranges that cover [0, count); no range is shorter than `grain` but the last.
// `slot` numbers the ranges from 0 and stays below max_threads().
template <typename Body>
void parallel_for(std::int64_t count, std::int64_t grain, Body&& body) {
  parallel_range(count, grain, call_body<std::remove_reference_t<Body>>, const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(begin, end) on chunks of `chunk` (one thread: on everything at once), for work where threads may not keep pace with
// each other.
template <typename Body>
void parallel_for_chunks(std::int64_t count, std::int64_t chunk, Body&& body) {
  const auto ignore_slot = [&](std::int64_t begin, std::int64_t end, int) { body(begin, end); };
  parallel_chunks(count, chunk, call_body<const decltype(ignore_slot)>,
                  const_cast<void*>(static_cast<const void*>(&ignore_slot)));
}

}  // namespace pvq
