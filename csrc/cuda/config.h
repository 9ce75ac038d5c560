// The launch configuration: a plain function of the shape, the dtypes and the device. No CUDA in here, so
// that it compiles, and is tested, on a host without a GPU.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace jax_rmsnorm {

// Who works on one row.
enum class Scope : int32_t {
  kLanes,    // part of a warp, or a whole one: shuffles only, no shared memory, no barrier
  kBlock,    // a block
  kCluster,  // a cluster of blocks, or a block alone; sums meet in distributed shared memory
  kLoop,     // a block that reads the row twice: rows too long for all of the above
};

// How a kernel gets at its rows.
enum class Method : int32_t {
  kPlain,   // straight into registers; the hardware deals out blocks of one row, or of a few
  kStaged,  // the same by way of shared memory: long rows, many of them
  kRing,    // persistent blocks, fed by asynchronous copies: one an SM, or several where the forward has rows
            // that are not aligned
  kWindows,  // rows that are not aligned, straight into registers: few, or too long for a ring
  kBulk,     // backward: persistent blocks, one an SM, of rows that are not aligned, fed by bulk copies
  kFew,      // backward: tiles of dgamma and rows of dx side by side
};

// What all rows of all operands have in common, which decides how they can be read.
enum class Alignment : int32_t {
  kRows,     // they begin at multiples of 16 bytes
  kTensors,  // the tensors do, and their rows do not
  kNone,
};

constexpr int kMaxThreads = 512;  // a block: at 128 registers each, all that an SM has
constexpr int kMaxCluster = 16;   // blocks

constexpr int kLanesThreads =
    384;  // a block of a persistent backward of short rows, or of rows that are not aligned
constexpr int kFewThreads = 256;    // the least in a block of a backward of few rows
constexpr int kFusedThreads = 256;  // a block of the fused forward kernels, at more registers each

// Rows that a ring copies ahead of the one that is read, by scope and the packets that a thread has of one:
// some 64 KiB an SM. More bytes in flight make the memory slower. With an addend there are more operands, and
// a cluster's rows are longest.
constexpr int RowsAhead(Scope scope, int packets, bool add = false) {
  constexpr int kRows[3][5] = {{0, 2, 2, 2, 1}, {0, 0, 2, 2, 1}, {0, 0, 2, 2, 1}};
  return scope == Scope::kCluster && add ? 1 : kRows[static_cast<int>(scope)][packets];
}

// The same as a constant, for code that may not call a function of the host's.
template <Scope kScope, int kPackets, bool kAdd = false>
constexpr int kRowsAhead = RowsAhead(kScope, kPackets, kAdd);

// Threads, besides the warp that copies, of a block that bulk copies feed, at the most, where a thread has so
// many packets of a row: what the registers of an SM allow with that warp.
constexpr int BulkThreads(int packets) {
  constexpr int kThreads[] = {0, 736, 480, 480, 352};
  return kThreads[packets];
}

// The (packets of a thread, lanes of a row) of such a block where part of a warp has a row: the fewest that
// hold it, and of several choices that with the fewest lanes.
constexpr int kBulkLanes[][2] = {{1, 8}, {2, 8}, {3, 8}, {4, 8}, {3, 16}, {4, 16}, {3, 32}, {4, 32}};

constexpr int kGranule = 16;    // bytes, of which a bulk copy has a whole number
constexpr int kLine = 128;      // bytes, in which it is fastest between equal places
constexpr int kMostPlaces = 8;  // of the ring of such copies

// A forward cluster's blocks of no more threads copy two rows ahead.
constexpr int kSmallBlock = 320;

// Shared memory for a row, which may begin and end within a packet of 16 bytes.
constexpr int64_t StageBytes(int64_t bytes) { return (bytes + 15) / 16 * 16 + 16; }

// Forward kernels of rows that are not aligned: the windows of a lane, where several warps have the row, and
// at the most where one has it or part of one; the threads of a block at the most, where rows are many and
// where they are few (in a block twice as many share a row); and the threads that an SM has place for where
// they are many.
constexpr int kStripWindows = 4;
constexpr int kLaneWindows = 6;
template <Scope kScope>
constexpr int kWindowRingThreads = kScope == Scope::kLanes ? 128 : 384;
template <Scope kScope>
constexpr int kWindowsThreads = kScope == Scope::kLanes   ? 128
                                : kScope == Scope::kBlock ? 2 * kWindowRingThreads<kScope>
                                                          : kMaxThreads;
constexpr int WindowsPerSM(bool wide_gamma, int windows) { return wide_gamma || windows > 4 ? 512 : 768; }

// Of a row that a thread of the plain forward kernel holds where it takes no more than the row needs.
constexpr int kForwardBytes = 64;

