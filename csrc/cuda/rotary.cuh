// Rotary embedding: where a row's cosines and sines are, and the rotation of packets.
#pragma once

#include <cstdint>

#include "launch.h"
#include "packet.cuh"

namespace jax_rmsnorm {

// Division of 0 <= n < 2^31 by a constant d > 0: by a product and a shift (Granlund and Montgomery 1994).
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < static_cast<uint64_t>(divisor)) ++shift_;
    magic_ =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor_)) / divisor_ + 1);
  }

  __device__ __forceinline__ uint32_t Quotient(uint32_t n) const {
    return (__umulhi(n, magic_) + n) >> shift_;
  }
  __device__ __forceinline__ uint32_t Remainder(uint32_t n) const { return n - Quotient(n) * divisor_; }

 private:
  uint32_t divisor_, magic_ = 0, shift_ = 0;
};

// From rows to rows of cos and sin.
class RotaryPlaces {
 public:
  explicit RotaryPlaces(const Rotary& rotary)
      : heads_(rotary.heads), positions_(rotary.positions), half_(rotary.width / 2) {}

  // The first element of row `row`'s cosines.
  __device__ __forceinline__ int64_t Start(int64_t row) const {
    return static_cast<int64_t>(positions_.Remainder(heads_.Quotient(static_cast<uint32_t>(row)))) * half_;
  }

 private:
  Divisor heads_, positions_;
  int64_t half_;
};

// kCount cosines and sines in float32, from element `at` of either on; zeros if not `inside`.
template <int kCount>
__device__ __forceinline__ void LoadAngles(const Rotary& rotary, int64_t at, float (&cos)[kCount],
                                           float (&sin)[kCount], bool inside = true) {
  WithType(rotary.dtype, [&](auto tag) {
    using C = decltype(tag);
    Packet<C, kCount> of_cos, of_sin;
    of_cos.Load(static_cast<const C*>(rotary.cos) + at, inside);
    of_sin.Load(static_cast<const C*>(rotary.sin) + at, inside);
    of_cos.Get(cos);
    of_sin.Get(sin);
  });
}

// (a, b) -> (a cos - b sin, b cos + a sin), element by element.
template <int kSize>
__device__ __forceinline__ void RotateHalves(const float (&cos)[kSize], const float (&sin)[kSize],
                                             float (&a)[kSize], float (&b)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float first = a[i];
    a[i] = first * cos[i] - b[i] * sin[i];
    b[i] = b[i] * cos[i] + first * sin[i];
  }
}

// The same of neighbours: a pair has one cosine and one sine. kBack: by the opposite angle.
template <bool kBack, int kSize>
__device__ __forceinline__ void RotateNeighbours(const float (&cos)[kSize / 2], const float (&sin)[kSize / 2],
                                                 float (&values)[kSize]) {
  constexpr int kFirst = kBack ? 1 : 0;
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    const float first = values[i + kFirst], second = values[i + 1 - kFirst];
    values[i + kFirst] = first * cos[i / 2] - second * sin[i / 2];
    values[i + 1 - kFirst] = second * cos[i / 2] + first * sin[i / 2];
  }
}

}  // namespace jax_rmsnorm
