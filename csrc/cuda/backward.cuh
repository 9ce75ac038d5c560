// Backward kernels: dx, and one partial row of dgamma for each persistent block (or cluster).
#pragma once

#include <cstdint>

#include "launch.h"
#include "packet.cuh"
#include "reduce.cuh"

namespace jax_rmsnorm {

struct BackwardParams {
  BackwardArgs args;
  int threads_per_row;
  int stages;
  int64_t blocks_per_group;
};

template <typename T, int kSize>
__device__ __forceinline__ void LoadGamma(const BackwardArgs& args, int64_t offset, float (&gamma)[kSize]) {
  LoadGamma(args.gamma, args.gamma_dtype, args.arithmetic.zero_centered_gamma, offset, gamma);
}

// A block's partial row, or dgamma itself where the group has no other block.
__device__ __forceinline__ void StorePartial(const BackwardArgs& args, bool only, int64_t group,
                                             int64_t block, int64_t column, float value) {
  const int64_t hidden = args.shape.hidden;
  if (only) {
    const float values[1] = {value};
    StoreAs(args.gamma_dtype, args.dgamma, group * hidden + column, values);
  } else {
    args.partials[(group * args.partial_rows + block) * hidden + column] = value;
  }
}

// The rows in flight: a ring of stages in shared memory. Each thread copies in what it alone will read, so
// that no barrier is needed, only a wait for its own copies.
template <typename T, typename D, int kSize, int kPackets>
class RowRing {
 public:
  using X = Packet<T, kSize>;
  using Dy = Packet<D, kSize>;
  static constexpr int kWords = X::kWords + Dy::kWords;  // 16-byte words a packet pair

  __device__ RowRing(void* shared, int stages)
      : base_(static_cast<uint4*>(shared) + threadIdx.x), stages_(stages) {}

  // Starts the copies of packet k of the row that will be read in `stage`.
  __device__ __forceinline__ void Copy(int stage, int k, const T* x, const D* dy) {
    uint4* to = At(stage, k);
    const int stride = blockDim.x;
#pragma unroll
    for (int w = 0; w < X::kWords; ++w) CopyAsync16(to + w * stride, reinterpret_cast<const uint4*>(x) + w);
    to += X::kWords * stride;
#pragma unroll
    for (int w = 0; w < Dy::kWords; ++w) CopyAsync16(to + w * stride, reinterpret_cast<const uint4*>(dy) + w);
  }

  __device__ __forceinline__ void Read(int stage, int k, X& x, Dy& dy) const {
    const uint4* from = At(stage, k);
    const int stride = blockDim.x;
    x.Load(from, stride);
    dy.Load(from + X::kWords * stride, stride);
  }

  __device__ int stages() const { return stages_; }

 private:
  __device__ uint4* At(int stage, int k) const {
    return base_ + static_cast<int64_t>(stage * kPackets + k) * kWords * blockDim.x;
  }
  uint4* base_;
  int stages_;
};

// Grid: block (or cluster) b of the blocks_per_group that share group g takes the group's rows b, b +
// blocks_per_group, ... (kLanes: runs of rows, one row for every threads_per_row threads), and keeps its
// share of dgamma in registers. kSize elements a packet, kPackets packets a thread. Precondition: the row
// fits, as in ForwardKernel.
template <typename T, typename D, int kSize, int kPackets, Scope kScope>
__global__ __launch_bounds__(kScope == Scope::kLanes ? 256 : 512,
                             kScope == Scope::kLanes
                                 ? 2
                                 : 1) void BackwardKernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ uint4 shared[];
  constexpr bool kAsync = kSize * sizeof(T) >= 16 && kSize * sizeof(D) >= 16;
  constexpr bool kKeepGamma = kSize * kPackets <= 16;
  const BackwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int64_t hidden = args.shape.hidden;
  const int64_t rows = args.shape.rows;
  const int threads = params.threads_per_row;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  RowSum<kScope> row_sum(threads);

