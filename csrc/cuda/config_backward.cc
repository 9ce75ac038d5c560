#include "layout.h"

namespace jax_rmsnorm {
namespace {

// What bulk copies bring for one block: `slots` rows side by side, or a block's part of one, of x and of dy.
struct BulkPlaces {
  BulkPlaces(const LaunchConfig& config, int64_t slots, int64_t hidden, int width, DType x, DType dy,
             int64_t room) {
    constexpr int64_t kInFlight = 128 * 1024;
    const int64_t strips = int64_t{config.threads_per_row} * config.packets * width;
    const int64_t elements = slots * (config.cluster == 1 ? hidden : strips);
    // Wherever in a line they begin, and one more in front.
    const auto lines = [&](DType type) {
      return CeilDiv(elements * SizeOf(type) + kLine, kLine) * kLine + kLine;
    };
    x_bytes = lines(x);
    bytes = x_bytes + lines(dy);
    // Of the last place words behind the row are read too.
    beyond = int64_t{kWarp} * config.packets * width * SizeOf(dy) + kLine;
    read = config.scope == Scope::kLanes ? 1 : 2;
    count = std::min({int64_t{kMostPlaces}, read + CeilDiv(kInFlight, bytes), (room - beyond) / bytes});
  }

  // Whether at least `ahead` are filled while others are read.
  bool Suffice(int64_t ahead) const { return count >= read + ahead; }

