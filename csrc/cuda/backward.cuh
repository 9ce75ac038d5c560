// The backward kernel: dx, and one partial row of dgamma for each persistent block (or cluster).
#pragma once

#include "backward_common.cuh"
#include "backward_unaligned.cuh"

namespace jax_rmsnorm {

// The rows in flight: a ring of stages in shared memory. Each thread copies in what it alone will read, so
// that no barrier is needed, only a wait for its own copies.
template <typename T, typename D, int kSize, int kPackets>
class RowRing {
 public:
  using X = Packet<T, kSize>;
  using Dy = Packet<D, kSize>;
  static constexpr int kWords = X::kWords + Dy::kWords;  // of 16 bytes, in a packet of x and one of dy
  static_assert(X::kAccess == 16 && Dy::kAccess == 16);

  __device__ explicit RowRing(const uint4* shared)
      : base_(SharedAddress(shared + threadIdx.x)), stride_(blockDim.x * sizeof(uint4)) {}

  // Starts the copy of packet k of the row that will be read in `stage`.
  __device__ __forceinline__ void Copy(int stage, int k, const T* x, const D* dy) const {
    uint32_t to = At(stage, k);
#pragma unroll
    for (int w = 0; w < X::kWords; ++w, to += stride_) CopyAsync16(to, reinterpret_cast<const uint4*>(x) + w);
#pragma unroll
    for (int w = 0; w < Dy::kWords; ++w, to += stride_)
      CopyAsync16(to, reinterpret_cast<const uint4*>(dy) + w);
  }

  __device__ __forceinline__ void Read(int stage, int k, float (&x)[kSize], float (&dy)[kSize]) const {
    X x_packet;
    Dy dy_packet;
    uint32_t from = At(stage, k);
#pragma unroll
    for (int w = 0; w < X::kWords; ++w, from += stride_) x_packet.words[w] = LoadShared16(from);
#pragma unroll
    for (int w = 0; w < Dy::kWords; ++w, from += stride_) dy_packet.words[w] = LoadShared16(from);
    x_packet.Get(x);
    dy_packet.Get(dy);
  }

  // For packets beyond the end of the row, which nothing is copied to.
  __device__ void Zero(int stage, int k) const {
    for (int w = 0; w < kWords; ++w) ZeroShared16(At(stage, k) + w * stride_);
  }

 private:
  __device__ __forceinline__ uint32_t At(int stage, int k) const {
    return base_ + (stage * kPackets + k) * kWords * stride_;
  }
  uint32_t base_;
  uint32_t stride_;
};

// Grid: block (or cluster) b of the blocks_per_group that share group g takes the group's rows b, b +
// blocks_per_group, ... A block has several slots where threads_per_row leaves room, and then takes runs of
// rows, one a slot. It keeps its share of dgamma in registers. kSize elements a packet, kPackets packets a
// thread; kRound: rounding before gamma.
//
// In each turn a thread adds up its part of row t, hands it in, and only then asks for the sum of row t - 1
// and writes that row's dx: nobody waits for the slowest thread of the row. Both rows, and those to come, are
// in the ring.
//
// Preconditions: all rows are aligned; the row fits, hidden <= kSize * kPackets * threads_per_row * blocks of
// the cluster; the ring has params.stages stages, kManyStages or kFewStages.
template <typename T, typename D, int kSize, int kPackets, bool kRound, Scope kScope>
__global__ __launch_bounds__(512, 1) void BackwardKernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ uint4 shared[];
  __shared__ typename SplitRowSum<kScope>::Shared sum_memory;
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int64_t rows = args.shape.rows;
  const int threads = params.threads_per_row;
  const int stages = params.stages;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  const ClusterPlace<kScope> place;
  const int slots = kScope == Scope::kCluster ? 1 : static_cast<int>(blockDim.x) / threads;
  const int slot = kScope == Scope::kCluster ? 0 : static_cast<int>(threadIdx.x) / threads;
  const int thread = static_cast<int>(threadIdx.x) - slot * threads;
  SplitRowSum<kScope> row_sum(sum_memory, threads, slot);
  const RowRing<T, D, kSize, kPackets> ring(shared);

  int column[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    column[k] = ((k * place.blocks + place.rank) * threads + thread) * kSize;
  }

