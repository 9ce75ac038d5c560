// Backward kernels for rows that do not begin at a multiple of 16 bytes: an element an access.
#pragma once

#include "backward_common.cuh"

namespace jax_rmsnorm {

// Grid and precondition as for BackwardKernel; x and dy go from memory straight to registers.
template <typename T, typename D, int kPackets, Scope kScope>
__global__ __launch_bounds__(
    kScope == Scope::kLanes ? 256 : 512,
    kScope == Scope::kLanes ? 2
                            : 1) void BackwardUnalignedKernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ uint4 shared[];
  const BackwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int64_t hidden = args.shape.hidden;
  const int64_t rows = args.shape.rows;
  const int threads = params.threads_per_row;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  const ClusterPlace<kScope> place;
  RowSum<kScope> row_sum(threads);
  const int slots = kScope == Scope::kLanes ? static_cast<int>(blockDim.x) / threads : 1;
  const int slot = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) / threads : 0;
  const int thread = static_cast<int>(threadIdx.x) - slot * threads;
  const auto column = [&](int k) { return (k * place.blocks + place.rank) * threads + thread; };

  const int64_t items = args.shape.groups * params.blocks_per_group;
  for (int64_t item = blockIdx.x / place.blocks; item < items; item += gridDim.x / place.blocks) {
    const int64_t group = item / params.blocks_per_group;
    const int64_t block = item % params.blocks_per_group;
    float gamma[kPackets];
    float dgamma[kPackets];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      dgamma[k] = 0.0f;
      float value[1] = {0.0f};
      if (column(k) < hidden) LoadGamma(args, group * hidden + column(k), value);
      gamma[k] = value[0];
    }
    // All slots of a block make the same number of turns; a slot without a row only takes part in the sums.
    for (int64_t first = block * slots; first < rows; first += params.blocks_per_group * slots) {
      const int64_t row = group * rows + first + slot;
      const bool live = first + slot < rows;
      const float rrms = live ? args.rrms[row] : 0.0f;
      float x[kPackets], dy[kPackets];
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const bool inside = live && column(k) < hidden;
        const int64_t offset = row * hidden + column(k);
        x[k] = inside ? ToFloat(static_cast<const T*>(args.x)[offset]) : 0.0f;
        dy[k] = inside ? ToFloat(static_cast<const D*>(args.dy)[offset]) : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const float normalized = x[k] * rrms;
        sum += dy[k] * gamma[k] * normalized;
        dgamma[k] += dy[k] * (arithmetic.round_before_gamma ? ToFloat(FromFloat<T>(normalized)) : normalized);
      }
      const float c = row_sum(sum) * inverse_hidden;
      if (!live) continue;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column(k) >= hidden) continue;
        static_cast<T*>(args.dx)[row * hidden + column(k)] =
            FromFloat<T>(rrms * (dy[k] * gamma[k] - x[k] * rrms * c));
      }
    }
    if (args.dgamma == nullptr) continue;
    if constexpr (kScope == Scope::kLanes) {
      StoreSlots(params, reinterpret_cast<float*>(shared), slots, slot, group, block, [&](float* columns) {
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          if (column(k) < hidden) columns[column(k)] = dgamma[k];
        }
      });
    } else {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const float value[1] = {dgamma[k]};
        if (column(k) < hidden) StoreDgamma(params, group, block, column(k), value);
      }
    }
  }
}

// Grid: block b of the blocks_per_group that share group g takes its rows b, b + blocks_per_group, ... Any
// hidden size: reads each row twice, and keeps its share of dgamma in `partials`.
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
        LoadGamma(args, group * hidden + column, gammas);
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
    if (partial == nullptr || params.blocks_per_group > 1) continue;
    for (int64_t column = first; column < hidden; column += width) {
      float values[kSize];
      for (int i = 0; i < kSize; ++i) values[i] = partial[column + i];
      StoreDgamma(params, group, block, column, values);
    }
  }
}

}  // namespace jax_rmsnorm
