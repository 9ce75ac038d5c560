#include "config.h"

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <numeric>

namespace jax_rmsnorm {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kFewBytes = 4 << 20;  // of x, where rows are few: one round of blocks, or hardly more
constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int NextPowerOfTwo(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int WholeWarps(int64_t threads) { return static_cast<int>(CeilDiv(threads, kWarp)) * kWarp; }

int UsableSMs(const Device& device, int margin) { return std::max(1, device.sm_count - std::max(0, margin)); }

// Blocks (or clusters) that run at the same time, a block an SM.
int ResidentBlocks(const Device& device, int cluster, int margin) {
  const int sms = UsableSMs(device, margin);
  if (cluster == 1) return sms;
  const int known = device.resident_clusters[cluster];
  if (known > 0) return std::max(1, std::min(known, sms / cluster));
  // Clusters live within a GPC of 16 or more SMs: counted in sixteens, every one of them finds a place.
  return std::max(1, (sms >= 16 ? sms / 16 * 16 : sms) / cluster);
}

// Where a row is no longer than a warp's registers allow, part of a warp takes it.
LaunchConfig Lanes(int64_t packets, int per_thread, int block) {
  LaunchConfig config;
  config.scope = Scope::kLanes;
  config.packets = per_thread;
  config.threads_per_row = NextPowerOfTwo(CeilDiv(packets, per_thread));
  config.block = block;
  return config;
}

// A row for one block.
LaunchConfig Block(int64_t packets, int per_thread) {
  LaunchConfig config;
  config.scope = Scope::kBlock;
  config.packets = per_thread;
  config.block = config.threads_per_row = WholeWarps(CeilDiv(packets, per_thread));
  return config;
}

// A row for a cluster of blocks.
LaunchConfig Cluster(int64_t packets, int per_thread, int cluster) {
  LaunchConfig config = Block(CeilDiv(packets, cluster), per_thread);
  config.scope = Scope::kCluster;
  config.cluster = cluster;
  return config;
}

// Packets of a row of one shift or another: wherever it begins, it fits into them.
int64_t Windows(int64_t hidden, int width) { return CeilDiv(hidden - 1, width) + 1; }

// Windows of a row for part of a warp: as few as can be, by one of the numbers a lane for which there are
// kernels. A sum takes as many lanes as windows have elements.
LaunchConfig WindowLanes(int64_t windows, std::initializer_list<int> per_lane, int width, int block) {
  LaunchConfig best;
  int least = INT_MAX;
  for (const int per_thread : per_lane) {
    LaunchConfig config = Lanes(windows, per_thread, block);
    config.threads_per_row = std::max(config.threads_per_row, width);
    if (config.threads_per_row > kWarp || per_thread * config.threads_per_row > least) continue;
    least = per_thread * config.threads_per_row;
    best = config;
  }
  best.width = width;
  return best;
}

// Few rows of windows: pairs of warps share what a warp has, but for strips of three with a tail.
void ShareWindows(LaunchConfig* config) {
  if (config->packets == 1 || (config->packets == 3 && config->scope != Scope::kLanes)) return;
  config->share = 2;
  config->packets = static_cast<int>(CeilDiv(config->packets, config->share));
  config->threads_per_row *= config->share;
  if (config->scope != Scope::kLanes) config->block *= config->share;
}

// Bytes of shared memory in which they exchange `rows` sums one after another.
int64_t ExchangeBytes(const LaunchConfig& config, int rows) {
  return config.share == 1 ? 0 : int64_t{rows} * config.block * config.width * 4;
}

// A slot that goes on by as many blocks, or a multiple of them, of `slots` each finds its rows of `hidden`
// elements to lie alike in packets of `width`.
int64_t BlocksAlike(int64_t hidden, int width, int64_t slots) {
  const int64_t rows = width / std::gcd(hidden, int64_t{width});
  return rows / std::gcd(rows, slots);
}

// So many blocks, or a few less where rows then lie alike in all turns: others read gamma again and again.
int64_t AlikeIfNear(int64_t blocks, int64_t hidden, int width, int64_t slots) {
  const int64_t alike = BlocksAlike(hidden, width, slots), fewer = blocks / alike * alike;
  return 8 * fewer >= 7 * blocks ? fewer : blocks;
}

// A row that a block stages in shared memory.
LaunchConfig Staged(int64_t hidden, int width, DType x) {
  constexpr int64_t kLeast = kStripWindows;
  const int64_t packets = CeilDiv(hidden, width);
  LaunchConfig config = Block(packets, static_cast<int>(std::max(kLeast, CeilDiv(packets, kMaxThreads))));
  config.method = Method::kStaged;
  config.width = width;
  config.shared_memory = StageBytes(hidden * SizeOf(x));
  return config;
}

LaunchConfig Loop() {
  LaunchConfig config;
  config.scope = Scope::kLoop;
  config.block = config.threads_per_row = kMaxThreads;
  return config;
}

// Blocks that a row of `packets` needs at most `per_thread` packets a thread and `threads` a block: a power
// of two.
int ClusterFor(int64_t packets, int per_thread, int threads) {
  return NextPowerOfTwo(CeilDiv(packets, int64_t{per_thread} * threads));
}

// What both passes want of a ring.
struct Ring {
  int64_t packet_bytes;  // of all operands that are copied
  int64_t access;        // bytes of a packet of the narrowest one
  bool aligned;          // rows, to their packets
  int width;             // elements a packet
  int64_t room;
  bool add = false;

  // Shared memory for one row of each slot of a block of `config`.
  int64_t PlaceBytes(const LaunchConfig& config) const {
    // Where rows are not aligned, and have several warps, each of those needs the packet behind its own.
    const int packets = config.block + (aligned || config.scope == Scope::kLanes ? 0 : config.block / kWarp);
    return config.packets * packets * packet_bytes;
  }

  // The same for all rows of the ring.
  int64_t Bytes(const LaunchConfig& config) const {
    const int ahead = config.rows > 1    ? kRotaryAhead[config.rows]
                      : config.ahead > 0 ? config.ahead
                                         : RowsAhead(config.scope, config.packets * access / 16, add);
    return (ahead + 2) * config.rows * PlaceBytes(config);
  }

  // A row for one block, if it has room.
  bool PlaceBlock(int64_t packets, int per_thread, LaunchConfig* config) const {
    if (packets > per_thread * kMaxThreads) return false;
    *config = Block(packets, per_thread);
    return Bytes(*config) <= room;
  }

  // A row for as few blocks of a cluster as have room for it.
  LaunchConfig PlaceCluster(const Device& device, int64_t packets, int per_thread) const {
    if (device.max_cluster == 1) return Loop();
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

LaunchConfig ForwardLayout(const Device& device, const Ring& ring, int64_t packets) {
  constexpr int kPerThread = 4;
  constexpr int kBlock = 128;  // for rows shorter than a warp's registers
  if (packets <= 2) return Lanes(packets, 1, kBlock);
  LaunchConfig config = Lanes(packets, packets <= 8 ? 2 : kPerThread, kBlock);
  if (packets <= kPerThread * kWarp) {
    const LaunchConfig three = Lanes(packets, 3, kBlock);
    return 3 * three.threads_per_row < config.packets * config.threads_per_row ? three : config;
  }
  if (ring.PlaceBlock(packets, kPerThread, &config)) return config;
  config = ring.PlaceCluster(device, packets, kPerThread);
  if (config.scope == Scope::kCluster && config.block <= kSmallBlock) config.ahead = 2;
  return config;
}

// Many rows of windows for clusters of blocks, several of which an SM has place for: the clusters of which
// most find a place, larger ones only if a tenth more do. Their number is the grid's, in clusters.
LaunchConfig WindowCluster(const Device& device, int64_t hidden, int width, int64_t windows, int per_sm,
                           int margin) {
  LaunchConfig best = Loop();
  for (int cluster = 2; cluster <= device.max_cluster; ++cluster) {
    LaunchConfig config = Cluster(windows, kStripWindows, cluster);
    if (config.block > kWindowRingThreads<Scope::kCluster>) continue;
    const int layers = margin > 0 ? 1 : per_sm / config.block;
    config.grid = AlikeIfNear(int64_t{ResidentBlocks(device, cluster, margin)} * layers, hidden, width, 1);
    if (10 * config.grid > 11 * best.grid) best = config;
  }
  best.method = Method::kRing;
  best.width = width;
  return best;
}

// Rows that are not aligned to 16 bytes: in narrower packets, as far as rows are aligned to them and fit into
// the registers of a block; others lie in windows. Those are in the registers of a block or less, or, longer
// ones, staged in shared memory, or in the registers of a cluster of blocks.
LaunchConfig UnalignedForwardLayout(const Device& device, int64_t rows, int64_t hidden, int wide, DType x,
                                    int64_t room, bool wide_gamma, int margin) {
  constexpr int kLanesBlock = kWindowsThreads<Scope::kLanes>;
  const int64_t most_staged = wide_gamma ? 0 : 48 * 1024;  // bytes of a row of many: several on an SM
  const auto narrow = static_cast<int>(std::gcd(hidden, int64_t{wide}));
  const int many = ForwardPackets(narrow, SizeOf(x));
  const int64_t packets = hidden / narrow, windows = Windows(hidden, wide);
  if (narrow > 1 && packets <= many * kMaxThreads) {
    LaunchConfig config = packets <= kStripWindows * kWarp ? Lanes(packets, kStripWindows, kLanesBlock)
                          : packets <= many * kWarp        ? Lanes(packets, many, kLanesBlock)
                                                           : Block(packets, many);
    config.width = narrow;
    return config;
  }
  LaunchConfig config;
  const bool few = rows * hidden * SizeOf(x) <= kFewBytes;
  const int per_sm = WindowsPerSM(wide_gamma, kStripWindows);
  // Two blocks on an SM, or more.
  if (windows <= kStripWindows * std::min(per_sm / 2, kWindowRingThreads<Scope::kBlock>)) {
    config = windows <= kLaneWindows * kWarp
                 ? WindowLanes(windows, {1, 2, 3, 4, kLaneWindows}, wide, kLanesBlock)
                 : Block(windows, kStripWindows);
    config.method = few ? Method::kWindows : Method::kRing;
    config.width = wide;
    if (few) {
      ShareWindows(&config);
      config.shared_memory = ExchangeBytes(config, 2);
    }
    return config;
  }
  const int cluster = std::max(2, ClusterFor(windows, kStripWindows, kMaxThreads));
  LaunchConfig at_once = Loop();
  if (cluster <= device.max_cluster) {
    at_once = Cluster(windows, kStripWindows, cluster);
    at_once.method = Method::kWindows;
    at_once.width = wide;
  }
  // Two rounds of clusters end sooner than one of blocks.
  const bool two_rounds = rows * cluster <= int64_t{2} * device.sm_count;
  if (at_once.scope == Scope::kCluster && (few || two_rounds)) return at_once;
  config = Staged(hidden, wide, x);
  if (config.shared_memory > most_staged) {
    const LaunchConfig ring = WindowCluster(device, hidden, wide, windows, per_sm, margin);
    if (ring.scope == Scope::kCluster) return ring;
  }
  return config.shared_memory <= room ? config : at_once;
}

// With an addend no block is persistent: a row is the hardware's to deal out, whatever the margin.
LaunchConfig AddLayout(const Device& device, const Ring& ring, int64_t hidden, DType x,
                       int64_t most_packets) {
  if (!ring.aligned) return Loop();
  const int64_t packets = hidden / ring.width;
  LaunchConfig config =
      packets <= most_packets ? ForwardLayout(device, ring, packets) : Staged(hidden, ring.width, x);
  if (config.shared_memory > ring.room) config = Loop();
  config.width = ring.width;
  return config;
}

// Rows that are rotated, in packets of `width` elements. In halves, a thread has the packets that meet.
LaunchConfig RotaryLayout(int64_t hidden, int64_t width, const Fused& fused, int block) {
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

// Rows that are not aligned to 16 bytes: in packets of 8 where they are aligned to these and of one dtype,
// else in windows.
LaunchConfig UnalignedBackwardLayout(const Device& device, Ring* ring, int64_t hidden, bool one_dtype,
                                     int margin) {
  const int narrow = ring->width / 2;
  if (one_dtype && hidden % narrow == 0) {
    constexpr int kPerThread = 4;
    const int64_t packets = hidden / narrow;
    *ring = {ring->packet_bytes / 2, ring->access / 2, true, narrow, ring->room};
    if (packets <= kPerThread * kWarp) return Lanes(packets, kPerThread, kWarp);
    LaunchConfig config;
    if (ring->PlaceBlock(packets, kPerThread, &config)) return config;
    return ring->PlaceCluster(device, packets, kPerThread);
  }
  const int64_t windows = Windows(hidden, ring->width);
  if (windows <= kStripWindows * kWarp) return WindowLanes(windows, {1, 2, 3, 4}, ring->width, kWarp);
  // Three windows a lane leave more warps to an SM, four may make room for another row.
  LaunchConfig config = Block(windows, 3);
  const LaunchConfig four = Block(windows, 4);
  if (kLanesThreads / four.block > kLanesThreads / config.block) config = four;
  if (config.block <= kLanesThreads && ring->Bytes(config) <= ring->room) return config;
  // Of the clusters that are large enough those of which most find a place.
  LaunchConfig best = Loop();
  int most = 0;
  for (int cluster = 2; cluster <= device.max_cluster; ++cluster) {
    config = Cluster(windows, 3, cluster);
    if (config.block > kMaxThreads || ring->Bytes(config) > ring->room) continue;
    const int count = ResidentBlocks(device, cluster, margin);
    if (count > most) best = config;
    most = std::max(most, count);
  }
  return best;
}

LaunchConfig BackwardLayout(const Device& device, const Ring& ring, int64_t packets) {
  constexpr int kMostForThree = 88;  // packets of a warp's row that two warps do not read as fast
  constexpr int kLeastForTwo = 320, kMostForTwo = 8;
  LaunchConfig config = Lanes(packets, packets == 1 ? 1 : 2, kWarp);
  const LaunchConfig fewer_idle = Lanes(packets, 3, kWarp);
  if (packets <= kMostForThree && 3 * fewer_idle.threads_per_row < 2 * config.threads_per_row)
    config = fewer_idle;
  if (config.threads_per_row <= kWarp) return config;
  if (ring.PlaceBlock(packets, 2, &config)) return config;
  config = ring.PlaceCluster(device, packets, 2);
  // Three packets a thread only instead of blocks with few threads, or of very many blocks.
  const LaunchConfig three = ring.PlaceCluster(device, packets, 3);
  if (config.scope == Scope::kLoop) return three;
  const bool crumbs = config.block < kLeastForTwo || config.cluster > kMostForTwo;
  return crumbs && three.scope == Scope::kCluster && three.block > config.block ? three : config;
}

// Whether rows are so few that dx and dgamma are better computed side by side: all of x and dy stays in the
// L2 cache, a tile of dgamma has few rows for each of its threads, and the blocks find room, two on an SM;
// clusters of larger ones in two rounds.
bool AreFew(const Device& device, const Shape& shape, DType x, const LaunchConfig& config, bool windows) {
  const int64_t rows = shape.groups * shape.rows, places = int64_t{2} * device.sm_count;
  if (windows && config.cluster > 1) {
    const int64_t tiles = CeilDiv(shape.hidden, int64_t{kMostTilePackets} * config.width) * shape.groups;
    const int64_t resident = ResidentBlocks(device, config.cluster, 0);
    if (rows + CeilDiv(tiles, config.cluster) > 2 * resident) return false;
  }
  return rows * shape.hidden * SizeOf(x) <= kFewBytes && shape.rows <= 4 * config.block &&
         (config.cluster == 1 || rows * config.cluster <= places) &&
         shape.hidden <= places * kMostTilePackets * config.width;
}

// The tiles of dgamma: as wide as is read best, but wider where not every tile has an SM, and narrower, as
// long as every one has, where that leaves fewer rows to each thread.
void TileDgamma(const Device& device, const Shape& shape, LaunchConfig* config) {
  constexpr int kUsual = 8, kRowsPerThread = 2;
  const auto tiles = [&](int packets) { return CeilDiv(shape.hidden, int64_t{config->width} * packets); };
  const auto an_sm_each = [&](int packets) { return shape.groups * tiles(packets) <= device.sm_count; };
  int packets = kUsual;
  while (packets < kMostTilePackets && !an_sm_each(packets)) packets *= 2;
  while (packets > kLeastTilePackets && an_sm_each(packets / 2) &&
         shape.rows * packets > int64_t{kRowsPerThread} * config->block) {
    packets /= 2;
  }
  config->tile_packets = packets;
  config->tiles = tiles(packets);
}

}  // namespace

LaunchConfig ConfigureForward(const Device& device, const Shape& shape, DType x, DType gamma,
                              Alignment alignment, int margin, const Fused& fused) {
  // Packets of a row that a block of ForwardKernel can have and be no more than a quarter of an SM. Where
  // there are no more rows than SMs, longer ones have an SM each, and the same bits without the way through
  // shared memory.
  constexpr int64_t kMostPackets = 1024;
  const bool an_sm_each = shape.groups * shape.rows <= UsableSMs(device, margin);
  constexpr int kRotaryBlock = 128;
  const auto width = static_cast<int>(16 / SizeOf(x));
  const int64_t room = device.shared_memory - kOtherSharedMemory;
  const Ring ring{width * SizeOf(x), 16, alignment == Alignment::kRows, width, room};
  LaunchConfig config;
  if (fused.fusion == Fusion::kRotary) {
    config = RotaryLayout(shape.hidden, width, fused, margin > 0 ? kFusedThreads : kRotaryBlock);
  } else if (fused.fusion == Fusion::kAdd) {
    config = AddLayout(device, ring, shape.hidden, x, kMostPackets);
  } else if (ring.aligned) {
    config = ForwardLayout(device, ring, shape.hidden / width);
    config.width = width;
    const bool one_block = config.scope == Scope::kLanes || config.scope == Scope::kBlock;
    if (config.scope == Scope::kCluster || (one_block && margin > 0)) {
      ring.Fill(&config, kMaxThreads);
    } else if (one_block && shape.hidden / width > kMostPackets && !an_sm_each) {
      config = Staged(shape.hidden, width, x);
    }
  } else if (alignment == Alignment::kTensors) {
    config = UnalignedForwardLayout(device, shape.groups * shape.rows, shape.hidden, width, x, room,
                                    SizeOf(gamma) > SizeOf(x), margin);
  } else {
    config = Loop();
  }
  config.aligned = ring.aligned;
  config.most_shared_memory = room;
  const int64_t slots = config.block / config.threads_per_row;
  if (config.method == Method::kRing && ring.aligned) {
    const int64_t resident = ResidentBlocks(device, config.cluster, margin);
    config.blocks_per_group = std::max<int64_t>(
        1, std::min(CeilDiv(shape.rows, slots), resident / std::max<int64_t>(1, shape.groups)));
    config.grid = std::min(resident, config.blocks_per_group * shape.groups) * config.cluster;
  } else {  // the hardware scheduler deals out the rows, unless SMs are to be left alone
    int64_t most = std::max<int64_t>(1, (margin > 0 ? UsableSMs(device, margin) : kMaxGrid) / config.cluster);
    if (config.method == Method::kRing) {  // rows that are not aligned, in several blocks an SM
      config.shared_memory = 2 * ring.PlaceBytes(config);
      const int threads = WindowsPerSM(SizeOf(gamma) > SizeOf(x), config.packets);
      if (config.scope == Scope::kCluster) {
        most = config.grid;
      } else {
        if (margin == 0) most = int64_t{device.sm_count} * (threads / config.block);
        most = AlikeIfNear(most, shape.hidden, width, slots);
      }
    }
    config.grid = std::min(CeilDiv(shape.groups * shape.rows, slots * config.rows), most) * config.cluster;
    config.dependent = device.dependent_launch;
  }
  return config;
}

LaunchConfig ConfigureBackward(const Device& device, const Shape& shape, DType x, DType dy,
                               Alignment alignment, int64_t partial_rows, int margin, const Fused& fused) {
  const auto width = static_cast<int>(16 / std::min(SizeOf(x), SizeOf(dy)));
  const int64_t room = device.shared_memory - kOtherSharedMemory;
  const bool add = fused.fusion == Fusion::kAdd, rotary = fused.fusion == Fusion::kRotary;
  const bool aligned = alignment == Alignment::kRows;
  const int64_t element_bytes = SizeOf(x) * (add ? 2 : 1) + SizeOf(dy) * fused.gradients;
  Ring ring{width * element_bytes, 16, aligned, width, room, add};
  LaunchConfig config;
  if (rotary) {
    config = RotaryLayout(shape.hidden, width, fused, kWarp);
  } else if (aligned) {
    config = BackwardLayout(device, ring, shape.hidden / width);
  } else if (alignment == Alignment::kTensors && !add) {
    config = UnalignedBackwardLayout(device, &ring, shape.hidden, x == dy, margin);
  } else {
    config = Loop();
  }
  config.aligned = aligned;
  config.width = config.scope == Scope::kLoop && !aligned ? 1 : ring.width;
  config.most_shared_memory = room;

  const bool lanes = config.scope == Scope::kLanes;
  // Where a row takes fewer threads of a block, the others are for dgamma alone.
  LaunchConfig few = config;
  if (!ring.aligned && few.scope != Scope::kLoop) ShareWindows(&few);
  few.block = few.scope == Scope::kCluster ? few.threads_per_row : std::max(few.threads_per_row, kFewThreads);
  if (!rotary && config.scope != Scope::kLoop && margin == 0 &&
      AreFew(device, shape, x, few, !ring.aligned)) {
    config = few;
    config.method = Method::kFew;
    config.dependent = device.dependent_launch;
    config.shared_memory = ExchangeBytes(config, 1);
    if (partial_rows > 0) TileDgamma(device, shape, &config);
    const int64_t rows = shape.groups * shape.rows, tiles = config.tiles * shape.groups;
    // Where every row can have a block to itself, it is done sooner.
    if (lanes || (config.cluster == 1 && rows + tiles > int64_t{2} * device.sm_count)) {
      config.slots = config.block / config.threads_per_row;
    }
    config.grid = (CeilDiv(tiles, config.cluster) + CeilDiv(rows, config.slots)) * config.cluster;
    return config;
  }

  const bool windows = config.scope != Scope::kLoop && !ring.aligned;
  if (config.scope != Scope::kLoop) ring.Fill(&config, lanes || windows ? kLanesThreads : kMaxThreads);
  const int64_t slots = config.block / config.threads_per_row;
  if (slots > 1) {
    // At the end the slots of a block add up their columns of dgamma in shared memory.
    config.shared_memory = std::max(config.shared_memory, slots * shape.hidden * 4);
  }
  const int64_t resident = ResidentBlocks(device, config.cluster, margin);
  const int64_t items = CeilDiv(shape.rows, slots * config.rows);
  const int64_t wanted = std::max<int64_t>(1, resident / std::max<int64_t>(1, shape.groups));
  const int64_t most = partial_rows == 0 ? shape.rows : partial_rows;
  config.blocks_per_group = std::max<int64_t>(1, std::min({items, wanted, most}));
  // Several clusters of a group take rows of all shifts, other blocks those that lie alike.
  const bool sorted = config.scope == Scope::kCluster && config.blocks_per_group > 1;
  if (windows && !sorted && config.blocks_per_group < items) {
    const int64_t alike = BlocksAlike(shape.hidden, ring.width, slots);
    config.blocks_per_group = std::min(items, std::max(alike, config.blocks_per_group / alike * alike));
    if (config.blocks_per_group > most) {  // not what JAX's side asks for
      return ConfigureBackward(device, shape, x, dy, Alignment::kNone, partial_rows, margin, fused);
    }
  }
  config.grid = std::min(resident, config.blocks_per_group * shape.groups) * config.cluster;
  return config;
}

bool FusesRotary(int64_t hidden, int64_t size, const Fused& fused, bool backward) {
  const int64_t width = 16 / size;
  if (hidden % width != 0) return false;
  if (fused.interleaved) return fused.rotary_width % width == 0 && hidden <= 2 * kWarp * width;
  if (fused.rotary_width % (2 * width) != 0) return false;
  const int64_t threads = fused.rotary_width / 2 / width, packets = hidden / width;
  return threads >= 1 && threads <= kWarp && NextPowerOfTwo(threads) == threads &&
         packets <= (backward ? 2 : 4) * threads;
}

}  // namespace jax_rmsnorm
