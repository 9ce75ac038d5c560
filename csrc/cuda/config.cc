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

// Where a row is no longer than a warp's registers allow, part of a warp takes it.
LaunchConfig Lanes(int64_t packets, int per_thread, int width, int block) {
  LaunchConfig config;
  config.scope = Scope::kLanes;
  config.width = width;
  config.packets = per_thread;
  config.threads_per_row = NextPowerOfTwo(CeilDiv(packets, per_thread));
  config.block = block;
  return config;
}

// A row for `cluster` blocks, or for one.
LaunchConfig Blocks(int64_t packets, int per_thread, int width, int64_t cluster) {
  LaunchConfig config;
  config.scope = cluster > 1 ? Scope::kCluster : Scope::kBlock;
  config.width = width;
  config.packets = per_thread;
  config.cluster = static_cast<int>(cluster);
  config.block = config.threads_per_row = WholeWarps(CeilDiv(packets, per_thread * cluster));
  return config;
}

LaunchConfig Loop(int width, int block) {
  LaunchConfig config;
  config.scope = Scope::kLoop;
  config.width = width;
  config.block = config.threads_per_row = block;
  return config;
}

// Blocks that a row of `packets` needs at most `per_thread` packets a thread and `threads` a block: a power
// of two.
int ClusterFor(int64_t packets, int per_thread, int threads) {
  return NextPowerOfTwo(CeilDiv(packets, int64_t{per_thread} * threads));
}

// The layout of unaligned rows, an element a packet, the same for forward and backward.
LaunchConfig Unaligned(const Device& device, int64_t hidden, int lanes_block, int max_threads) {
  if (hidden <= 4 * kWarp) return Lanes(hidden, 4, 1, lanes_block);
  if (hidden <= 16 * kWarp) return Lanes(hidden, 16, 1, lanes_block);
  const int cluster = ClusterFor(hidden, 16, max_threads);
  return cluster <= device.max_cluster ? Blocks(hidden, 16, 1, cluster) : Loop(1, max_threads);
}

LaunchConfig AlignedForward(const Device& device, int64_t hidden, int width) {
  constexpr int kThreads = 1024;
  const int64_t packets = CeilDiv(hidden, width);
  if (packets <= 8) return Lanes(packets, 1, width, 128);
  if (packets <= 2 * kWarp) return Lanes(packets, 2, width, 128);
  if (packets <= 4 * kWarp) return Lanes(packets, 4, width, 128);
  if (packets <= 4 * kThreads) return Blocks(packets, 4, width, 1);
  const int cluster = ClusterFor(packets, 4, kThreads / 2);
  if (cluster <= device.max_cluster) return Blocks(packets, 4, width, cluster);
  const int larger = ClusterFor(packets, 4, kThreads);
  if (larger <= device.max_cluster) return Blocks(packets, 4, width, larger);
  if (packets <= 8 * kThreads) return Blocks(packets, 8, width, 1);
  return Loop(width, kThreads);
}

LaunchConfig AlignedBackward(const Device& device, int64_t hidden, int width, int64_t pair_bytes) {
  constexpr int kThreads = 512;  // a block and an SM, at up to 128 registers each
  // For blocks of several rows, with few stages: the fastest on an H200, as many stages are for whole rows.
  constexpr int kSharedThreads = 384;
  const int64_t packets = CeilDiv(hidden, width);
  const int per_thread = packets == 1 ? 1 : 2;
  const int64_t stage_bytes = per_thread * pair_bytes;  // a thread
  const int64_t room = device.shared_memory - kOtherSharedMemory;
  const auto fits = [&](int threads, int stages) { return stages * threads * stage_bytes <= room; };

  LaunchConfig config;
  if (packets <= 2 * kWarp) {
    config = Lanes(packets, per_thread, width, kSharedThreads);
  } else {
    int cluster = ClusterFor(packets, per_thread, kThreads);
    do {
      if (cluster > device.max_cluster) return Loop(width, kThreads);
      config = Blocks(packets, per_thread, width, cluster);
      cluster *= 2;  // a slice of the row that fits into shared memory
    } while (!fits(config.block, kFewStages));
    // Several rows a block where there is room: fewer blocks, and fewer partial rows of dgamma.
    if (config.cluster == 1) config.block *= std::max(1, kSharedThreads / config.block);
  }
  const int unit = std::max(config.threads_per_row, kWarp);
  while (config.block > unit && !fits(config.block, kFewStages)) config.block -= unit;
  const bool single = config.block == config.threads_per_row;
  config.stages = single && fits(config.block, kManyStages) ? kManyStages : kFewStages;
  config.shared_memory = config.stages * config.block * stage_bytes;
  return config;
}

