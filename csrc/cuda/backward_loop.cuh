// The backward kernel for rows too long for all others, and for tensors of any alignment.
#pragma once

#include "backward_common.cuh"

namespace jax_rmsnorm {

// Grid: block b of the blocks_per_group that share group g takes its rows b, b + blocks_per_group, ... Any
// hidden size: reads each row twice, and keeps its share of dgamma in `partials`. kSize = 1: any alignment.
template <typename T, typename D, int kSize>
__global__ __launch_bounds__(512) void BackwardLoopKernel(const __grid_constant__ BackwardParams params) {
  const BackwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int64_t hidden = args.shape.hidden;
  const int64_t rows = args.shape.rows;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize;
  const int64_t width = static_cast<int64_t>(blockDim.x) * kSize;
  RowSum<Scope::kLoop> row_sum(blockDim.x);
  LaunchDependents();
  WaitForPrimary();

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
        dy.Load(static_cast<const D*>(args.dy[0]) + offset + column);
        x.Get(xs);
        dy.Get(dys);
        AddGradients<D>(args, offset + column, true, dys);
        WithType(args.gamma_dtype, [&](auto tag) {
          using G = decltype(tag);
          const G* gamma = static_cast<const G*>(args.gamma);
          Packet<G, kSize> packet;
          packet.Load(gamma + group * hidden + column, gamma != nullptr);
          GetGamma(packet, gamma != nullptr, arithmetic.zero_centered_gamma, gammas);
        });
      };
      float sum = 0.0f;
      for (int64_t column = first; column < hidden; column += width) {
        load(column);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum += dys[i] * gammas[i] * (xs[i] * rrms);
      }
      const float c = row_sum(sum) * params.inverse_hidden;
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
        if (args.dh != nullptr) {
          Packet<T, kSize> dh;
          dh.Load(static_cast<const T*>(args.dh) + offset + column);
          AddPacket(dh, xs);
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
      StoreDgamma(DgammaPlace(params, group, block), column, values);
    }
  }
}

}  // namespace jax_rmsnorm
