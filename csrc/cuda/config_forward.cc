#include "layout.h"

namespace jax_rmsnorm {
namespace {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

// So many blocks, or a few less where rows then lie alike in all turns: others read gamma again and again.
int64_t AlikeIfNear(int64_t blocks, int64_t hidden, int width, int64_t slots) {
  const int64_t alike = BlocksAlike(hidden, width, slots), fewer = blocks / alike * alike;
  return 8 * fewer >= 7 * blocks ? fewer : blocks;
}

// Packets of an aligned row that a block of ForwardKernel can have and be no more than a quarter of an SM.
constexpr int64_t kMostPackets = 1024;

// A row that a block stages in shared memory.
LaunchConfig Staged(int64_t hidden, int width, DType x) {
  LaunchConfig config = Block(CeilDiv(hidden, width), kStripWindows);
  config.block = config.threads_per_row = std::min(config.block, kMaxThreads);
  config.method = Method::kStaged;
  config.width = width;
  config.shared_memory = StageBytes(hidden * SizeOf(x));
  return config;
}

LaunchConfig ForwardLayout(const Device& device, const Ring& ring, int64_t packets) {
  constexpr int kPerThread = 4;
  constexpr int kBlock = 128;  // for rows shorter than a warp's registers
  if (packets <= 2) return Lanes(packets, 1, kBlock);
  LaunchConfig config = Lanes(packets, packets <= 8 ? 2 : kPerThread, kBlock);
  if (packets <= kPerThread * kWarp) {
    const LaunchConfig three = Lanes(packets, 3, kBlock);
    return 3 * three.threads_per_row < config.packets * config.threads_per_row ? three : config;
  }
  if (packets <= kMostPackets && ring.PlaceBlock(packets, kPerThread, &config)) return config;
  config = ring.PlaceCluster(device, packets, kPerThread);
  if (config.scope == Scope::kCluster && config.block <= kSmallBlock) config.ahead = 2;
  return config;
}

// How the long rows that ForwardLayout gave a cluster, or a block alone, get there: few straight into
// registers; many by way of shared memory, those of a cluster as long as an SM has room for three; longer
// ones, and all with a margin, by a ring. The bits are the same.
void ChooseLong(const Device& device, const Ring& ring, int64_t rows, int64_t hidden, DType x,
                bool wide_gamma, int margin, LaunchConfig* config) {
  constexpr int64_t kMostStaged = 24 * 1024;  // elements
  // Of blocks, as many as there are SMs, each of which has room for two or more.
  const int64_t rounds = wide_gamma || config->cluster > 2 ? 4 : 8;
  if (margin == 0 && rows * config->cluster <= rounds * device.sm_count) return;
  const int stages = config->cluster == 1 ? 1 : 3;
  const int64_t stage = StageBytes(hidden * SizeOf(x)) + kOtherSharedMemory;
  if (margin == 0 && hidden <= kMostStaged && stages * stage <= device.shared_memory) {
    *config = Staged(hidden, config->width, x);
  } else {
    ring.Fill(config, kMaxThreads);
  }
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
                 ? WindowLanes(windows, {1, 2, 3, 4, kLaneWindows}, wide, wide, kLanesBlock)
                 : Block(windows, kStripWindows);
    config.method = few ? Method::kWindows : Method::kRing;
    config.width = wide;
    if (few) {
      ShareWindows(&config);
      // In one half a row's sums are exchanged, and in the other the next one's.
      if (config.share > 1) config.shared_memory = int64_t{2} * config.block * wide * 4;
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
LaunchConfig AddLayout(const Device& device, const Ring& ring, int64_t hidden, DType x) {
  if (!ring.aligned) return Loop();
  const int64_t packets = hidden / ring.width;
  LaunchConfig config =
      packets <= kMostPackets ? ForwardLayout(device, ring, packets) : Staged(hidden, ring.width, x);
  if (config.shared_memory > ring.room) config = Loop();
  config.width = ring.width;
  return config;
}

// Many rows two at a time for each slot of a small block, few one at a time.
LaunchConfig RotaryForwardLayout(int64_t rows, int64_t hidden, int64_t width, const Fused& fused,
                                 int margin) {
  constexpr int64_t kMany = 64 * 1024;
  constexpr int kBlock = 128, kBlockOfPairs = 64;
  LaunchConfig config = RotaryLayout(hidden, width, fused, margin > 0 ? kFusedThreads : kBlock);
  if (config.rows == 2 && rows <= kMany) config.rows = 1;
  if (config.rows == 2 && margin == 0) config.block = kBlockOfPairs;
  return config;
}

}  // namespace

LaunchConfig ConfigureForward(const Device& device, const Shape& shape, DType x, DType gamma, DType y,
                              Alignment alignment, int margin, const Fused& fused) {
  const int64_t rows = shape.groups * shape.rows;
  const bool wide_gamma = SizeOf(gamma) > SizeOf(x);
  const auto width = static_cast<int>(16 / SizeOf(x));
  const int64_t room = device.shared_memory - kOtherSharedMemory;
  const Ring ring{width * SizeOf(x), alignment == Alignment::kRows, width, room};
  LaunchConfig config;
  if (fused.fusion == Fusion::kRotary) {
    config = RotaryForwardLayout(rows, shape.hidden, width, fused, margin);
  } else if (fused.fusion == Fusion::kAdd) {
    config = AddLayout(device, ring, shape.hidden, x);
  } else if (ring.aligned) {
    config = ForwardLayout(device, ring, shape.hidden / width);
    config.width = width;
    if (config.scope == Scope::kCluster) {
      ChooseLong(device, ring, rows, shape.hidden, x, wide_gamma, margin, &config);
    } else if (config.scope != Scope::kLoop && margin > 0) {
      ring.Fill(&config, kMaxThreads);
    }
  } else if (alignment == Alignment::kTensors) {
    config = UnalignedForwardLayout(device, rows, shape.hidden, width, x, room, wide_gamma, margin);
  } else {
    config = Loop();
  }
  config.aligned = ring.aligned;
  config.most_shared_memory = room;
  const int64_t slots = SlotsOf(config);
  if (config.method == Method::kRing && ring.aligned) {
    const int64_t resident = ResidentBlocks(device, config.cluster, margin);
    config.blocks_per_group = std::max<int64_t>(
        1, std::min(CeilDiv(shape.rows, slots), resident / std::max<int64_t>(1, shape.groups)));
    constexpr double kShare = 0.815;  // of the bandwidth, for a read and a write
    config.grid = std::min(resident, config.blocks_per_group * shape.groups) * config.cluster;
    config.turn_ns = TurnTime(device, shape, config, SizeOf(x) + SizeOf(y), kShare);
  } else {  // the hardware scheduler deals out the rows, unless SMs are to be left alone
    int64_t most = std::max<int64_t>(1, (margin > 0 ? UsableSMs(device, margin) : kMaxGrid) / config.cluster);
    if (config.method == Method::kRing) {  // rows that are not aligned, in several blocks an SM
      constexpr int kRows = 2;             // one is copied while the other is worked on
      config.shared_memory = kRows * ring.PlaceBytes(config);
      const int threads = WindowsPerSM(wide_gamma, config.packets);
      if (config.scope == Scope::kCluster) {
        most = config.grid;
      } else {
        if (margin == 0) most = int64_t{device.sm_count} * (threads / config.block);
        most = AlikeIfNear(most, shape.hidden, width, slots);
      }
    }
    config.grid = std::min(CeilDiv(rows, slots * config.rows), most) * config.cluster;
    config.more_registers = config.method == Method::kPlain && fused.fusion == Fusion::kNone &&
                            config.grid * config.block <= int64_t{kMaxThreads} * device.sm_count;
    config.dependent = device.dependent_launch;
  }
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
