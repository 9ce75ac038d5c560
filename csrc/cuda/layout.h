// How rows are dealt out: what the launch configurations of the forward and the backward are made of.
#pragma once

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <numeric>

#include "config.h"

namespace jax_rmsnorm {

constexpr int kWarp = 32;
constexpr int64_t kFewBytes = 4 << 20;  // of x, where rows are few: one round of blocks, or hardly more
// Of all that a backward of few aligned rows reads, and reads again from the L2 cache.
constexpr int64_t kFewReadBytes = 24 << 20;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int NextPowerOfTwo(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int WholeWarps(int64_t threads) { return static_cast<int>(CeilDiv(threads, kWarp)) * kWarp; }

inline int UsableSMs(const Device& device, int margin) {
  return std::max(1, device.sm_count - std::max(0, margin));
}

// Blocks (or clusters) that run at the same time, a block an SM.
inline int ResidentBlocks(const Device& device, int cluster, int margin) {
  const int sms = UsableSMs(device, margin);
  if (cluster == 1) return sms;
  const int known = device.resident_clusters[cluster];
  if (known > 0) return std::max(1, std::min(known, sms / cluster));
  // Clusters live within a GPC of 16 or more SMs: counted in sixteens, every one of them finds a place.
  return std::max(1, (sms >= 16 ? sms / 16 * 16 : sms) / cluster);
}

// Where a row is no longer than a warp's registers allow, part of a warp takes it.
inline LaunchConfig Lanes(int64_t packets, int per_thread, int block) {
  LaunchConfig config;
  config.scope = Scope::kLanes;
  config.packets = per_thread;
  config.threads_per_row = NextPowerOfTwo(CeilDiv(packets, per_thread));
  config.block = block;
  return config;
}

// A row for one block.
inline LaunchConfig Block(int64_t packets, int per_thread) {
  LaunchConfig config;
  config.scope = Scope::kBlock;
  config.packets = per_thread;
  config.block = config.threads_per_row = WholeWarps(CeilDiv(packets, per_thread));
  return config;
}

// A row for a cluster of blocks.
inline LaunchConfig Cluster(int64_t packets, int per_thread, int cluster) {
  LaunchConfig config = Block(CeilDiv(packets, cluster), per_thread);
  config.scope = Scope::kCluster;
  config.cluster = cluster;
  return config;
}

// Blocks that a row of `packets` needs at most `per_thread` packets a thread and `threads` a block: a power
// of two.
inline int ClusterFor(int64_t packets, int per_thread, int threads) {
  return NextPowerOfTwo(CeilDiv(packets, int64_t{per_thread} * threads));
}

inline LaunchConfig Loop() {
  LaunchConfig config;
  config.scope = Scope::kLoop;
  config.block = config.threads_per_row = kMaxThreads;
  return config;
}

// Packets of a row of one shift or another: wherever it begins, it fits into them.
inline int64_t Windows(int64_t hidden, int width) { return CeilDiv(hidden - 1, width) + 1; }

// Windows of a row for part of a warp: as few as can be, by one of the numbers a lane for which there are
// kernels, and at least `least_lanes`. A sum takes as many lanes as windows have elements.
inline LaunchConfig WindowLanes(int64_t windows, std::initializer_list<int> per_lane, int least_lanes,
                                int width, int block) {
  LaunchConfig best;
  int least = INT_MAX;
  for (const int per_thread : per_lane) {
    LaunchConfig config = Lanes(windows, per_thread, block);
    config.threads_per_row = std::max(config.threads_per_row, least_lanes);
    if (config.threads_per_row > kWarp || per_thread * config.threads_per_row > least) continue;
    least = per_thread * config.threads_per_row;
    best = config;
  }
  best.width = width;
  return best;
}

// Few rows of windows: pairs of warps share what a warp has, but for strips of three with a tail, and where a
// block would have too many threads.
inline void ShareWindows(LaunchConfig* config) {
  const bool lanes = config->scope == Scope::kLanes;
  if (config->packets == 1 || (!lanes && (config->packets == 3 || config->block > kLanesThreads))) return;
  config->share = 2;
  config->packets = static_cast<int>(CeilDiv(config->packets, config->share));
  config->threads_per_row *= config->share;
  if (!lanes) config->block *= config->share;
}

// A slot that goes on by as many blocks, or a multiple of them, of `slots` each finds its rows of `hidden`
// elements to lie alike in packets of `width`.
inline int64_t BlocksAlike(int64_t hidden, int width, int64_t slots) {
  const int64_t rows = width / std::gcd(hidden, int64_t{width});
  return rows / std::gcd(rows, slots);
}

// Rows that are rotated, in packets of `width` elements. In halves, a thread has the packets that meet.
inline LaunchConfig RotaryLayout(int64_t hidden, int64_t width, const Fused& fused, int block) {
  const int64_t packets = hidden / width;
  LaunchConfig config = Lanes(packets, 2, block);
  if (!fused.interleaved) {
    config.threads_per_row = static_cast<int>(fused.rotary_width / 2 / width);
    config.packets = packets > 2 * config.threads_per_row ? 4 : 2;
    if (config.packets == 2 && fused.heads % 2 == 0) config.rows = 2;
  }
  config.width = static_cast<int>(width);
  return config;
}

// Slots of a block of `config`; with bulk copies a warp is in none.
inline int64_t SlotsOf(const LaunchConfig& config) {
  return config.method == Method::kBulk ? config.slots : config.block / config.threads_per_row;
}

// The nanoseconds that a turn of the persistent blocks of `config` takes at the least, of which some have a
// turn less than others: as long as it takes to move its part of `element_bytes` an element at `share` of the
// specified bandwidth, which is as much as the memory gives (measured on an H200 and an H100). What is not
// much larger than the L2 cache may come from there, faster, and is not held back.
inline uint32_t TurnTime(const Device& device, const Shape& shape, const LaunchConfig& config,
                         int64_t element_bytes, double share) {
  constexpr int kCaches = 4;
  const double bytes = static_cast<double>(shape.groups * shape.rows) * static_cast<double>(shape.hidden) *
                       static_cast<double>(element_bytes);
  if (device.memory_bandwidth <= 0 || bytes <= static_cast<double>(kCaches * device.l2_bytes)) return 0;
  const int64_t clusters = config.grid / config.cluster;
  const int64_t rows = SlotsOf(config) * config.rows;  // of a cluster's turn
  const int64_t turns = CeilDiv(shape.groups * config.blocks_per_group, clusters) *
                        CeilDiv(shape.rows, config.blocks_per_group * rows);
  return static_cast<uint32_t>(bytes / (share * device.memory_bandwidth) / static_cast<double>(turns));
}

// What both passes want of a ring.
struct Ring {
  int64_t packet_bytes;  // of all operands that are copied
  bool aligned;          // rows, to their packets
  int width;             // elements a packet
  int64_t room;
  bool add = false;

  // Turns that the ring of `config` copies ahead.
  int Ahead(const LaunchConfig& config) const {
    return config.rows > 1    ? kRotaryAhead[config.rows]
           : config.ahead > 0 ? config.ahead
                              : RowsAhead(config.scope, config.packets, add);
  }

  // Shared memory for one row of each slot of a block of `config`.
  int64_t PlaceBytes(const LaunchConfig& config) const {
    // Where rows are not aligned, and have several warps, each of those needs the packet behind its own.
    const int packets = config.block + (aligned || config.scope == Scope::kLanes ? 0 : config.block / kWarp);
    return config.packets * packets * packet_bytes;
  }

  // The same for all rows of the ring.
  int64_t Bytes(const LaunchConfig& config) const {
    return (Ahead(config) + 2) * config.rows * PlaceBytes(config);
  }

  // A row for one block, if it has room.
  bool PlaceBlock(int64_t packets, int per_thread, LaunchConfig* config) const {
    if (packets > per_thread * kMaxThreads) return false;
    *config = Block(packets, per_thread);
    return Bytes(*config) <= room;
  }

  // A row for as few blocks of a cluster as have room for it; for one, if that has.
  LaunchConfig PlaceCluster(const Device& device, int64_t packets, int per_thread) const {
    for (int cluster = ClusterFor(packets, per_thread, kMaxThreads); cluster <= device.max_cluster;
         cluster *= 2) {
      const LaunchConfig config = Cluster(packets, per_thread, cluster);
      if (Bytes(config) <= room) return config;
    }
    return Loop();
  }

  // As many rows a block as `threads` allow, and there is room for.
  void Fill(LaunchConfig* config, int threads) const {
    const int unit = std::max(config->threads_per_row, kWarp);
    if (config->scope != Scope::kCluster) config->block = std::max(1, threads / unit) * unit;
    while (config->block > unit && Bytes(*config) > room) config->block -= unit;
    config->method = Method::kRing;
    config->shared_memory = Bytes(*config);
  }
};

}  // namespace jax_rmsnorm