  const int64_t items = args.shape.groups * params.blocks_per_group;
  const int64_t step = params.blocks_per_group * slots;
  unsigned turn = 0;  // counted on from item to item, for row_sum
  for (int64_t item = blockIdx.x / place.blocks; item < items; item += gridDim.x / place.blocks) {
    const int64_t group = item / params.blocks_per_group;
    const int64_t block = item % params.blocks_per_group;

    float gamma[kPackets][kSize], dgamma[kPackets][kSize];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) gamma[k][i] = dgamma[k][i] = 0.0f;
      if (column[k] < hidden) {
        LoadGamma(args, group * hidden + column[k], gamma[k]);
      } else {
        for (int stage = 0; stage < stages; ++stage) ring.Zero(stage, k);
      }
    }

    // All slots of a block make the same number of turns; a slot without a row only takes part in the sums.
    const int64_t first = block * slots;
    const int turns = static_cast<int>(first < rows ? (rows - first + step - 1) / step : 0);
    const int my_turns = static_cast<int>(first + slot < rows ? (rows - first - slot + step - 1) / step : 0);
    const int64_t my_row = group * rows + first + slot;
    const int64_t row_step = step * hidden;

    int64_t copy_offset = my_row * hidden;
    int copy_turn = 0;
    const auto copy_next = [&](int stage) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (copy_turn < my_turns && column[k] < hidden) {
          ring.Copy(stage, k, static_cast<const T*>(args.x) + copy_offset + column[k],
                    static_cast<const D*>(args.dy) + copy_offset + column[k]);
        }
      }
      CommitCopies();
      copy_offset += row_step;
      ++copy_turn;
    };
    for (int stage = 0; stage < stages; ++stage) copy_next(stage);

    const float* rrms_of = args.rrms + my_row;
    float next_rrms = my_turns > 0 ? *rrms_of : 0.0f;
    float rrms = 0.0f;
    int64_t offset = my_row * hidden - row_step;  // of the row before this turn's
    int stage = 0;

    for (int t = 0; t <= turns; ++t) {
      const float last_rrms = rrms;
      if (t < turns) {
        rrms = next_rrms;
        rrms_of += step;
        next_rrms = t + 1 < my_turns ? *rrms_of : 0.0f;
        if (stages == kManyStages) {
          WaitCopies<kManyStages - 2>();
        } else {
          WaitCopies<kFewStages - 2>();
        }
        float sum = 0.0f;
        if (t < my_turns) {
#pragma unroll
          for (int k = 0; k < kPackets; ++k) {
            float x[kSize], dy[kSize];
            ring.Read(stage, k, x, dy);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              const float normalized = x[i] * rrms;
              sum += dy[i] * gamma[k][i] * normalized;
              dgamma[k][i] += dy[i] * (kRound ? ToFloat(FromFloat<T>(normalized)) : normalized);
            }
          }
        }
        row_sum.Post(turn + t, sum);
      }
      if (t > 0) {
        const int last_stage = stage == 0 ? stages - 1 : stage - 1;
        const float c = row_sum.Wait(turn + t - 1) * inverse_hidden;
        if (t <= my_turns) {
#pragma unroll
          for (int k = 0; k < kPackets; ++k) {
            float x[kSize], dy[kSize];
            ring.Read(last_stage, k, x, dy);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              x[i] = last_rrms * (dy[i] * gamma[k][i] - x[i] * last_rrms * c);
            }
            Packet<T, kSize> dx;
            dx.Set(x);
            if (column[k] < hidden) dx.Store(static_cast<T*>(args.dx) + offset + column[k]);
          }
        }
        copy_next(last_stage);
      }
      offset += row_step;
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    turn += turns;
    WaitCopies<0>();
    if (args.dgamma == nullptr) continue;

    if (slots > 1) {
      StoreSlots(params, reinterpret_cast<float*>(shared), slots, slot, group, block, [&](float* columns) {
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          if (column[k] >= hidden) continue;
#pragma unroll
          for (int i = 0; i < kSize; ++i) columns[column[k] + i] = dgamma[k][i];
        }
      });
    } else {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column[k] < hidden) StoreDgamma(params, group, block, column[k], dgamma[k]);
      }
    }
  }
  row_sum.Finish();
}

// The kernel that `config` asks for; the packet counts are those that ConfigureBackward hands out.
template <typename T, typename D, bool kRound>
auto FindBackward(const LaunchConfig& config) -> void (*)(BackwardParams) {
  constexpr int kWide = 16 / (sizeof(T) < sizeof(D) ? sizeof(T) : sizeof(D));
  const bool wide = config.width > 1;
  switch (config.scope) {
    case Scope::kLanes:
      if (!wide) {
        return config.packets == 4 ? BackwardUnalignedKernel<T, D, 4, Scope::kLanes>
                                   : BackwardUnalignedKernel<T, D, 16, Scope::kLanes>;
      }
      return config.packets == 1 ? BackwardKernel<T, D, kWide, 1, kRound, Scope::kLanes>
                                 : BackwardKernel<T, D, kWide, 2, kRound, Scope::kLanes>;
    case Scope::kBlock:
      return wide ? BackwardKernel<T, D, kWide, 2, kRound, Scope::kBlock>
                  : BackwardUnalignedKernel<T, D, 16, Scope::kBlock>;
    case Scope::kCluster:
      return wide ? BackwardKernel<T, D, kWide, 2, kRound, Scope::kCluster>
                  : BackwardUnalignedKernel<T, D, 16, Scope::kCluster>;
    case Scope::kLoop:
      return wide ? BackwardLoopKernel<T, D, kWide> : BackwardLoopKernel<T, D, 1>;
  }
  return nullptr;
}

template <typename T, typename D>
cudaError_t LaunchBackwardAs(const BackwardArgs& args, const LaunchConfig& config, cudaStream_t stream) {
  const BackwardParams params{args, config.threads_per_row, config.stages, config.blocks_per_group};
  constexpr bool kCanRound = !std::is_same_v<T, float>;  // rounding to float32 is none
  const auto kernel = kCanRound && args.arithmetic.round_before_gamma ? FindBackward<T, D, kCanRound>(config)
                                                                      : FindBackward<T, D, false>(config);
  return LaunchKernel(kernel, params, config, stream);
}

}  // namespace jax_rmsnorm
