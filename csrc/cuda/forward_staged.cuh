// The forward kernel that stages its row in shared memory: rows too long for the registers of a small block,
// and rows that are not aligned.
#pragma once

#include "forward_common.cuh"

namespace jax_rmsnorm {

// Grid: a block a row, rows dealt out with the grid as stride. Sums are taken by columns, so that a row has
// the same bits wherever it lies; what is written follows the packets of the result, which lie as those of x.
// With `slices` the columns' sums are added up as by a cluster of so many blocks, each with a slice of the
// row.
//
// Preconditions: the tensors are aligned to 16 bytes, with kAligned all rows too; the row fits into the
// shared memory, StageBytes of it.
template <typename T, typename G, bool kAligned>
__global__ __launch_bounds__(kMaxThreads, kAligned || sizeof(G) < 4 ? 3 : 2) void ForwardStagedKernel(
    const __grid_constant__ ForwardParams params) {
  constexpr int kSize = 16 / sizeof(T);
  extern __shared__ uint4 shared[];
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const T* x = static_cast<const T*>(args.x);
  const int hidden = static_cast<int>(args.shape.hidden);
  const int64_t elements = params.items * hidden;
  const int first = static_cast<int>(threadIdx.x) * kSize;
  const int step = static_cast<int>(blockDim.x) * kSize;
  const uint32_t memory = SharedAddress(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  __shared__ float slice_sums[kAligned ? 1 : kMaxCluster * kMaxWarps];
  RowSum<Scope::kBlock> row_sum(blockDim.x);
  LaunchDependents();
  WaitForPrimary();

  // The packet `at` elements after the one in which the row begins.
  const auto address = [&](int at) { return memory + at * static_cast<int>(sizeof(T)); };
  const auto read = [&](int at) {
    Packet<T, kSize> packet;
    LoadShared<16>(address(at), packet.registers);
    return packet;
  };

  for (int64_t row = blockIdx.x; row < params.items; row += gridDim.x) {
    const int64_t start = row * hidden;
    const int shift = kAligned ? 0 : static_cast<int>(start & (kSize - 1));
    const int64_t base = start - shift;
    const bool inside = kAligned || base + shift + hidden + kSize <= elements;
    if (kAligned && args.addend != nullptr) {
#pragma unroll 4
      for (int column = first; column < hidden; column += step) {
        Packet<T, kSize> packet;
        packet.Load(x + start + column);
        AddAddend(args, start + column, &packet);
        StoreShared<16>(address(column), packet.registers);
      }
    } else {
#pragma unroll 4
      for (int at = first; at < shift + hidden; at += step) {
        if (inside) {
          CopyAsync<16>(address(at), x + base + at);
        } else {
          StoreShared<16>(address(at), Window<T, kSize>(x, base + at, elements).Load(0).registers);
        }
      }
      CommitCopies();
      WaitCopies<0>();
    }
    if constexpr (!kAligned) __syncthreads();  // aligned: each thread reads what it copied

    // Of the thread's columns from `from` on, `stride` apart.
    const auto sum_columns = [&](int from, int stride) {
      float sum = 0.0f;
#pragma unroll 4
      for (int column = from; column < hidden; column += stride) {
        float values[kSize];
        if constexpr (kAligned) {
          read(column).Get(values);
        } else {
          Join(read(column), read(column + kSize), shift).Get(values);
          ZeroBeyond(hidden, column, values);
        }
        sum += SumOfSquares(values);
      }
      return sum;
    };
    float sum = 0.0f;
    if (kAligned || params.slices == 1) {
      sum = row_sum(sum_columns(first, step));
    } else {
      for (int slice = 0; slice < params.slices; ++slice) {
        const float part = SumWarp(sum_columns(first + slice * step, params.slices * step));
        if (lane == 0) slice_sums[slice * warps + warp] = part;
      }
      __syncthreads();
      for (int i = lane; i < params.slices * warps; i += 32) sum += slice_sums[i];
      sum = SumWarp(sum);
    }
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && threadIdx.x == 0) args.rrms[row] = rrms;

    const int64_t gamma_start = GammaRow(args.shape, row) * hidden;
#pragma unroll 2
    for (int at = first; at < shift + hidden; at += step) {
      const int column = at - shift;
      float values[kSize], gamma[kSize], y[kSize];
      LoadGammaAs<G, kAligned>(args, gamma_start, column, gamma);
      read(at).Get(values);
      Normalize<T>(values, rrms, gamma, arithmetic.round_before_gamma, y);
      if constexpr (kAligned) {
        StoreAs<T>(args.y_dtype, args.y, start + column, y);
      } else {
        WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
          StoreWithinRow(static_cast<decltype(tag)*>(args.y) + start + column, hidden, column, y);
        });
      }
    }
    if constexpr (!kAligned) __syncthreads();  // the row is read no more
  }
}

}  // namespace jax_rmsnorm
