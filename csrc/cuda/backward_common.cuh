// What the backward kernels share.
#pragma once

#include <cstdint>

#include "circle_sum.cuh"
#include "launch.h"
#include "packet.cuh"
#include "reduce.cuh"
#include "rotary.cuh"
#include "split_sum.cuh"
#include "unaligned.cuh"

namespace jax_rmsnorm {

struct BackwardParams {
  BackwardArgs args;
  float inverse_hidden;
  int threads_per_row;
  int slots;        // of a block of BackwardFewKernel or BackwardBulkKernel
  int ring_places;  // of the latter, and the bytes of one, of which x has the first ones
  uint32_t place_bytes, x_bytes;
  int64_t blocks_per_group;
  int64_t tiles;        // of dgamma, in a group, where BackwardFewKernel works
  int tile_packets;     // columns of such a tile, in packets: a power of two
  uint32_t turn_ns;     // see Pace
  RotaryPlaces places;  // of BackwardRotaryKernel
};

// A thread's part of the sum over a row of dy * gamma * x, and dgamma += dy * x * rrms. Here and below each
// operation is spelt out: which products the compiler would fuse with a sum differs from kernel to kernel,
// and a row has the same bits in all.
template <typename T, int kSize>
__device__ __forceinline__ float Accumulate(const float (&x)[kSize], const float (&dy)[kSize],
                                            const float (&gamma)[kSize], float rrms, bool round_before_gamma,
                                            float (&dgamma)[kSize]) {
  float sums[2] = {};  // chains of additions, which wait for one another
  if (round_before_gamma) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums[i % 2] = __fmaf_rn(__fmul_rn(dy[i], x[i]), gamma[i], sums[i % 2]);
      dgamma[i] = __fmaf_rn(dy[i], ToFloat(FromFloat<T>(__fmul_rn(x[i], rrms))), dgamma[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float product = __fmul_rn(dy[i], x[i]);
      sums[i % 2] = __fmaf_rn(product, gamma[i], sums[i % 2]);
      dgamma[i] = __fmaf_rn(product, rrms, dgamma[i]);
    }
  }
  return sums[0] + sums[1];
}

// The same for windows: the products of the sum one by one, for a CircleSum.
template <typename T, int kSize>
__device__ __forceinline__ void AccumulateWindow(const float (&x)[kSize], const float (&dy)[kSize],
                                                 const float (&gamma)[kSize], float rrms,
                                                 bool round_before_gamma, float (&dgamma)[kSize],
                                                 float (&terms)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) terms[i] = __fmul_rn(__fmul_rn(dy[i], x[i]), gamma[i]);
  if (round_before_gamma) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      dgamma[i] = __fmaf_rn(dy[i], ToFloat(FromFloat<T>(__fmul_rn(x[i], rrms))), dgamma[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) dgamma[i] = __fmaf_rn(__fmul_rn(dy[i], x[i]), rrms, dgamma[i]);
  }
}

