// The elements of rows, float32, bfloat16 and float16, and their way to vectors of floats and back.
#pragma once

#include <type_traits>

#include "simd.h"

namespace jax_rmsnorm {
namespace JAX_RMSNORM_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A bfloat16 among bfloat16 alone, which go faster: see its Load and Store.
struct PureBFloat16 {
  uint16_t bits;
};

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

inline Vector Widen(BFloat16, Halves bits) { return BitCast<Vector>(WidenBits(bits) << 16); }

// The nearest bfloat16, ties to even, in the upper halves; the lower ones are left over. For numbers, and for
// NaNs whose lower half is zero: the carry from any other could run into its exponent.
inline Words RoundUpperHalves(Words bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }

inline Halves Narrow(BFloat16, Vector values) {
  const Words bits = BitCast<Words>(values);
  const Words quiet = (bits >> 16) | 0x40u;
  const Words is_nan = BitCast<Words>(values != values);
  return NarrowBits(((RoundUpperHalves(bits) >> 16) & ~is_nan) | (quiet & is_nan));
}

#if defined(__AVX512F__)
// The masked forms, with all lanes on: GCC 12's headers warn of an uninitialised value in the plain ones.
inline Vector Widen(Float16, Halves bits) { return (Vector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
inline Halves Narrow(Float16, Vector values) {
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)values, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline Vector Widen(Float16, Halves bits) { return (Vector)_mm256_cvtph_ps((__m128i)bits); }
inline Halves Narrow(Float16, Vector values) {
  return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Exponents are moved by integer addition, and subnormals made of normal numbers alone: XLA's threads take
// subnormal float32 for zero.
inline Vector Widen(Float16, Halves bits) {
  const Words wide = WidenBits(bits);
  const Words magnitude = (wide & 0x7fffu) << 13;
  const Words special = BitCast<Words>(magnitude >= 0x0f800000u);  // inf and NaN keep an exponent of all ones
  const Words small = BitCast<Words>(magnitude < 0x00800000u);
  const Words normal = magnitude + 0x38000000u;
  const Words subnormal = BitCast<Words>(BitCast<Vector>(magnitude + 0x38800000u) - 0x1p-14f);
  return BitCast<Vector>((normal & ~small & ~special) | (subnormal & small) |
                         ((magnitude | 0x7f800000u) & special) | ((wide & 0x8000u) << 16));
}

// Normal results by integer rounding of the bits; subnormal ones by an addition whose last bit is float16's.
inline Halves Narrow(Float16, Vector values) {
  const Words bits = BitCast<Words>(values);
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = BitCast<Words>(BitCast<Vector>(magnitude) + 0.5f) - 0x3f000000u;
  const Words is_small = BitCast<Words>(magnitude < 0x38800000u);
  const Words is_large = BitCast<Words>(magnitude >= 0x477ff000u);
  const Words is_nan = BitCast<Words>(magnitude > 0x7f800000u);
  Words result = (subnormal & is_small) | (normal & ~is_small);
  result = (result & ~is_large) | (0x7c00u & is_large);
  result = (result & ~is_nan) | (0x7e00u & is_nan);
  return NarrowBits(result | sign);
}
#endif

// One vector at a time: GCC 12 moves two, as one struct or array, through the stack.
template <typename V>
inline V LoadVector(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename V>
inline void StoreVector(void* to, V vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

inline Floats Load(const float* from) {
  return {LoadVector<Vector>(from), LoadVector<Vector>(from + kLanes)};
}

inline void Store(float* to, Floats values) {
  StoreVector(to, values.a);
  StoreVector(to + kLanes, values.b);
}

template <typename T>
inline Floats Load(const T* from) {
  return {Widen(T{}, LoadVector<Halves>(from)), Widen(T{}, LoadVector<Halves>(from + kLanes))};
}

template <typename T>
inline void Store(T* to, Floats values) {
  StoreVector(to, Narrow(T{}, values.a));
  StoreVector(to + kLanes, Narrow(T{}, values.b));
}

inline Vector PlainNaN(Vector values) {
  const Words is_nan = BitCast<Words>(values != values);
  return BitCast<Vector>((BitCast<Words>(values) & ~is_nan) | (0x7fc00000u & is_nan));
}

// Two neighbouring elements are the halves of a word, so that even columns make one vector and odd ones the
// other without moving anything between lanes.
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 is read in pairs, of which the first is the lower half of a word"
#endif
inline Floats Load(const PureBFloat16* from) {
  const auto words = LoadVector<Words>(from);
  return {BitCast<Vector>(words << 16), BitCast<Vector>(words & 0xffff0000u)};
}

// A NaN made of bfloat16 operands is one of them, made quiet, or the processor's own: its lower half is zero.
inline void Store(PureBFloat16* to, Floats values) {
  const Words even = RoundUpperHalves(BitCast<Words>(values.a)) >> 16;
  const Words odd = RoundUpperHalves(BitCast<Words>(values.b)) & 0xffff0000u;
  StoreVector(to, even | odd);
}

// Values in the order of their columns -> the even columns in one vector, the odd ones in the other.
inline Floats Deinterleave(Floats values) {
  float columns[kStep], even[kLanes], odd[kLanes];
  Store(columns, values);
  for (int i = 0; i < kLanes; ++i) even[i] = columns[2 * i];
  for (int i = 0; i < kLanes; ++i) odd[i] = columns[2 * i + 1];
  return {LoadVector<Vector>(even), LoadVector<Vector>(odd)};
}

// And back.
inline Floats Interleave(Floats values) {
  float columns[kStep], even[kLanes], odd[kLanes];
  StoreVector(even, values.a);
  StoreVector(odd, values.b);
  for (int i = 0; i < kLanes; ++i) {
    columns[2 * i] = even[i];
    columns[2 * i + 1] = odd[i];
  }
  return Load(columns);
}

// Values in the order of their columns -> in the order of Load<T>. NaNs become plain ones, as Store expects.
template <typename T>
inline Floats ToOrderOf(Floats values) {
  if constexpr (!std::is_same_v<T, PureBFloat16>) return values;
  const Floats pairs = Deinterleave(values);
  return {PlainNaN(pairs.a), PlainNaN(pairs.b)};
}

// And back.
template <typename T>
inline Floats FromOrderOf(Floats values) {
  if constexpr (!std::is_same_v<T, PureBFloat16>) return values;
  return Interleave(values);
}

// The first `count` columns of a step, 0 < count < kStep; the others read as zero, and are not written.
template <typename T>
inline Floats LoadSome(const T* from, int64_t count) {
  T elements[kStep] = {};
  std::memcpy(elements, from, static_cast<size_t>(count) * sizeof(T));
  return Load(elements);
}

template <typename T>
inline void StoreSome(T* to, Floats values, int64_t count) {
  T elements[kStep];
  Store(elements, values);
  std::memcpy(to, elements, static_cast<size_t>(count) * sizeof(T));
}

// The values after a round trip through T.
template <typename T>
inline Floats RoundTo(Floats values) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return values;
  } else {
    T elements[kStep];
    Store(elements, values);
    return Load(elements);
  }
}

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
