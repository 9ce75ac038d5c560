// Packets: a few consecutive elements, moved between memory and registers in accesses of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../problem.h"

namespace jax_rmsnorm {

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

// 2, 4, 8 or 16 bytes to and from registers of 32 bits, if `inside`; else `to` stays as it is. Spelt out: for
// a condition the compiler branches, which costs a kernel for few rows a fifth of its time, and a word whose
// parts were computed apart it stores in four.
template <int kBytes>
__device__ __forceinline__ void LoadGlobal(const void* from, uint32_t* to, bool inside) {
  const int condition = inside;
  if constexpr (kBytes == 16) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
                 : "l"(from), "r"(condition));
  } else if constexpr (kBytes == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p ld.global.v2.u32 {%0, %1}, [%2];\n}"
                 : "+r"(to[0]), "+r"(to[1])
                 : "l"(from), "r"(condition));
  } else if constexpr (kBytes == 4) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p ld.global.u32 %0, [%1];\n}"
                 : "+r"(to[0])
                 : "l"(from), "r"(condition));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p ld.global.u16 %0, [%1];\n}"
                 : "+r"(to[0])
                 : "l"(from), "r"(condition));
  }
}

template <int kBytes>
__device__ __forceinline__ void StoreGlobal(void* to, const uint32_t* from, bool inside) {
  const int condition = inside;
  if constexpr (kBytes == 16) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
        "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]), "r"(condition)
        : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p st.global.v2.u32 [%0], {%1, %2};\n}" ::"l"(to),
                 "r"(from[0]), "r"(from[1]), "r"(condition)
                 : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.global.u32 [%0], %1;\n}" ::"l"(to),
                 "r"(from[0]), "r"(condition)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.global.u16 [%0], %1;\n}" ::"l"(to),
                 "r"(from[0]), "r"(condition)
                 : "memory");
  }
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

// kSize elements of T as they lie in memory, aligned to min(16, kSize * sizeof(T)) bytes; a single 16-bit
// element in the low half of its register.
template <typename T, int kSize>
struct Packet {
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(T));
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;
  static constexpr int kAccesses = kBytes / kAccess;
  static constexpr int kRegisters = kBytes < 4 ? 1 : kBytes / 4;

  uint32_t registers[kRegisters];

  __device__ __forceinline__ void SetZero() {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) registers[r] = 0;
  }

  // Zeros if not `inside`, whatever `from` is.
  __device__ __forceinline__ void Load(const void* from, bool inside = true) {
    SetZero();
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      LoadGlobal<kAccess>(static_cast<const char*>(from) + a * kAccess, registers + a * 4, inside);
    }
  }

  __device__ __forceinline__ void Store(void* to, bool inside = true) const {
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      StoreGlobal<kAccess>(static_cast<char*>(to) + a * kAccess, registers + a * 4, inside);
    }
  }

  __device__ __forceinline__ void Get(float (&values)[kSize]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = __uint_as_float(registers[i]);
    } else if constexpr (kSize == 1) {
      float unused;
      UnpackPair<T>(registers[0], values[0], unused);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) UnpackPair<T>(registers[i / 2], values[i], values[i + 1]);
    }
  }

  __device__ __forceinline__ void Set(const float (&values)[kSize]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) registers[i] = __float_as_uint(values[i]);
    } else if constexpr (kSize == 1) {
      registers[0] = PackPair<T>(values[0], 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) registers[i / 2] = PackPair<T>(values[i], values[i + 1]);
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

// The same for the type of something beside a T: never the other half.
template <typename T, typename F>
__device__ __forceinline__ void WithTypeBeside(DType dtype, F&& f) {
  if constexpr (sizeof(T) == 4) {
    WithType(dtype, f);
  } else if (dtype == DType::kF32) {
    f(float{});
  } else {
    f(T{});
  }
}

// The values of a packet of gamma; one where there is no gamma.
template <typename G, int kSize>
__device__ __forceinline__ void GetGamma(const Packet<G, kSize>& packet, bool present, bool zero_centered,
                                         float (&values)[kSize]) {
  if (!present) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = 1.0f;
    return;
  }
  packet.Get(values);
  if (zero_centered) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] += 1.0f;
  }
}

// gamma, of type G, at the kSize columns from `column` on of a group, whose gamma begins at element `start`,
// all aligned to packets. Columns that are not `inside` get any value.
template <typename G, typename Args, int kSize>
__device__ __forceinline__ void LoadGammaAs(const Args& args, int64_t start, int column,
                                            float (&gamma)[kSize], bool inside = true) {
  Packet<G, kSize> packet;
  packet.Load(static_cast<const G*>(args.gamma) + start + column, inside && args.gamma != nullptr);
  GetGamma(packet, args.gamma != nullptr, args.arithmetic.zero_centered_gamma, gamma);
}

template <typename Args, int kSize>
__device__ __forceinline__ void LoadGamma(const Args& args, int64_t start, int column,
                                          float (&gamma)[kSize]) {
  WithType(args.gamma_dtype, [&](auto tag) { LoadGammaAs<decltype(tag)>(args, start, column, gamma); });
}

// Stores a packet of something beside a T.
template <typename T, int kSize>
__device__ __forceinline__ void StoreAs(DType dtype, void* to, int64_t offset, const float (&values)[kSize]) {
  WithTypeBeside<T>(dtype, [&](auto tag) {
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

// 4, 8 or 16 bytes to and from registers of 32 bits; to shared memory 2 as well.
template <int kBytes>
__device__ __forceinline__ void LoadShared(uint32_t address, uint32_t* to) {
  if constexpr (kBytes == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
  } else {
    static_assert(kBytes == 4);
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  }
}

template <int kBytes>
__device__ __forceinline__ void StoreShared(uint32_t address, const uint32_t* from) {
  if constexpr (kBytes == 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]), "r"(from[1]),
                 "r"(from[2]), "r"(from[3])
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(from[0]), "r"(from[1]) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(from[0]) : "memory");
  } else {
    static_assert(kBytes == 2);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(from[0])) : "memory");
  }
}

__device__ __forceinline__ float LoadShared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreShared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start, and waits until this one is done.
__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void WaitForPrimary() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Fetches what is at an address to the L2 cache, if it is not there.
__device__ __forceinline__ void PrefetchToL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Asynchronous copy of 4, 8 or 16 bytes, global to shared memory, without a register in between; of zeros if
// not `inside`, whatever `global` is. kCached, and less than 16 bytes always: by way of the L1 cache.
template <int kBytes, bool kCached = false>
__device__ __forceinline__ void CopyAsync(uint32_t shared, const void* global, bool inside = true) {
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16 && !kCached) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared), "l"(global), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace jax_rmsnorm
