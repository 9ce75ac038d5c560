// Packets: a few consecutive elements, moved between memory and registers in accesses of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../problem.h"

namespace jax_rmsnorm {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T FromFloat(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

template <typename Word>
__device__ __forceinline__ Word LoadGlobal(const Word* from) {
  return *from;
}

template <typename Word>
__device__ __forceinline__ void StoreGlobal(Word* to, Word word) {
  *to = word;
}

// Spelt out for 16 bytes: the compiler takes a word apart where its parts were computed apart, and stores it
// in four.
__device__ __forceinline__ uint4 LoadGlobal(const uint4* from) {
  uint4 word;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from));
  return word;
}

__device__ __forceinline__ void StoreGlobal(uint4* to, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w)
               : "memory");
}

// Two 16-bit elements in a 32-bit word, the first in its low half: one instruction an element, or less.
template <typename T>
__device__ __forceinline__ void UnpackPair(uint32_t pair, float& first, float& second) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
  } else {
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    first = values.x;
    second = values.y;
  }
}

template <typename T>
__device__ __forceinline__ uint32_t PackPair(float first, float second) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// kSize elements of T as they lie in memory, aligned to min(16, kSize * sizeof(T)) bytes.
template <typename T, int kSize>
struct Packet {
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(T));
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;
  static constexpr int kWords = kBytes / kAccess;
  using Word = typename WordOf<kAccess>::type;

  Word words[kWords];

  __device__ __forceinline__ void SetZero() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = Word{};
  }

  __device__ __forceinline__ void Load(const void* from) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = LoadGlobal(static_cast<const Word*>(from) + w);
  }

  __device__ __forceinline__ void Store(void* to) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) StoreGlobal(static_cast<Word*>(to) + w, words[w]);
  }

  __device__ __forceinline__ void Get(float (&values)[kSize]) const {
    if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(words);
#pragma unroll
      for (int i = 0; i < kSize; i += 2) UnpackPair<T>(pairs[i / 2], values[i], values[i + 1]);
    } else {
      const T* elements = reinterpret_cast<const T*>(words);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = ToFloat(elements[i]);
    }
  }

  __device__ __forceinline__ void Set(const float (&values)[kSize]) {
    if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(words);
#pragma unroll
      for (int i = 0; i < kSize; i += 2) pairs[i / 2] = PackPair<T>(values[i], values[i + 1]);
    } else {
      T* elements = reinterpret_cast<T*>(words);
#pragma unroll
      for (int i = 0; i < kSize; ++i) elements[i] = FromFloat<T>(values[i]);
    }
  }
};

// Calls f(T{}) with the element type that `dtype` names: one branch, the same for the whole grid.
template <typename F>
__device__ __forceinline__ void WithType(DType dtype, F&& f) {
  if (dtype == DType::kBF16) {
    f(__nv_bfloat16{});
  } else if (dtype == DType::kF16) {
    f(__half{});
  } else {
    f(float{});
  }
}

// gamma's kSize values from `offset` on; one where there is no gamma.
template <int kSize>
__device__ __forceinline__ void LoadGamma(const void* gamma, DType dtype, bool zero_centered, int64_t offset,
                                          float (&values)[kSize]) {
  if (gamma == nullptr) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = 1.0f;
    return;
  }
  WithType(dtype, [&](auto tag) {
    using G = decltype(tag);
    Packet<G, kSize> packet;
    packet.Load(static_cast<const G*>(gamma) + offset);
    packet.Get(values);
  });
  if (zero_centered) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] += 1.0f;
  }
}

template <int kSize>
__device__ __forceinline__ void StoreAs(DType dtype, void* to, int64_t offset, const float (&values)[kSize]) {
  WithType(dtype, [&](auto tag) {
    using Y = decltype(tag);
    Packet<Y, kSize> packet;
    packet.Set(values);
    packet.Store(static_cast<Y*>(to) + offset);
  });
}

// Shared memory by its own 32-bit addresses, which spares the translation of generic ones.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 word;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(address)
               : "memory");
  return word;
}

__device__ __forceinline__ void ZeroShared16(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Asynchronous copy of 16 bytes, global to shared memory, without a register in between.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace jax_rmsnorm
