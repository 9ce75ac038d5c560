// Vectors of floats in the compiler's own vector types. The width is that of the instruction set this file is
// compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jax_rmsnorm {
namespace JAX_RMSNORM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kStep = 2 * kLanes;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// What a loop takes at a step: kStep values in two vectors.
struct Floats {
  Vector a, b;
};

inline Floats operator+(Floats x, Floats y) { return {x.a + y.a, x.b + y.b}; }
inline Floats operator-(Floats x, Floats y) { return {x.a - y.a, x.b - y.b}; }
inline Floats operator*(Floats x, Floats y) { return {x.a * y.a, x.b * y.b}; }
inline Floats operator*(Floats x, float y) { return {x.a * y, x.b * y}; }

inline Floats Broadcast(float value) { return {value - Vector{}, value - Vector{}}; }

template <typename To, typename From>
inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// In the order of a binary tree: halves are added to halves.
inline float Sum(Vector values) {
#if defined(__AVX512F__)
  struct Parts {
    __m256 low, high;
  };
  const auto parts = BitCast<Parts>(values);
  const __m256 half = _mm256_add_ps(parts.low, parts.high);
#elif defined(__AVX2__)
  const __m256 half = (__m256)values;
#endif
#if defined(__AVX2__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  float lanes[kLanes];
  std::memcpy(lanes, &values, sizeof(values));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

inline float Sum(Floats values) { return Sum(values.a + values.b); }

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