  int rank = 0, blocks = 1;
#if __CUDA_ARCH__ >= 900
  if constexpr (kScope == Scope::kCluster) {
    rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
    blocks = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  }
#endif
  const int slots = kScope == Scope::kLanes ? static_cast<int>(blockDim.x) / threads : 1;
  const int slot = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) / threads : 0;
  const int thread = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) % threads : threadIdx.x;
  const auto column = [&](int k) {
    return (static_cast<int64_t>(k * blocks + rank) * threads + thread) * kSize;
  };

  const int64_t items = args.shape.groups * params.blocks_per_group;
  for (int64_t item = blockIdx.x / blocks; item < items; item += gridDim.x / blocks) {
    const int64_t group = item / params.blocks_per_group;
    const int64_t block = item % params.blocks_per_group;
    const int64_t gamma_row = group * hidden;
    const int64_t first_row = group * rows;
    const int64_t step = params.blocks_per_group * slots;
    // All slots of a block make the same number of turns; a slot without a row only takes part in the sums.
    const int64_t start = block * slots;
    const int64_t turns = start < rows ? (rows - start + step - 1) / step : 0;
    const auto row_of = [&](int64_t turn) { return start + turn * step + slot; };

    float gamma[kKeepGamma ? kPackets : 1][kSize];
    float dgamma[kPackets][kSize];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      if constexpr (kKeepGamma) {
        if (column(k) < hidden) LoadGamma<T>(args, gamma_row + column(k), gamma[k]);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) dgamma[k][i] = 0.0f;
    }

    RowRing<T, D, kSize, kPackets> ring(shared, params.stages);
    const auto copy_ahead = [&](int64_t turn, int stage) {
      if constexpr (kAsync) {
        const int64_t row = row_of(turn);
        if (turn < turns && row < rows) {
          const int64_t offset = (first_row + row) * hidden;
#pragma unroll
          for (int k = 0; k < kPackets; ++k) {
            if (column(k) < hidden) {
              ring.Copy(stage, k, static_cast<const T*>(args.x) + offset + column(k),
                        static_cast<const D*>(args.dy) + offset + column(k));
            }
          }
        }
        CommitCopies();
      }
    };
    const bool async = kAsync && params.stages > 1;
    if (async) {
      for (int stage = 0; stage < params.stages - 1; ++stage) copy_ahead(stage, stage);
    }
    const auto load_rrms = [&](int64_t turn) {
      return turn < turns && row_of(turn) < rows ? args.rrms[first_row + row_of(turn)] : 0.0f;
    };
    float next_rrms = load_rrms(0);
    int stage = 0;

    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t row = row_of(turn);
      const bool live = row < rows;
      const int64_t offset = (first_row + row) * hidden;
      const float rrms = next_rrms;
      next_rrms = load_rrms(turn + 1);

      Packet<T, kSize> x[kPackets];
      Packet<D, kSize> dy[kPackets];
      if (async) WaitCopies(params.stages - 2);
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (live && column(k) < hidden) {
          bool loaded = false;
          if constexpr (kAsync) {
            if (async) {
              ring.Read(stage, k, x[k], dy[k]);
              loaded = true;
            }
          }
          if (!loaded) {
            x[k].Load(static_cast<const T*>(args.x) + offset + column(k));
            dy[k].Load(static_cast<const D*>(args.dy) + offset + column(k));
          }
        } else {
          x[k].SetZero();
          dy[k].SetZero();
        }
      }
      if (async) {
        // The stage read in the turn before is free: this thread has taken its values out.
        copy_ahead(turn + params.stages - 1, stage == 0 ? params.stages - 1 : stage - 1);
        stage = stage + 1 == params.stages ? 0 : stage + 1;
      }

      const auto gamma_of = [&](int k, float (&values)[kSize]) {
        if constexpr (kKeepGamma) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) values[i] = gamma[k][i];
        } else {
          LoadGamma<T>(args, gamma_row + column(k), values);
        }
      };
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column(k) >= hidden) continue;
        float xs[kSize], dys[kSize], gammas[kSize];
        x[k].Get(xs);
        dy[k].Get(dys);
        gamma_of(k, gammas);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float normalized = xs[i] * rrms;
          sum += dys[i] * gammas[i] * normalized;
          dgamma[k][i] +=
              dys[i] * (arithmetic.round_before_gamma ? ToFloat(FromFloat<T>(normalized)) : normalized);
        }
      }
      const float c = row_sum(sum) * inverse_hidden;
      if (!live) continue;

#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column(k) >= hidden) continue;
        float xs[kSize], dys[kSize], gammas[kSize];
        x[k].Get(xs);
        dy[k].Get(dys);
        gamma_of(k, gammas);
#pragma unroll
        for (int i = 0; i < kSize; ++i) xs[i] = rrms * (dys[i] * gammas[i] - xs[i] * rrms * c);
        Packet<T, kSize> dx;
        dx.Set(xs);
        dx.Store(static_cast<T*>(args.dx) + offset + column(k));
      }
    }
    if (async) WaitCopies<0>();
    if (args.dgamma == nullptr) continue;

    const bool only = params.blocks_per_group == 1;
    if constexpr (kScope == Scope::kLanes) {
      // Columns of all slots meet in shared memory, and are added in the order of the slots.
      float* columns = reinterpret_cast<float*>(shared);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column(k) >= hidden) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) columns[slot * hidden + column(k) + i] = dgamma[k][i];
      }
      __syncthreads();
      for (int64_t c = threadIdx.x; c < hidden; c += blockDim.x) {
        float total = 0.0f;
        for (int s = 0; s < slots; ++s) total += columns[s * hidden + c];
        StorePartial(args, only, group, block, c, total);
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column(k) >= hidden) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) StorePartial(args, only, group, block, column(k) + i, dgamma[k][i]);
      }
    }
  }
}

