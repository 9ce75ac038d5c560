// Vectors of floats in the compiler's own vector types, and their way to and from float32, bfloat16 and
// float16 in memory. The width is that of the instruction set this file is compiled for.
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

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Floats Broadcast(float value) { return value - Floats{}; }

// In the order of a binary tree: halves are added to halves.
inline float Sum(Floats values) {
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

#if defined(__AVX2__) && !defined(__AVX512F__)
// GCC 12 makes a dozen instructions of these conversions. Narrowing is exact where every word is below 2^16.
inline Words WidenBits(Halves bits) { return (Words)_mm256_cvtepu16_epi32((__m128i)bits); }
inline Halves NarrowBits(Words bits) {
  const __m256i words = (__m256i)bits;
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#else
inline Words WidenBits(Halves bits) { return __builtin_convertvector(bits, Words); }
inline Halves NarrowBits(Words bits) { return __builtin_convertvector(bits, Halves); }
#endif

inline Floats Widen(BFloat16, Halves bits) { return BitCast<Floats>(WidenBits(bits) << 16); }

// To the nearest, ties to even. A NaN stays one: the carry of the rounding must not run into its exponent.
inline Halves Narrow(BFloat16, Floats values) {
  const Words bits = BitCast<Words>(values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Words is_nan = BitCast<Words>(values != values);
  return NarrowBits((rounded & ~is_nan) | (quiet & is_nan));
}

#if defined(__AVX512F__)
// The masked forms, with all lanes on: GCC 12's headers warn of an uninitialised value in the plain ones.
inline Floats Widen(Float16, Halves bits) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
inline Halves Narrow(Float16, Floats values) {
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)values, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline Floats Widen(Float16, Halves bits) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
inline Halves Narrow(Float16, Floats values) {
  return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Exponents are moved by integer addition, and subnormals made of normal numbers alone: XLA's threads take
// subnormal float32 for zero.
inline Floats Widen(Float16, Halves bits) {
  const Words wide = WidenBits(bits);
  const Words magnitude = (wide & 0x7fffu) << 13;
  const Words special = BitCast<Words>(magnitude >= 0x0f800000u);  // inf and NaN keep an exponent of all ones
  const Words small = BitCast<Words>(magnitude < 0x00800000u);
  const Words normal = magnitude + 0x38000000u;
  const Words subnormal = BitCast<Words>(BitCast<Floats>(magnitude + 0x38800000u) - 0x1p-14f);
  return BitCast<Floats>((normal & ~small & ~special) | (subnormal & small) |
                         ((magnitude | 0x7f800000u) & special) | ((wide & 0x8000u) << 16));
}

// Normal results by integer rounding of the bits; subnormal ones by an addition whose last bit is float16's.
inline Halves Narrow(Float16, Floats values) {
  const Words bits = BitCast<Words>(values);
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = BitCast<Words>(BitCast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words is_small = BitCast<Words>(magnitude < 0x38800000u);
  const Words is_large = BitCast<Words>(magnitude >= 0x477ff000u);
  const Words is_nan = BitCast<Words>(magnitude > 0x7f800000u);
  Words result = (subnormal & is_small) | (normal & ~is_small);
  result = (result & ~is_large) | (0x7c00u & is_large);
  result = (result & ~is_nan) | (0x7e00u & is_nan);
  return NarrowBits(result | sign);
}
#endif

inline Floats Load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

inline void Store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

template <typename T>
inline Floats Load(const T* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  return Widen(T{}, bits);
}

template <typename T>
inline void Store(T* to, Floats values) {
  const Halves bits = Narrow(T{}, values);
  std::memcpy(to, &bits, sizeof(bits));
}

// The first `count` lanes, 0 < count < kLanes; the others read as zero, and are not written.
template <typename T>
inline Floats LoadSome(const T* from, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return Load(lanes);
}

template <typename T>
inline void StoreSome(T* to, Floats values, int64_t count) {
  T lanes[kLanes];
  Store(lanes, values);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

// The value after a round trip through T.
template <typename T>
inline Floats RoundTo(Floats values) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return values;
  } else {
    return Widen(T{}, Narrow(T{}, values));
  }
}

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
