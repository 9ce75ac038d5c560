// The launch configuration: a plain function of the shape, the dtypes and the device. No CUDA in here, so
// that it compiles, and is tested, on a host without a GPU.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace jax_rmsnorm {

// Who works on one row.
enum class Scope : int32_t {
  kLanes,    // part of a warp, or a whole one: shuffles only, no shared memory, no barrier
  kBlock,    // a block, its part of the row in registers
  kCluster,  // a cluster of blocks, each with a slice of the row; sums meet in distributed shared memory
  kLoop,     // a block that reads the row twice: rows too long for all of the above
};

// Stages of the backward's ring of rows; a choice of two, since the kernels wait by compile-time counts.
constexpr int kManyStages = 6;
constexpr int kFewStages = 3;

// Of a block's shared memory, what is not dynamic: the sums, up to 5 KiB in a cluster, and the system's 1
// KiB.
constexpr int kOtherSharedMemory = 7 * 1024;

struct Device {
  int sm_count = 0;
  int shared_memory = 0;  // bytes that one block can have, and (about) all that an SM has
  int max_cluster = 1;    // 1: the device, or the code compiled for it, has no clusters
  // Clusters of 2, 4, 8 and 16 blocks that can run at the same time, a block an SM; 0: not known.
  int resident_clusters[4] = {};
};

struct LaunchConfig {
  Scope scope = Scope::kLanes;
  int width = 1;            // elements an access: 16 bytes' worth, or 1 for unaligned rows
  int packets = 1;          // accesses a thread makes for one row (compile-time in the kernels)
  int threads_per_row = 1;  // within one block
  int block = 32;           // threads a block
  int cluster = 1;          // blocks a row
  int64_t grid = 0;         // blocks; a multiple of `cluster`
  // Backward only:
  int stages = 0;             // rows in flight in shared memory; 0: loads go straight to registers
  int64_t shared_memory = 0;  // dynamic, in bytes
  int64_t most_shared_memory =
      0;  // that a launch on this device may ask for: the same for all, see LaunchKernel
  int64_t blocks_per_group = 0;  // blocks (or clusters) that share the rows of one group: rows of `partials`
};

// `aligned`: every row of every operand begins at a multiple of its access size. `margin`: SMs to leave
// alone. The mapping of elements to threads depends on hidden, dtypes and alignment only, never on the number
// of rows, the device or the margin: a row's bits are the same in every batch.
LaunchConfig ConfigureForward(const Device& device, const Shape& shape, DType x, bool aligned, int margin);

LaunchConfig ConfigureBackward(const Device& device, const Shape& shape, DType x, DType dy, bool aligned,
                               int64_t partial_rows, int margin);

}  // namespace jax_rmsnorm
