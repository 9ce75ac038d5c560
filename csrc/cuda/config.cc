#include "config.h"

#include <algorithm>

namespace jax_rmsnorm {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int NextPowerOfTwo(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int WholeWarps(int64_t threads) { return static_cast<int>(CeilDiv(threads, kWarp)) * kWarp; }

// Limits of one kernel family: what its instantiations hold in registers.
struct Limits {
  int lanes_block;      // threads a block where rows are narrower than a warp
  int max_threads;      // threads a block elsewhere
  int block_packets;    // packets a thread in the usual block
  int largest_packets;  // packets a thread before a row is split over a cluster
};

// Scope, width, packets, threads and cluster size, from the length of a row alone.
LaunchConfig ConfigureRow(const Device& device, int64_t hidden, int width, const Limits& limits) {
  LaunchConfig config;
  config.width = width;
  const int64_t packets = CeilDiv(hidden, width);
  const bool wide = width > 1;
  const int lanes_packets = wide ? 4 : 16;

  if (packets <= kWarp * lanes_packets) {
    config.scope = Scope::kLanes;
    config.block = limits.lanes_block;
    if (wide) {
      config.packets = packets <= 8 ? 1 : packets <= 2 * kWarp ? 2 : 4;
    } else {
      config.packets = packets <= 4 * kWarp ? 4 : 16;
    }
    config.threads_per_row = std::min(NextPowerOfTwo(CeilDiv(packets, config.packets)), kWarp);
    return config;
  }

  const int usual = wide ? limits.block_packets : 16;
  const int largest = wide ? limits.largest_packets : 16;
  for (int per_thread : {usual, largest}) {
    if (packets > int64_t{per_thread} * limits.max_threads) continue;
    config.scope = Scope::kBlock;
    config.packets = per_thread;
    config.block = config.threads_per_row = WholeWarps(CeilDiv(packets, per_thread));
    return config;
  }

  const int per_thread = wide ? 4 : 16;
  const int64_t slice = int64_t{per_thread} * limits.max_threads;
  const int64_t cluster = NextPowerOfTwo(CeilDiv(packets, slice));
  if (cluster <= device.max_cluster) {
    config.scope = Scope::kCluster;
    config.packets = per_thread;
    config.cluster = static_cast<int>(cluster);
    config.block = config.threads_per_row = WholeWarps(CeilDiv(CeilDiv(packets, cluster), per_thread));
    return config;
  }

  config.scope = Scope::kLoop;
  config.packets = 1;
  config.block = config.threads_per_row = limits.max_threads;
  return config;
}

int UsableSMs(const Device& device, int margin) { return std::max(1, device.sm_count - std::max(0, margin)); }

// Clusters live within a GPC of 16 or more SMs. Counting SMs in sixteens keeps every cluster of a persistent
// grid resident.
int64_t ResidentClusters(int sms, int cluster) {
  const int whole = sms >= 16 ? sms / 16 * 16 : sms;
  return std::max(1, whole / cluster);
}

}  // namespace

LaunchConfig ConfigureForward(const Device& device, const Shape& shape, DType x, bool aligned, int margin) {
  const int width = aligned ? static_cast<int>(16 / SizeOf(x)) : 1;
  // 8 packets: 64 registers of fp32 sums and raw data, which 1024 threads can have; used without clusters
  // only.
  const Limits limits{128, 1024, 4, device.max_cluster > 1 ? 4 : 8};
  LaunchConfig config = ConfigureRow(device, shape.hidden, width, limits);
  const int64_t slots = config.block / config.threads_per_row;
  const int64_t items = CeilDiv(shape.groups * shape.rows, slots);
  // Without a margin the hardware scheduler deals out the rows; with one the grid is persistent.
  int64_t resident = kMaxGrid / config.cluster;
  if (margin > 0) {
    const int sms = UsableSMs(device, margin);
    resident = config.cluster > 1 ? ResidentClusters(sms, config.cluster)
                                  : int64_t{sms} * std::max(1, 1024 / config.block);
  }
  config.grid = std::min(items, resident) * config.cluster;
  return config;
}

LaunchConfig ConfigureBackward(const Device& device, const Shape& shape, DType x, DType dy, bool aligned,
                               int64_t partial_rows, int margin) {
  constexpr int kThreadsPerSM = 512;  // at up to 128 registers each, which the kernels' launch bounds grant
  constexpr int kMaxStages = 6;
  constexpr int kOtherSharedMemory =
      6 * 1024;  // a block's sums (up to 4 KiB in a cluster), and the system's 1 KiB
  const auto narrow = std::min(SizeOf(x), SizeOf(dy));
  const int width = aligned ? static_cast<int>(16 / narrow) : 1;
  const Limits limits{256, kThreadsPerSM, 2, 4};
  LaunchConfig config = ConfigureRow(device, shape.hidden, width, limits);

  const int blocks_per_sm = std::max(1, kThreadsPerSM / config.block);
  if (aligned && config.scope != Scope::kLoop) {
    const int64_t stage = int64_t{config.block} * config.packets * width * (SizeOf(x) + SizeOf(dy));
    const int64_t budget = device.shared_memory / blocks_per_sm - kOtherSharedMemory;
    config.stages = static_cast<int>(std::min<int64_t>(kMaxStages, budget / stage));
    if (config.stages < 2) config.stages = 0;
    config.shared_memory = config.stages * stage;
  }
  const int64_t slots = config.block / config.threads_per_row;
  if (config.scope == Scope::kLanes) {
    // At the end the slots of a block add up their columns of dgamma here.
    config.shared_memory = std::max(config.shared_memory, slots * shape.hidden * 4);
  }

  const int sms = UsableSMs(device, margin);
  const int64_t resident =
      config.cluster > 1 ? ResidentClusters(sms, config.cluster) : int64_t{sms} * blocks_per_sm;
  const int64_t items = CeilDiv(shape.rows, slots);
  const int64_t wanted = std::max<int64_t>(1, resident / std::max<int64_t>(1, shape.groups));
  config.blocks_per_group =
      std::max<int64_t>(1, std::min({items, wanted, std::max<int64_t>(1, partial_rows)}));
  config.grid = std::min(resident, config.blocks_per_group * shape.groups) * config.cluster;
  return config;
}

}  // namespace jax_rmsnorm
