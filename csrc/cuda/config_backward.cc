#include "layout.h"

namespace jax_rmsnorm {
namespace {

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
  constexpr int kLeastForTwo = 320, kMostForTwo = 8;
  LaunchConfig config = Lanes(packets, packets == 1 ? 1 : 2, kWarp);
  const LaunchConfig fewer_idle = Lanes(packets, 3, kWarp);
  if (3 * fewer_idle.threads_per_row < 2 * config.threads_per_row) config = fewer_idle;
  if (config.threads_per_row <= kWarp) return config;
  if (ring.PlaceBlock(packets, 2, &config)) return config;
  config = ring.PlaceCluster(device, packets, 2);
  // Three packets a thread only instead of blocks with few threads, or of very many blocks.
  const LaunchConfig three = ring.PlaceCluster(device, packets, 3);
  if (config.scope == Scope::kLoop) return three;
  const bool crumbs = config.block < kLeastForTwo || config.cluster > kMostForTwo;
  return crumbs && three.scope == Scope::kCluster && three.block > config.block ? three : config;
}

// Whether rows are so few that dx and dgamma are better computed side by side: all that is read, of
// `element_bytes` for each element, stays in the L2 cache, a tile of dgamma has few rows for each of its
// threads, and the blocks find room, two on an SM. Clusters may take two rounds, but for windows, whose tiles
// take longer, and for several gradients of y, of which a round reads more than it saves.
bool AreFew(const Device& device, const Shape& shape, DType x, int64_t element_bytes, bool windows,
            int gradients, const LaunchConfig& config) {
  const int64_t rows = shape.groups * shape.rows, places = int64_t{2} * device.sm_count;
  if (windows && config.cluster > 1) {
    const int64_t tiles = CeilDiv(shape.hidden, int64_t{kMostTilePackets} * config.width) * shape.groups;
    const int64_t resident = ResidentBlocks(device, config.cluster, 0);
    if (rows + CeilDiv(tiles, config.cluster) > 2 * resident) return false;
  }
  const int64_t elements = rows * shape.hidden, rounds = windows || gradients > 1 ? 1 : 2;
  const bool cached = windows ? elements * SizeOf(x) <= kFewBytes : elements * element_bytes <= kFewReadBytes;
  return cached && shape.rows <= 4 * config.block &&
         (config.cluster == 1 || rows * config.cluster <= rounds * places) &&
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
      AreFew(device, shape, x, element_bytes, !ring.aligned, fused.gradients, few)) {
    config = few;
    config.method = Method::kFew;
    config.dependent = device.dependent_launch;
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
  if (config.scope != Scope::kLoop && aligned) {  // others do not ask for that much
    constexpr double kShare = 0.88;               // of the bandwidth, for two reads and a write
    const int64_t moved = element_bytes + (add && !fused.gradient_of_h ? 0 : SizeOf(x));
    config.turn_ns = TurnTime(device, shape, config, moved, kShare);
  }
  return config;
}

}  // namespace jax_rmsnorm
