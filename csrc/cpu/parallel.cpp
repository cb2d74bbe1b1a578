// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

namespace pvq {
namespace {

// The two entry points that GCC's, LLVM's and Intel's runtimes all export.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;

  bool find(void* library) {
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
    max_threads = reinterpret_cast<decltype(max_threads)>(dlsym(library, "omp_get_max_threads"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(library, "omp_in_parallel"));
    return parallel != nullptr && max_threads != nullptr && in_parallel != nullptr;
  }
};

const OpenMp& runtime() {
  static const OpenMp instance = [] {
    OpenMp openmp;
    if (openmp.find(RTLD_DEFAULT)) return openmp;
    for (const char* name : {"libgomp.so.1", "libomp.so.5"})
      if (void* library = dlopen(name, RTLD_NOW | RTLD_GLOBAL))
        if (openmp.find(library)) return openmp;
    return OpenMp{};
  }();
  return instance;
}

struct Job {
  RangeFunction function;
  void* context;
  std::int64_t count, chunk_size;
  std::atomic<int> next_chunk{0};
};

// Each thread takes the next contiguous chunk until none is left (the runtime may give fewer threads than asked for): the order
// of arrival decides who computes what, never what is computed.
void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (;;) {
    const int chunk = job.next_chunk.fetch_add(1, std::memory_order_relaxed);
    const std::int64_t begin = chunk * job.chunk_size;
    if (begin >= job.count) return;
    job.function(job.context, begin, std::min(job.count, begin + job.chunk_size), chunk);
  }
}

void run(std::int64_t threads, std::int64_t count, std::int64_t chunk_size, RangeFunction function, void* context) {
  if (threads <= 1) {
    function(context, 0, count, 0);
    return;
  }
  Job job{function, context, count, chunk_size, {}};
  runtime().parallel(work, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace

int max_threads() {
  const OpenMp& openmp = runtime();
  if (openmp.parallel == nullptr || openmp.in_parallel() != 0) return 1;
  return std::max(1, openmp.max_threads());
}

void parallel_range(std::int64_t count, std::int64_t grain, RangeFunction function, void* context) {
  if (count <= 0) return;
  grain = std::max<std::int64_t>(1, grain);
  const std::int64_t grains = (count + grain - 1) / grain, threads = std::min<std::int64_t>(max_threads(), grains);
  run(threads, count, (grains + threads - 1) / threads * grain, function, context);
}

void parallel_chunks(std::int64_t count, std::int64_t chunk, RangeFunction function, void* context) {
  if (count <= 0) return;
  const std::int64_t chunks = (count + chunk - 1) / chunk;
  run(std::min<std::int64_t>(max_threads(), chunks), count, chunk, function, context);
}

}  // namespace pvq
