// What the forward kernels share.
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

struct ForwardParams {
  ForwardArgs args;
  float inverse_hidden;
  int threads_per_row;
  int64_t items;             // of ForwardKernel: rows, or runs of rows where a block takes several
  int64_t blocks_per_group;  // of ForwardRingKernel
  uint32_t turn_ns;          // likewise, see Pace
  RotaryPlaces places;       // of ForwardRotaryKernel
};

template <int kSize>
__device__ __forceinline__ float SumOfSquares(const float (&values)[kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum += values[i] * values[i];
  return sum;
}

// y = x * rrms * gamma.
template <typename T, int kSize>
__device__ __forceinline__ void Normalize(const float (&x)[kSize], float rrms, const float (&gamma)[kSize],
                                          bool round_before_gamma, float (&y)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) y[i] = x[i] * rrms;
  if (round_before_gamma) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] = ToFloat(FromFloat<T>(y[i]));
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) y[i] *= gamma[i];
}

// x + addend, rounded to T: writes h, and puts it in x's place. Packets of x that begin at column(k) of the
// row at element `start`; the addend is of type A.
template <typename A, typename T, int kSize, int kPackets, typename Column>
__device__ __forceinline__ void AddAddends(const ForwardArgs& args, int64_t start, int hidden,
                                           const Column& column, Packet<T, kSize> (&packets)[kPackets]) {
  const A* addend = static_cast<const A*>(args.addend) + start;
  T* h = static_cast<T*>(args.h) + start;
  Packet<A, kSize> addends[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) addends[k].Load(addend + column(k), column(k) < hidden);
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float x[kSize], a[kSize];
    packets[k].Get(x);
    addends[k].Get(a);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] += a[i];
    packets[k].Set(x);
    packets[k].Store(h + column(k), column(k) < hidden);
  }
}

// The same for one packet, at element `at`, and any type of addend.
template <typename T, int kSize>
__device__ __forceinline__ void AddAddend(const ForwardArgs& args, int64_t at, Packet<T, kSize>* packet) {
  WithTypeBeside<T>(args.addend_dtype, [&](auto tag) {
    Packet<T, kSize> packets[1] = {*packet};
    AddAddends<decltype(tag)>(args, at, 1, [](int) { return 0; }, packets);
    *packet = packets[0];
  });
}

__device__ __forceinline__ int64_t GammaRow(const Shape& shape, int64_t row) {
  return shape.groups == 1 ? 0 : row / shape.rows;
}

}  // namespace jax_rmsnorm