// The same in packets of `width` elements.
constexpr int ForwardPackets(int64_t width, int64_t size) {
  return static_cast<int>(kForwardBytes / (width * size));
}

// Turns that a ring copies ahead where a slot takes `rows` rows of a rotary embedding at a time.
constexpr int kRotaryAhead[3] = {0, 2, 1};

// Threads of a block of the rotary backward at the most, by the rows that a slot takes at a time: more of
// them have more under way than the memory likes.
constexpr int kRotaryBackwardThreads[3] = {0, kLanesThreads, 352};

// Columns, in packets, of the widest tile of dgamma, a warp's, and of the narrowest, a sector of the L2
// cache.
constexpr int kMostTilePackets = 32;
constexpr int kLeastTilePackets = 2;

// Of a block's shared memory, what is not dynamic: the sums, up to 5 KiB in a cluster, and the system's 1
// KiB.
constexpr int kOtherSharedMemory = 7 * 1024;

struct Device {
  int sm_count = 0;
  int shared_memory = 0;          // bytes that one block can have, and (about) all that an SM has
  int max_cluster = 1;            // 1: the device, or the code compiled for it, has no clusters
  bool dependent_launch = false;  // programmatic dependent launch, likewise
  bool bulk_copies = false;       // of any size, asynchronous, likewise
  // Clusters of so many blocks that can run at the same time, a block an SM; 0: not known.
  int resident_clusters[kMaxCluster + 1] = {};
  int64_t l2_bytes = 0;
  // Bytes a nanosecond, as specified; 0: persistent blocks are not held back, see Pace in ring.cuh.
  double memory_bandwidth = 0;
};

// What the configuration must know of a fused operation.
struct Fused {
  Fusion fusion = Fusion::kNone;
  int64_t rotary_width = 0;
  int64_t heads = 1;
  bool interleaved = false;
  int gradients = 1;  // of y, in a backward
  bool gradient_of_h = false;
};

struct LaunchConfig {
  Method method = Method::kPlain;
  Scope scope = Scope::kLanes;
  bool aligned = false;     // rows, to 16 bytes
  int width = 1;            // elements a packet
  int packets = 1;          // packets of a row that a thread has (compile-time in the kernels)
  int threads_per_row = 1;  // within one block
  int share = 1;            // of few rows that are not aligned: warps that share a strip, 1 or 2
  int places = 0;           // kBulk: of the ring
  int64_t place_bytes = 0;  // kBulk: of a place, of which x has the first `x_bytes`
  int64_t x_bytes = 0;
  int rows = 1;                    // that a slot takes at a time
  int block = 32;                  // threads a block
  int cluster = 1;                 // blocks a row
  bool more_registers = false;     // kPlain: there are so few threads that each may have as many as it likes
  int ahead = 0;                   // rows that a ring copies ahead; 0: as RowsAhead says, or two
  bool eager = false;              // a row's block of a backward's kRing, see BackwardKernel
  int64_t grid = 0;                // blocks; a multiple of `cluster`
  bool dependent = false;          // launched while the stream's last kernel ends, which it waits for
  int slots = 1;                   // kFew, kBulk: rows that a block takes at the same time
  int64_t tiles = 0;               // kFew: of a group's dgamma
  int tile_packets = 0;            // kFew: columns of a tile, in packets
  int64_t blocks_per_group = 0;    // persistent blocks (or clusters) that share the rows of one group
  uint32_t turn_ns = 0;            // that a persistent block's turn takes at the least; 0: not held back
  int64_t shared_memory = 0;       // dynamic, in bytes
  int64_t most_shared_memory = 0;  // that a launch may ask for: the same for all, see LaunchKernel
};

// `margin`: SMs to leave alone. The mapping of elements to threads (of a forward's long rows, and of rows
// that are not aligned: to strips, see PacketInRow and unaligned.cuh) depends on hidden, dtypes, alignment
// and the number of gradients only, never on the number of rows, the device or the margin: a row's bits are
// the same in every batch.
LaunchConfig ConfigureForward(const Device& device, const Shape& shape, DType x, DType gamma, DType y,
                              Alignment alignment, int margin, const Fused& fused = {});

LaunchConfig ConfigureBackward(const Device& device, const Shape& shape, DType x, DType dy,
                               Alignment alignment, int64_t partial_rows, int margin,
                               const Fused& fused = {});

// Whether there are kernels with a rotary embedding for rows of `hidden` elements of `size` bytes, the
// narrowest operand's; the backward has fewer. The configuration of others is none.
bool FusesRotary(int64_t hidden, int64_t size, const Fused& fused, bool backward);

}  // namespace jax_rmsnorm
