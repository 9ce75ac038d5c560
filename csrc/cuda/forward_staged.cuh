// The forward kernel that stages its row in shared memory: many rows, too long for the registers of a small
// block.
#pragma once

#include "forward_common.cuh"

namespace jax_rmsnorm {

// Grid: a block a row, rows dealt out with the grid as stride.
//
// The sums of a row's strips (see PacketInRow), which are dealt out to the warps, are added up as a cluster
// of any size does. Rows that are not aligned lie in windows.
//
// Preconditions: the tensors are aligned to 16 bytes, with kAligned all rows too; the row fits into the
// shared memory, StageBytes of it.
template <typename T, typename G, bool kAligned>
__global__ __launch_bounds__(kMaxThreads, kAligned || sizeof(G) < 4 ? 3 : 2) void ForwardStagedKernel(
    const __grid_constant__ ForwardParams params) {
  constexpr int kSize = 16 / sizeof(T);
  using StripOfWarp = Strip<kSize, kStripWindows, true>;
  constexpr int kStripSize = kStripWindows * 32 * kSize;
  extern __shared__ uint4 shared[];
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const T* x = static_cast<const T*>(args.x);
  const int hidden = static_cast<int>(args.shape.hidden);
  const int first = static_cast<int>(threadIdx.x) * kSize;
  const int step = static_cast<int>(blockDim.x) * kSize;
  const uint32_t memory = SharedAddress(shared);
  __shared__ float strip_sums[kMaxCluster * kMaxWarps];
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
    const int stop = shift + hidden;
    const T* windows = x + start - shift;
    if (kAligned && args.addend != nullptr) {
#pragma unroll 4
      for (int column = first; column < hidden; column += step) {
        Packet<T, kSize> packet;
        packet.Load(x + start + column);
        AddAddend(args, start + column, &packet);
        StoreShared<16>(address(column), packet.registers);
      }
    } else {
      const int whole = stop / kSize * kSize;
#pragma unroll 4
      for (int at = first; at < whole; at += step) CopyAsync<16>(address(at), windows + at);
      CommitCopies();
      if (!kAligned && threadIdx.x == 0 && whole < stop) {
        StoreShared<16>(address(whole), LoadPart<kSize>(windows + whole, stop - whole).registers);
      }
      WaitCopies<0>();
    }

    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
    const int strips = (stop + kStripSize - 1) / kStripSize;
    for (int s = static_cast<int>(threadIdx.x) / 32; s < strips; s += warps) {
      float part = 0.0f;
      if constexpr (kAligned) {
        const int column = s * kStripSize + lane * kSize;
#pragma unroll
        for (int k = 0; k < kStripWindows; ++k) {
          if (column + k * 32 * kSize >= hidden) break;
          float values[kSize];
          read(column + k * 32 * kSize).Get(values);
          part += SumOfSquares(values);
        }
        part = SumWarp(part);
      } else {
        const StripOfWarp strip(s * kStripSize, 32, lane, 0);
        const auto window = [&](int k) {
          Packet<T, kSize> packet;
          packet.SetZero();
          if (strip.At(k) < stop) packet = read(strip.At(k));
          return packet;
        };
        CircleSum<kSize, kStripWindows> circle;
#pragma unroll
        for (int k = 0; k < kStripWindows; ++k) {
          Packet<T, kSize> packet = window(k);
          if (k == 0) ReplaceHead(strip.Head(shift), window(kStripWindows), &packet);
          float values[kSize];
          packet.Get(values);
          circle.template AddSquares<T>(k, values);
        }
        part = circle.Over(32);
      }
      if (lane == 0) strip_sums[s] = part;
    }
    __syncthreads();
    const float sum = SumMany(SharedAddress(strip_sums), strips);
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && threadIdx.x == 0) args.rrms[row] = rrms;

    const int64_t gamma_start = GammaRow(args.shape, row) * hidden - shift;
    const auto normalize = [&](int at, float (&gamma)[kSize], float (&y)[kSize]) {
      float values[kSize];
      read(at).Get(values);
      Normalize<T>(values, rrms, gamma, arithmetic.round_before_gamma, y);
    };
    if constexpr (kAligned) {
#pragma unroll 2
      for (int column = first; column < hidden; column += step) {
        float gamma[kSize], y[kSize];
        LoadGammaAs<G>(args, gamma_start, column, gamma);
        normalize(column, gamma, y);
        StoreAs<T>(args.y_dtype, args.y, start + column, y);
      }
    } else {
      const auto joined_gamma = JoinedGamma<G, kSize>(args, gamma_start);
      const auto write = [&](int at, auto inner) {
        constexpr bool kInner = decltype(inner)::value;  // whole, and so is all that gamma's is joined of
        const bool present = args.gamma != nullptr;
        float gamma[kSize], y[kSize];
        GetGamma(kInner ? joined_gamma.LoadInner(at, present) : joined_gamma.LoadOne(at, stop), present,
                 arithmetic.zero_centered_gamma, gamma);
        normalize(at, gamma, y);
        const int column = at - shift;
        WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
          using Y = decltype(tag);
          Y* to = static_cast<Y*>(args.y) + start + column;
          if constexpr (kInner) {
            Packet<Y, kSize> packet;
            packet.Set(y);
            packet.Store(to);
          } else {
            StoreWithinRow(to, hidden, column, y);
          }
        });
      };
      const int last = (stop - 1) / kSize * kSize, inner = last - kSize;
      for (int at = first + kSize; at < inner; at += step) write(at, std::true_type{});
      // The first window and the last two.
      if (threadIdx.x < 3) {
        const int at = threadIdx.x == 0 ? 0 : threadIdx.x == 1 ? inner : last;
        write(at, std::false_type{});
      }
    }
    __syncthreads();  // the row is read no more
  }
}

}  // namespace jax_rmsnorm