  int64_t bytes, x_bytes;  // of a place, of which x has the first ones
  int64_t beyond;
  int64_t read;  // places that are read at the same time
  int64_t count;
};

// Rows that are not aligned to 16 bytes, in windows. Whether they are many or few, and however they are
// copied, it is the same for a device.
LaunchConfig UnalignedBackwardLayout(const Device& device, const Ring& ring, int64_t hidden, DType x,
                                     DType dy, int margin) {
  const int width = ring.width;
  const int64_t windows = Windows(hidden, width);
  if (windows <= kStripWindows * kWarp) return WindowLanes(windows, {1, 2, 3, 4}, 8, width, kWarp);
  const auto fits = [&](const LaunchConfig& config) {
    if (!device.bulk_copies) return config.block <= kLanesThreads && ring.Bytes(config) <= ring.room;
    return config.block <= BulkThreads(config.packets) &&
           BulkPlaces(config, 1, hidden, width, x, dy, ring.room).Suffice(1);
  };
  LaunchConfig best = Loop();
  int most_slots = 0;
  for (const int packets : {2, 3, 4}) {  // of which most rows find a place in a block
    const LaunchConfig config = Block(windows, packets);
    const int slots = (device.bulk_copies ? BulkThreads(packets) : kLanesThreads) / config.block;
    // Four need the registers of fewer threads, which bulk copies leave no room for.
    if (slots <= most_slots || !fits(config) || (packets == 4 && device.bulk_copies)) continue;
    best = config;
    most_slots = slots;
  }
  if (best.scope == Scope::kBlock) return best;
  int64_t most = 0;
  // Of the clusters that are large enough those of which most blocks find a place, unless these are small.
  constexpr int kLeastThreads = 12 * kWarp;
  for (int cluster = 2; cluster <= device.max_cluster; ++cluster) {
    const LaunchConfig config = Cluster(windows, 3, cluster);
    if (!fits(config)) continue;
    const int64_t blocks = int64_t{ResidentBlocks(device, cluster, margin)} * cluster;
    const int64_t threads = blocks * std::min(config.block, kLeastThreads);
    if (threads > most) best = config;
    most = std::max(most, threads);
  }
  return best;
}

// Many rows in windows, as UnalignedBackwardLayout gave them to one slot, by bulk copies: as many slots as
// find a place, and the warp that copies.
void FillBulk(int64_t hidden, DType x, DType dy, int64_t room, LaunchConfig* config) {
  constexpr int64_t kAhead = 2;  // rather than another slot
  const int of_warp = std::max(1, kWarp / config->threads_per_row);
  int slots = config->scope == Scope::kCluster ? 1 : BulkThreads(config->packets) / config->threads_per_row;
  slots -= slots % of_warp;
  const auto places_of = [&](int n) { return BulkPlaces(*config, n, hidden, config->width, x, dy, room); };
  BulkPlaces places = places_of(slots);
  while (slots > of_warp && !places.Suffice(kAhead)) places = places_of(slots -= of_warp);
  config->method = Method::kBulk;
  config->slots = slots;
  config->block = slots * config->threads_per_row + kWarp;
  config->places = static_cast<int>(places.count);
  config->place_bytes = places.bytes;
  config->x_bytes = places.x_bytes;
  config->shared_memory = places.count * places.bytes + places.beyond;
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

// Threads of each of `blocks` blocks that share `rows` rows, and whose slots take two rows of a position at a
// time, unless there is no room for so many: the fewest with which no block has more rows than with others.
// With fewer than 256 the arithmetic takes longer than the memory.
int ThreadsOfPairs(int64_t rows, int64_t blocks, const LaunchConfig& config) {
  constexpr int kLeast = 256;
  const auto most_rows = [&](int threads) {
    const int64_t run = int64_t{threads} / config.threads_per_row * config.rows;
    return CeilDiv(rows, blocks * run) * run;
  };
  int best = kLeast;
  for (int threads = kLeast + kWarp; threads <= kRotaryBackwardThreads[config.rows]; threads += kWarp) {
    if (most_rows(threads) < most_rows(best)) best = threads;
  }
  return best;
}

}  // namespace

LaunchConfig ConfigureBackward(const Device& device, const Shape& shape, DType x, DType dy,
                               Alignment alignment, int64_t partial_rows, int margin, const Fused& fused) {
  const auto width = static_cast<int>(16 / std::min(SizeOf(x), SizeOf(dy)));
  const int64_t room = device.shared_memory - kOtherSharedMemory;
  const bool add = fused.fusion == Fusion::kAdd, rotary = fused.fusion == Fusion::kRotary;
  const bool aligned = alignment == Alignment::kRows;
  const int64_t element_bytes = SizeOf(x) * (add ? 2 : 1) + SizeOf(dy) * fused.gradients;
  const Ring ring{width * element_bytes, aligned, width, room, add};
  LaunchConfig config;
  if (rotary) {
    config = RotaryLayout(shape.hidden, width, fused, kWarp);
  } else if (aligned) {
    config = BackwardLayout(device, ring, shape.hidden / width);
  } else if (alignment == Alignment::kTensors && !add) {
    config = UnalignedBackwardLayout(device, ring, shape.hidden, x, dy, margin);
  } else {
    config = Loop();
  }
  config.aligned = aligned;
  config.width = config.scope == Scope::kLoop && !aligned ? 1 : width;
  config.most_shared_memory = room;

  const bool lanes = config.scope == Scope::kLanes;
  // Where a row takes fewer threads of a block, the others are for dgamma alone.
  LaunchConfig few = config;
  const bool windows = !aligned && config.scope != Scope::kLoop;
  if (windows) ShareWindows(&few);
  few.block = few.scope == Scope::kCluster ? few.threads_per_row : std::max(few.threads_per_row, kFewThreads);
  if (!rotary && config.scope != Scope::kLoop && margin == 0 &&
      AreFew(device, shape, x, element_bytes, windows, fused.gradients, few)) {
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

  const int64_t resident = ResidentBlocks(device, config.cluster, margin);
  const int64_t wanted = std::max<int64_t>(1, resident / std::max<int64_t>(1, shape.groups));
  const bool bulk = windows && device.bulk_copies;
  if (bulk) {
    FillBulk(shape.hidden, x, dy, room, &config);
  } else if (config.scope != Scope::kLoop) {
    ring.Fill(&config, config.rows == 2   ? ThreadsOfPairs(shape.rows, wanted, config)
                       : lanes || windows ? kLanesThreads
                                          : kMaxThreads);
    constexpr int64_t kEagerBytes = 48 * 1024;  // under way: up to there it was faster
    config.eager = config.scope == Scope::kBlock && fused.fusion == Fusion::kNone &&
                   ring.Ahead(config) * ring.PlaceBytes(config) <= kEagerBytes;
  }
  const int64_t slots = SlotsOf(config);
  if (slots > 1) {
    // At the end the slots of a block add up their columns of dgamma in shared memory.
    config.shared_memory = std::max(config.shared_memory, slots * shape.hidden * 4);
  }
  const int64_t items = CeilDiv(shape.rows, slots * config.rows);
  const int64_t most = partial_rows == 0 ? shape.rows : partial_rows;
  config.blocks_per_group = std::max<int64_t>(1, std::min({items, wanted, most}));
  // Several clusters of a group take rows of all shifts, other blocks those that lie alike.
  const bool sorted = !bulk && config.scope == Scope::kCluster && config.blocks_per_group > 1;
  if (windows && !sorted && config.blocks_per_group < items) {
    const int64_t alike = BlocksAlike(shape.hidden, bulk ? width / 4 : width, slots);
    config.blocks_per_group = std::min(items, std::max(alike, config.blocks_per_group / alike * alike));
    if (config.blocks_per_group > most) {  // not what JAX's side asks for
      return ConfigureBackward(device, shape, x, dy, Alignment::kNone, partial_rows, margin, fused);
    }
  }
  config.grid = std::min(resident, config.blocks_per_group * shape.groups) * config.cluster;
  if (config.scope != Scope::kLoop && (aligned || bulk)) {  // others do not ask for that much
    constexpr double kShare = 0.88;                         // of the bandwidth, for two reads and a write
    const int64_t moved = element_bytes + (add && !fused.gradient_of_h ? 0 : SizeOf(x));
    config.turn_ns = TurnTime(device, shape, config, moved, kShare);
  }
  return config;
}

}  // namespace jax_rmsnorm
