// What the handlers call: from a problem to kernels on a stream. Nothing here allocates, synchronises or
// tunes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../problem.h"
#include "config.h"

namespace jax_rmsnorm {

// Reads the current device's limits, once a device.
cudaError_t CurrentDevice(Device* device);

cudaError_t LaunchForward(const ForwardArgs& args, int margin, cudaStream_t stream);
cudaError_t LaunchBackward(const BackwardArgs& args, int margin, cudaStream_t stream);

// f(T{}) with the element type that `dtype` names.
template <typename F>
cudaError_t DispatchType(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(__nv_bfloat16{});
    case DType::kF16:
      return f(__half{});
  }
  return cudaErrorInvalidValue;
}

// The same for the type of something beside a T: never the other half.
template <typename T, typename F>
cudaError_t DispatchTypeBeside(DType dtype, F&& f) {
  if constexpr (sizeof(T) == 4) {
    return DispatchType(dtype, f);
  } else {
    return dtype == DType::kF32 ? f(float{}) : f(T{});
  }
}

// Launches `kernel(params)` in the grid, block, cluster and shared memory of `config`.
template <typename Params>
cudaError_t LaunchKernel(void (*kernel)(Params), const Params& params, const LaunchConfig& config,
                         cudaStream_t stream) {
  constexpr int64_t kDefaultSharedMemory = 48 * 1024 - kOtherSharedMemory;
  constexpr int kPortableCluster = 8;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (config.shared_memory > kDefaultSharedMemory) {
    // The limit belongs to the kernel, which other threads may be launching with other sizes: always the same
    // value.
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.most_shared_memory));
    if (error != cudaSuccess) return error;
  }
  if (config.cluster > kPortableCluster) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (config.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.grid));
  launch.blockDim = dim3(static_cast<unsigned>(config.block));
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_memory);
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = count;
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernelExC(&launch, function, arguments);
}

}  // namespace jax_rmsnorm
