// A sum over the threads that share a row whose elements lie now with one of them, now with another.
#pragma once

#include <cstdint>
#include <type_traits>

#include "packet.cuh"
#include "reduce.cuh"

namespace jax_rmsnorm {

// A sum over the kWindows windows of each lane, which lie around a circle: element i of window k of lane l is
// number (k * lanes + l) * kSize + i of it. Has the same bits however the circle is turned: numbers that lie
// half the circle apart are added first, then those a quarter apart, and so on, and the two sides of each
// addition may change places. More than four windows are added up one after another, and three count as four
// of which one is empty: there no term that is not zero may come round (kRound).
template <int kSize, int kWindows>
class CircleSum {
 public:
  static constexpr bool kRound = kWindows == 1 || kWindows == 2 || kWindows == 4;

  __device__ __forceinline__ CircleSum() {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums_[0][i] = sums_[1][i] = 0.0f;
  }

  // Window k, in the order of k; those that are left out count as zero.
  __device__ __forceinline__ void Add(int k, const float (&terms)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums_[k % 2][i] = k < 2 ? terms[i] : __fadd_rn(sums_[k % 2][i], terms[i]);
    }
  }

  // The same of the squares of `values`, which are of type T, in fewer instructions where all of them are
  // exact in float32: float16's are, those of bfloat16 numbers below about 2^-68 are too small.
  template <typename T>
  __device__ __forceinline__ void AddSquares(int k, const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float& sum = sums_[k % 2][i];
      sum = k < 2                       ? __fmul_rn(values[i], values[i])
            : std::is_same_v<T, __half> ? __fmaf_rn(values[i], values[i], sum)
                                        : __fadd_rn(sum, __fmul_rn(values[i], values[i]));
    }
  }

  // For threads whose warps go in pairs, of which one has the windows of even number and the other those of
  // odd number, added as windows 0, 2, ... by either: afterwards both have all. `memory`: kSize * 4 bytes for
  // each thread of the block, all of which must take part; they may be written again after the next barrier.
  __device__ __forceinline__ void Exchange(uint32_t memory) {
    static_assert(kSize % 4 == 0);
    const auto at = [memory](unsigned thread, int i) { return memory + (i / 4 * blockDim.x + thread) * 16; };
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      uint32_t four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = __float_as_uint(sums_[0][i + j]);
      StoreShared<16>(at(threadIdx.x, i), four);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      uint32_t four[4];
      LoadShared<16>(at(threadIdx.x ^ 32, i), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums_[1][i + j] = __uint_as_float(four[j]);
    }
  }

  // Over aligned runs of `lanes` lanes, a power of two and at least kSize. All 32 lanes of the warp must take
  // part; each gets the sum.
  __device__ __forceinline__ float Over(int lanes) const {
    float terms[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      terms[i] = kWindows > 1 ? __fadd_rn(sums_[0][i], sums_[1][i]) : sums_[0][i];
    }
    // Each lane goes on with half of the terms, as long as it has several.
    int offset = lanes / 2;
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2, offset /= 2) {
      const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float kept = upper ? terms[i + half] : terms[i];
        const float given = upper ? terms[i] : terms[i + half];
        terms[i] = kept + __shfl_xor_sync(kFullMask, given, offset);
      }
    }
    float sum = terms[0];
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    offset = lanes / 2;
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2, offset /= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, offset);
    }
    return sum;
  }

  // The same where a window lies in words of kUnit elements: word j of lane l is number j * lanes + l.
  template <int kUnit>
  __device__ __forceinline__ float OverWords(int lanes) const {
    float terms[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      terms[i] = kWindows > 1 ? __fadd_rn(sums_[0][i], sums_[1][i]) : sums_[0][i];
    }
#pragma unroll
    for (int half = kSize / 2; half >= kUnit; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) terms[i] = __fadd_rn(terms[i], terms[i + half]);
    }
    if constexpr (kUnit == 1) return SumLanes(terms[0], lanes);
    const int half = lanes / 2;
    const bool upper = (threadIdx.x & half) != 0;
    const float kept = upper ? terms[1] : terms[0], given = upper ? terms[0] : terms[1];
    float sum = kept + __shfl_xor_sync(kFullMask, given, half);
    for (int offset = half / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    return sum + __shfl_xor_sync(kFullMask, sum, half);
  }

 private:
  float sums_[2][kSize];
};

}  // namespace jax_rmsnorm