// Grid: as above, a block a row, any hidden size. Reads each row twice and keeps its share of dgamma in
// `partials`.
template <typename T, typename D, int kSize>
__global__ __launch_bounds__(512) void BackwardLoopKernel(const __grid_constant__ BackwardParams params) {
  const BackwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int64_t hidden = args.shape.hidden;
  const int64_t rows = args.shape.rows;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize;
  const int64_t width = static_cast<int64_t>(blockDim.x) * kSize;
  RowSum<Scope::kLoop> row_sum(blockDim.x);

  const int64_t items = args.shape.groups * params.blocks_per_group;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t group = item / params.blocks_per_group;
    const int64_t block = item % params.blocks_per_group;
    float* partial =
        args.dgamma == nullptr ? nullptr : args.partials + (group * args.partial_rows + block) * hidden;
    bool first_turn = true;
    for (int64_t row = block; row < rows; row += params.blocks_per_group) {
      const int64_t offset = (group * rows + row) * hidden;
      const float rrms = args.rrms[group * rows + row];
      float xs[kSize], dys[kSize], gammas[kSize];
      const auto load = [&](int64_t column) {
        Packet<T, kSize> x;
        Packet<D, kSize> dy;
        x.Load(static_cast<const T*>(args.x) + offset + column);
        dy.Load(static_cast<const D*>(args.dy) + offset + column);
        x.Get(xs);
        dy.Get(dys);
        LoadGamma<T>(args, group * hidden + column, gammas);
      };
      float sum = 0.0f;
      for (int64_t column = first; column < hidden; column += width) {
        load(column);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum += dys[i] * gammas[i] * (xs[i] * rrms);
      }
      const float c = row_sum(sum) / static_cast<float>(hidden);
      for (int64_t column = first; column < hidden; column += width) {
        load(column);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float normalized = xs[i] * rrms;
          if (partial != nullptr) {
            const float term =
                dys[i] * (arithmetic.round_before_gamma ? ToFloat(FromFloat<T>(normalized)) : normalized);
            partial[column + i] = first_turn ? term : partial[column + i] + term;
          }
          xs[i] = rrms * (dys[i] * gammas[i] - normalized * c);
        }
        Packet<T, kSize> dx;
        dx.Set(xs);
        dx.Store(static_cast<T*>(args.dx) + offset + column);
      }
      first_turn = false;
    }
    if (partial != nullptr && params.blocks_per_group == 1) {
      for (int64_t column = first; column < hidden; column += width) {
        for (int i = 0; i < kSize; ++i)
          StorePartial(args, true, group, block, column + i, partial[column + i]);
      }
    }
  }
}

// The kernel that `config` asks for; the packet counts are those that ConfigureBackward hands out.
template <typename T, typename D>
auto FindBackward(const LaunchConfig& config) -> void (*)(BackwardParams) {
  constexpr int kWide = 16 / (sizeof(T) < sizeof(D) ? sizeof(T) : sizeof(D));
  const bool wide = config.width > 1;
  switch (config.scope) {
    case Scope::kLanes:
      if (!wide) {
        return config.packets == 4 ? BackwardKernel<T, D, 1, 4, Scope::kLanes>
                                   : BackwardKernel<T, D, 1, 16, Scope::kLanes>;
      }
      return config.packets == 1   ? BackwardKernel<T, D, kWide, 1, Scope::kLanes>
             : config.packets == 2 ? BackwardKernel<T, D, kWide, 2, Scope::kLanes>
                                   : BackwardKernel<T, D, kWide, 4, Scope::kLanes>;
    case Scope::kBlock:
      if (!wide) return BackwardKernel<T, D, 1, 16, Scope::kBlock>;
      return config.packets == 2 ? BackwardKernel<T, D, kWide, 2, Scope::kBlock>
                                 : BackwardKernel<T, D, kWide, 4, Scope::kBlock>;
    case Scope::kCluster:
      return wide ? BackwardKernel<T, D, kWide, 4, Scope::kCluster>
                  : BackwardKernel<T, D, 1, 16, Scope::kCluster>;
    case Scope::kLoop:
      return wide ? BackwardLoopKernel<T, D, kWide> : BackwardLoopKernel<T, D, 1>;
  }
  return nullptr;
}

template <typename T, typename D>
cudaError_t LaunchBackwardAs(const BackwardArgs& args, const LaunchConfig& config, cudaStream_t stream) {
  const BackwardParams params{args, config.threads_per_row, config.stages, config.blocks_per_group};
  return LaunchKernel(FindBackward<T, D>(config), params, config, stream);
}

}  // namespace jax_rmsnorm
