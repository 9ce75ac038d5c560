#include <algorithm>

#include "roof.h"

namespace jax_rmsnorm {
namespace {

__device__ __forceinline__ uint4 Combine(uint4 a, uint4 b) {
  return {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
}

// Grid: one thread for every kUnroll words of 16 bytes, a block's words contiguous.
template <int kUnroll, bool kTwo>
__global__ void RoofKernel(const uint4* __restrict__ a, const uint4* __restrict__ b, uint4* __restrict__ out,
                           int64_t words) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x * kUnroll + threadIdx.x;
  uint4 values[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t word = first + i * static_cast<int64_t>(blockDim.x);
    if (word < words) values[i] = kTwo ? Combine(__ldcs(a + word), __ldcs(b + word)) : __ldcs(a + word);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t word = first + i * static_cast<int64_t>(blockDim.x);
    if (word < words) __stcs(out + word, values[i]);
  }
}

template <int kUnroll>
cudaError_t Launch(const void* a, const void* b, void* out, int64_t words, int threads, cudaStream_t stream) {
  const int64_t per_block = int64_t{kUnroll} * threads;
  const auto grid = static_cast<unsigned>((words + per_block - 1) / per_block);
  const auto* from_a = static_cast<const uint4*>(a);
  const auto* from_b = static_cast<const uint4*>(b);
  auto* to = static_cast<uint4*>(out);
  if (b == nullptr) {
    RoofKernel<kUnroll, false><<<grid, threads, 0, stream>>>(from_a, from_b, to, words);
  } else {
    RoofKernel<kUnroll, true><<<grid, threads, 0, stream>>>(from_a, from_b, to, words);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchRoof(const void* a, const void* b, void* out, int64_t bytes, int variant,
                       cudaStream_t stream) {
  const int64_t words = bytes / 16;
  if (words == 0) return cudaSuccess;
  const int threads = variant % 2 == 0 ? 256 : 512;
  switch (variant / 2) {
    case 0:
      return Launch<1>(a, b, out, words, threads, stream);
    case 1:
      return Launch<2>(a, b, out, words, threads, stream);
    case 2:
      return Launch<4>(a, b, out, words, threads, stream);
    default:
      return Launch<8>(a, b, out, words, threads, stream);
  }
}

}  // namespace jax_rmsnorm