int UsableSMs(const Device& device, int margin) { return std::max(1, device.sm_count - std::max(0, margin)); }

int ResidentClusters(const Device& device, int cluster, int margin) {
  int log2 = 0;
  while (1 << (log2 + 1) < cluster) ++log2;
  const int sms = UsableSMs(device, margin);
  const int known = device.resident_clusters[log2];
  if (known > 0) return std::max(1, std::min(known, sms / cluster));
  // Clusters live within a GPC of 16 or more SMs: counted in sixteens, every one of them finds a place.
  return std::max(1, (sms >= 16 ? sms / 16 * 16 : sms) / cluster);
}

}  // namespace

LaunchConfig ConfigureForward(const Device& device, const Shape& shape, DType x, bool aligned, int margin) {
  LaunchConfig config = aligned ? AlignedForward(device, shape.hidden, static_cast<int>(16 / SizeOf(x)))
                                : Unaligned(device, shape.hidden, 128, 1024);
  const int64_t slots = config.block / config.threads_per_row;
  const int64_t items = CeilDiv(shape.groups * shape.rows, slots);
  // Without a margin the hardware scheduler deals out the rows; with one the grid is persistent.
  int64_t resident = kMaxGrid / config.cluster;
  if (margin > 0) {
    resident = config.cluster > 1 ? ResidentClusters(device, config.cluster, margin)
                                  : int64_t{UsableSMs(device, margin)} * std::max(1, 1024 / config.block);
  }
  config.grid = std::min(items, resident) * config.cluster;
  return config;
}

LaunchConfig ConfigureBackward(const Device& device, const Shape& shape, DType x, DType dy, bool aligned,
                               int64_t partial_rows, int margin) {
  const auto width = static_cast<int>(16 / std::min(SizeOf(x), SizeOf(dy)));
  LaunchConfig config = aligned
                            ? AlignedBackward(device, shape.hidden, width, width * (SizeOf(x) + SizeOf(dy)))
                            : Unaligned(device, shape.hidden, 256, 512);
  config.most_shared_memory = device.shared_memory - kOtherSharedMemory;
  const int64_t slots = config.block / config.threads_per_row;
  if (slots > 1) {
    // At the end the slots of a block add up their columns of dgamma in shared memory.
    config.shared_memory = std::max(config.shared_memory, slots * shape.hidden * 4);
  }

  const int blocks_per_sm = config.stages > 0 ? 1 : std::max(1, 512 / config.block);
  const int64_t resident = config.cluster > 1 ? ResidentClusters(device, config.cluster, margin)
                                              : int64_t{UsableSMs(device, margin)} * blocks_per_sm;
  const int64_t items = CeilDiv(shape.rows, slots);
  const int64_t wanted = std::max<int64_t>(1, resident / std::max<int64_t>(1, shape.groups));
  config.blocks_per_group =
      std::max<int64_t>(1, std::min({items, wanted, std::max<int64_t>(1, partial_rows)}));
  config.grid = std::min(resident, config.blocks_per_group * shape.groups) * config.cluster;
  return config;
}

}  // namespace jax_rmsnorm
