// SPDX-License-Identifier: Apache-2.0
// Every launch of csrc/cuda/dispatch.cu on a GPU that is made up: one that this GPU takes, of a kernel that prepare() made ready.
//
//   dispatch_check CAPABILITY MULTIPROCESSORS SHARED_BYTES SEED PLANS
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "fake_runtime.h"
#include "launch.h"

namespace {

using pvq::cuda::CudaPlan;

int num_launches = 0, num_wrong = 0;
std::string plan_name;
std::int64_t num_tokens = 0;

void complain(const std::string& what) {
  ++num_wrong;
  std::printf("%s: %s, %lld tokens\n", what.c_str(), plan_name.c_str(), static_cast<long long>(num_tokens));
}

void check_launch(const cudaLaunchConfig_t& config) {
  ++num_launches;
  unsigned cluster = 1;
  bool early = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim.x;
    early |= config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  }
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1) complain("grid");
  if (block.x == 0 || block.x > 1024 || block.x % 32 != 0 || block.y != 1 || block.z != 1) complain("block");
  if (config.dynamicSmemBytes > static_cast<std::size_t>(fake_device.max_shared_bytes)) complain("shared memory");
  if (grid.x % cluster != 0 || cluster > 8) complain("cluster");
  if (fake_device.capability < 90 && (cluster > 1 || early)) complain("a launch that needs compute capability 9.0");
}

struct Random {
  std::mt19937 engine;
  std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(engine() % static_cast<std::uint32_t>(limit)); }
  std::int64_t one_of(const std::vector<std::int64_t>& values) {
    return values[static_cast<std::size_t>(below(static_cast<std::int64_t>(values.size())))];
  }
};

// Of usual widths, and of others.
CudaPlan random_plan(Random& random) {
  const std::int64_t n =
      random.below(3) == 0
          ? 8 * (1 + random.below(3000))
          : random.one_of({8, 64, 72, 576, 1536, 2048, 4096, 5120, 8192, 9728, 11008, 14336, 16384, 18944, 28672, 29568, 53248});
  std::vector<std::pair<int, std::int64_t>> segments;
  for (std::int64_t left = 1 + random.below(4) / 3 * random.below(3); left > 0; --left)
    segments.emplace_back(static_cast<int>(random.below(4)),
                          random.below(3) == 0
                              ? 1 + random.below(40000)
                              : random.one_of({1, 8, 17, 64, 576, 1024, 4096, 6144, 14336, 28672, 57344, 151936}));
  const int num_planes = 1 + static_cast<int>(random.below(2));
  std::int64_t blocks = 0;
  std::vector<int> factors;
  const std::int64_t rotation = random.below(3), width = random.one_of({8, 16, 32, 64, 128, 256});
  if (rotation == 1 && n % width == 0) {
    blocks = n / width;
    factors = {static_cast<int>(width)};
  } else if (rotation == 2) {
    for (const int dense : {1, 12, 20, 28, 36, 44, 60, 68, 76}) {
      const std::int64_t rest = n % dense == 0 ? n / dense : 0;
      if (rest == 0 || (rest & (rest - 1)) != 0) continue;
      blocks = 1;
      if (dense > 1) factors.push_back(dense);
      if (rest > 1) factors.push_back(static_cast<int>(rest));
      break;
    }
  }
  int group_size = num_planes == 1 && random.below(6) == 0 ? static_cast<int>(random.one_of({8, 16, 64, 128, 256})) : 0;
  if (group_size > 0 && n % group_size != 0) group_size = 0;
  const int num_pulses = group_size > 0 ? 1 + static_cast<int>(random.below(4096)) : 0;
  plan_name = std::to_string(n) + " columns in " + std::to_string(blocks) + " blocks";
  for (const int factor : factors) plan_name += " * " + std::to_string(factor);
  for (const auto& [codebook, rows] : segments)
    plan_name += ", codebook " + std::to_string(codebook) + ": " + std::to_string(rows) + " rows";
  plan_name += ", " + std::to_string(num_planes) + " planes, groups of " + std::to_string(group_size);
  return CudaPlan(n, segments, num_planes, 5, 0, blocks, factors, group_size, num_pulses);
}

void check_plan(const CudaPlan& plan, Random& random) {
  using pvq::cuda::num_allowed;
  num_tokens = 0;
  const int launches = num_launches;
  pvq::cuda::prepare(plan);
  if (num_launches != launches) complain("prepare() launches");
  const std::int64_t ready = num_allowed();
  std::vector<std::int64_t> counts = {31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 895, 896, 1024, 4096, 16384, 131072};
  for (std::int64_t count = 1; count <= 17; ++count) counts.push_back(count);
  for (int i = 0; i < 20; ++i) counts.push_back(1 + random.below(3000));
  for (const std::int64_t count : counts) {
    num_tokens = count;
    const int before = num_launches;
    pvq::cuda::Call call{};
    call.num_tokens = count;
    call.dtype = static_cast<pvq::cuda::DType>(random.below(3));
    pvq::cuda::linear(plan, pvq::cuda::Constants{}, call);
    if (num_launches == before) complain("nothing was launched");
    if (pvq::cuda::workspace_bytes(plan, count) <= 0) complain("workspace");
    if (num_allowed() != ready) return complain("a kernel that was not ready");
  }
}

}  // namespace

int main(int, char** arguments) {
  fake_device.capability = fake_device.ptx_version = std::atoi(arguments[1]);
  fake_device.num_sms = std::atoi(arguments[2]);
  fake_device.max_shared_bytes = std::atoi(arguments[3]);
  fake_device.on_launch = check_launch;
  Random random{std::mt19937(static_cast<std::uint32_t>(std::atoi(arguments[4])))};
  int refused = 0;
  for (int left = std::atoi(arguments[5]); left > 0; --left) {
    const CudaPlan plan = random_plan(random);
    if (pvq::cuda::quantizer_shared_bytes(plan, fake_device.capability) > fake_device.max_shared_bytes) {
      ++refused;  // when it is loaded (explain_plan of cuda_ops.py)
      continue;
    }
    try {
      check_plan(plan, random);
    } catch (const std::exception& error) {
      complain(error.what());
    }
  }
  std::printf("%d launches, %lld kernels, %d refused, %d wrong\n", num_launches, static_cast<long long>(pvq::cuda::num_allowed()),
              refused, num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