// The first `count` of the values are replaced by those of `by`.
template <int kSize>
__device__ __forceinline__ void ReplaceHead(int count, const float (&by)[kSize], float (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = i < count ? by[i] : values[i];
}

// gamma at the columns of a strip of a row that begins at element `start` of gamma and `shift` elements into
// its first window; zero outside the row.
template <int kSize, int kPackets, bool kTail, int kShare>
__device__ __forceinline__ void LoadGammaOfStrip(const BackwardArgs& args, int64_t start, int shift,
                                                 const Strip<kSize, kPackets, kTail, kShare>& strip,
                                                 float (&gamma)[kPackets][kSize], float (&tail)[kSize]) {
  const int hidden = static_cast<int>(args.shape.hidden);
  WithType(args.gamma_dtype, [&](auto tag) {
    Packet<decltype(tag), kSize> packets[strip.kWindows];
    JoinedGamma<decltype(tag), kSize>(args, start - shift)
        .Load(shift + hidden, strip.At(0), strip.Stride(), packets);
#pragma unroll
    for (int k = 0; k < strip.kWindows; ++k) {
      float values[kSize];
      GetGamma(packets[k], args.gamma != nullptr, args.arithmetic.zero_centered_gamma, values);
      ZeroOutside(hidden, strip.At(k) - shift, values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) (k < kPackets ? gamma[k] : tail)[i] = values[i];
    }
  });
}

// Adds up the products of a strip of a row: product(k, terms) gets those of its window k, and tail(terms)
// those of the tail, which count as far as they are the strip's. Windows that kShare warps share are numbered
// as the strip's. Round the circle the tail takes the place of what the first window has of another strip;
// where that does not do it is a window of its own.
template <int kSize, int kPackets, bool kTail, int kShare, typename Product, typename Tail>
__device__ __forceinline__ auto SumOfStrip(const Strip<kSize, kPackets, kTail, kShare>& strip, int shift,
                                           int stop, const Product& product, const Tail& tail) {
  constexpr int kOfStrip = kPackets * kShare;
  constexpr bool kRound = !kTail || CircleSum<kSize, kOfStrip>::kRound;
  static_assert(kRound || kShare == 1);
  CircleSum<kSize, kOfStrip == 3 ? 4 : kOfStrip> circle;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float terms[kSize];
    product(k, terms);
    if (k == 0) {
      float ends[kSize] = {};
      if (kRound && kTail && strip.At(kPackets) < stop) tail(ends);
      ReplaceHead(strip.Head(shift), ends, terms);
    }
    circle.Add(k * kShare, terms);
  }
  if constexpr (!kTail && kOfStrip == 3) {  // as it is there where warps share
    const float none[kSize] = {};
    circle.Add(3, none);
  }
  if constexpr (!kRound) {
    if (strip.At(kPackets) < stop) {
      float ends[kSize];
      tail(ends);
#pragma unroll
      for (int i = 0; i < kSize; ++i) ends[i] = i < shift ? ends[i] : 0.0f;
      circle.Add(kPackets, ends);
    }
  }
  return circle;
}

// -rrms^3 * mean, without a cube of rrms, which may be too small for float32 where the product is not.
__device__ __forceinline__ float Slope(float rrms, float mean) { return -(rrms * mean) * rrms * rrms; }

// dx = rrms * (dy * gamma - x * rrms^2 * mean), `mean` being the row's of dy * gamma * x.
template <int kSize>
__device__ __forceinline__ void Differentiate(const float (&x)[kSize], const float (&dy)[kSize],
                                              const float (&gamma)[kSize], float rrms, float slope,
                                              float (&dx)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    dx[i] = __fmaf_rn(__fmul_rn(dy[i], rrms), gamma[i], __fmul_rn(x[i], slope));
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void AddPacket(const Packet<T, kSize>& packet, float (&values)[kSize]) {
  float more[kSize];
  packet.Get(more);
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] += more[i];
}

// dy += the gradients of y beyond the first, at the kSize columns from element `at` on, if `inside`.
template <typename D, int kSize>
__device__ __forceinline__ void AddGradients(const BackwardArgs& args, int64_t at, bool inside,
                                             float (&dy)[kSize]) {
#pragma unroll
  for (int g = 1; g < kMostGradients; ++g) {
    if (g >= args.gradients) return;
    Packet<D, kSize> packet;
    packet.Load(static_cast<const D*>(args.dy[g]) + at, inside);
    AddPacket(packet, dy);
  }
}

// Runs of kSize lanes, each with kSize values: afterwards values[i] of lane r is what values[r] of lane i
// was.
template <int kSize>
__device__ __forceinline__ void Transpose(float (&values)[kSize]) {
#pragma unroll
  for (int half = kSize / 2; half > 0; half /= 2) {
    const bool upper = (threadIdx.x & half) != 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if ((i & half) != 0) continue;
      const float given = upper ? values[i] : values[i + half];
      const float taken = __shfl_xor_sync(kFullMask, given, half);
      values[i] = upper ? taken : values[i];
      values[i + half] = upper ? values[i + half] : taken;
    }
  }
}

// Where a block's part of dgamma goes: into its partial row, or into dgamma itself where the group has no
// other block. `group` and `block` count from 0.
struct DgammaPlace {
  __device__ DgammaPlace(const BackwardParams& params, int64_t group, int64_t block)
      : whole(params.blocks_per_group == 1),
        dtype(whole ? params.args.gamma_dtype : DType::kF32),
        to(whole ? params.args.dgamma : params.args.partials),
        start((whole ? group : group * params.args.partial_rows + block) * params.args.shape.hidden) {}

  bool whole;
  DType dtype;
  void* to;
  int64_t start;  // the element of column 0
};

// Values at the columns from `column` on, all within the row.
template <int kSize>
__device__ __forceinline__ void StoreDgamma(const DgammaPlace& place, int64_t column,
                                            const float (&values)[kSize]) {
  StoreAs<float>(place.dtype, place.to, place.start + column, values);
}

// Values at the columns column, column + kSize, ..., as far as they are within the row. `more`: added to what
// is there, in a partial row.
template <int kSize>
__device__ __forceinline__ void StoreDgammaApart(const DgammaPlace& place, int hidden, int column,
                                                 const float (&values)[kSize], bool more) {
  const auto inside = [&](int i) { return column + i * kSize >= 0 && column + i * kSize < hidden; };
  float totals[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float* before = static_cast<const float*>(place.to) + place.start + column + i * kSize;
    totals[i] = more && inside(i) ? __ldcg(before) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) totals[i] += values[i];
  WithType(place.dtype, [&](auto tag) {
    using To = decltype(tag);
    To* to = static_cast<To*>(place.to) + place.start + column;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (inside(i)) to[i * kSize] = FromFloat<To>(totals[i]);
    }
  });
}

// A block's part of dgamma out of those of its threads: each of `slots` runs of threads has one of its own at
// columns column[k] on. Those of several slots are added up one after another, in `shares`: float32 [slots,
// hidden] of shared memory, which all threads have read by the end. `more`: see StoreDgammaApart; of one
// slot.
template <bool kAligned, int kSize, int kPackets>
__device__ __forceinline__ void StoreBlockDgamma(const BackwardParams& params, int64_t group, int64_t block,
                                                 int slots, int slot, const int (&column)[kPackets],
                                                 const float (&dgamma)[kPackets][kSize], float* shares,
                                                 bool more = false) {
  const int hidden = static_cast<int>(params.args.shape.hidden);
  const DgammaPlace place(params, group, block);
  if (slots == 1) {
    if constexpr (kAligned) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (column[k] < hidden) StoreDgamma(place, column[k], dgamma[k]);
      }
    } else {
      // The columns are not aligned: single elements, of which neighbouring lanes have neighbouring ones.
      const int lane = static_cast<int>(threadIdx.x) % kSize;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        float values[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] = dgamma[k][i];
        Transpose(values);
        StoreDgammaApart(place, hidden, column[k] - lane * (kSize - 1), values, more);
      }
    }
    return;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    if constexpr (kAligned) {  // words as wide as can be: single ones of neighbours meet in the same banks
      constexpr int kWord = kSize < 4 ? kSize : 4;
      const uint32_t to = SharedAddress(shares) + (slot * hidden + column[k]) * 4;
      Packet<float, kSize> packet;
      packet.Set(dgamma[k]);
      if (column[k] >= hidden) continue;
#pragma unroll
      for (int i = 0; i < kSize; i += kWord) StoreShared<kWord * 4>(to + i * 4, packet.registers + i);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int at = column[k] + i;
        if (at >= 0 && at < hidden) shares[slot * hidden + at] = dgamma[k][i];
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < hidden; at += blockDim.x) {
    float total[1] = {0.0f};
#pragma unroll 8
    for (int s = 0; s < slots; ++s) total[0] += shares[s * hidden + at];
    StoreDgamma(place, at, total);
  }
  __syncthreads();
}

}  // namespace jax_rmsnorm
