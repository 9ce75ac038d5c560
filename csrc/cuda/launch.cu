// From a problem to kernels: alignment, configuration, dispatch on dtypes, and the finish of dgamma.
#include <algorithm>
#include <mutex>
#include <utility>

#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace jax_rmsnorm {

// Each compiled in a file of its own, so that they build in parallel.
extern template cudaError_t LaunchForwardAs<float>(const ForwardArgs&, const LaunchConfig&, cudaStream_t);
extern template cudaError_t LaunchForwardAs<__nv_bfloat16>(const ForwardArgs&, const LaunchConfig&,
                                                           cudaStream_t);
extern template cudaError_t LaunchForwardAs<__half>(const ForwardArgs&, const LaunchConfig&, cudaStream_t);
#define JAX_RMSNORM_EXTERN_BACKWARD(T, D) \
  extern template cudaError_t LaunchBackwardAs<T, D>(const BackwardArgs&, const LaunchConfig&, cudaStream_t)
JAX_RMSNORM_EXTERN_BACKWARD(float, float);
JAX_RMSNORM_EXTERN_BACKWARD(float, __nv_bfloat16);
JAX_RMSNORM_EXTERN_BACKWARD(float, __half);
JAX_RMSNORM_EXTERN_BACKWARD(__nv_bfloat16, float);
JAX_RMSNORM_EXTERN_BACKWARD(__nv_bfloat16, __nv_bfloat16);
JAX_RMSNORM_EXTERN_BACKWARD(__half, float);
JAX_RMSNORM_EXTERN_BACKWARD(__half, __half);
#undef JAX_RMSNORM_EXTERN_BACKWARD

namespace {

bool AlignedTo(int64_t bytes, const void* data) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether the tensor at `data` begins at a multiple of 16 bytes. A null tensor is no obstacle.
bool Aligned(const void* data) { return AlignedTo(16, data); }

// Of rows of `hidden` elements in tensors that are aligned or not, moved in packets of `width` elements,
// which are a multiple of 16 bytes in each tensor's type.
Alignment AlignmentOf(bool tensors_aligned, int64_t hidden, int64_t width) {
  return !tensors_aligned ? Alignment::kNone : hidden % width != 0 ? Alignment::kTensors : Alignment::kRows;
}

// What FusesRotary leaves to be checked of a call, whose narrowest operand has elements of `size` bytes: that
// tensors begin at multiples of their packets, and that there are no more rows than 32 bits count.
cudaError_t CheckRotary(const Shape& shape, const Rotary& rotary, Alignment alignment, int64_t size,
                        const Fused& fused, bool backward) {
  constexpr int64_t kMostRows = int64_t{1} << 31;
  const bool known = FusesRotary(shape.hidden, size, fused, backward);
  if (!known || shape.groups * shape.rows >= kMostRows) return cudaErrorNotSupported;
  const int64_t angles = 16 / size / (rotary.interleaved ? 2 : 1);
  const int64_t access = std::min<int64_t>(16, angles * SizeOf(rotary.dtype));
  const bool aligned =
      alignment == Alignment::kRows && AlignedTo(access, rotary.cos) && AlignedTo(access, rotary.sin);
  return aligned ? cudaSuccess : cudaErrorMisalignedAddress;
}

constexpr int kFinishElements = 1024;  // of a block
constexpr int kFinishRows = 32;        // of a block's threads at the most
constexpr int kFinishLoads = 8;        // of a thread, under way at the same time

// Adds up `count` partial rows. Blocks of lanes x rows threads, kWidth * lanes * rows = 1024, in a grid of
// (ceil(hidden / (kWidth * lanes)), groups, 1): every thread adds up kWidth columns of each `rows`-th partial
// row, and then the block these sums, always in the same order.
template <int kWidth>
__global__ __launch_bounds__(kFinishElements / kWidth,
                             1) void FinishKernel(const float* __restrict__ partials, int64_t partial_rows,
                                                  int count, int64_t groups, int64_t hidden,
                                                  void* __restrict__ dgamma, DType dtype) {
  __shared__ float sums[kFinishElements];  // [rows, columns]
  const auto lanes = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y);
  const auto lane = static_cast<int>(threadIdx.x), mine = static_cast<int>(threadIdx.y);
  const int columns = lanes * kWidth;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * columns;
  const bool has_columns = first + lane * kWidth < hidden;
  LaunchDependents();
  WaitForPrimary();
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    const float* from = partials + group * partial_rows * hidden + first + lane * kWidth;
    float sum[kWidth] = {};
#pragma unroll 1
    for (int row = mine; row < count; row += kFinishLoads * rows) {
      Packet<float, kWidth> packets[kFinishLoads];
#pragma unroll
      for (int i = 0; i < kFinishLoads; ++i) {
        packets[i].Load(from + (row + i * rows) * hidden, has_columns && row + i * rows < count);
      }
#pragma unroll
      for (int i = 0; i < kFinishLoads; ++i) AddPacket(packets[i], sum);
    }
#pragma unroll
    for (int w = 0; w < kWidth; ++w) sums[mine * columns + lane * kWidth + w] = sum[w];
    __syncthreads();
    for (int column = mine * lanes + lane; column < columns; column += lanes * rows) {
      float parts[4] = {};  // chains of additions, which wait for one another
#pragma unroll
      for (int row = 0; row < kFinishRows; ++row) {
        if (row < rows) parts[row % 4] += sums[row * columns + column];
      }
      const float total[1] = {(parts[0] + parts[1]) + (parts[2] + parts[3])};
      if (first + column < hidden) StoreAs<float>(dtype, dgamma, group * hidden + first + column, total);
    }
    __syncthreads();
  }
}

// The kernel for partial rows that are aligned to 16 bytes, or are not.
auto FindFinish(bool aligned) { return aligned ? FinishKernel<4> : FinishKernel<1>; }

cudaError_t LaunchFinish(const BackwardArgs& args, const Device& device, int64_t count, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const Shape& shape = args.shape;
  const bool aligned = shape.hidden % 4 == 0 && Aligned(args.partials);
  int rows = 1;
  while (rows < kFinishRows && rows * kFinishLoads < count) rows *= 2;
  const int columns = kFinishElements / rows;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>((shape.hidden + columns - 1) / columns),
                        static_cast<unsigned>(std::min(shape.groups, kMaxGridY)));
  launch.blockDim = dim3(static_cast<unsigned>(columns / (aligned ? 4 : 1)), static_cast<unsigned>(rows));
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = device.dependent_launch ? 1 : 0;
  return cudaLaunchKernelEx(&launch, FindFinish(aligned), static_cast<const float*>(args.partials),
                            args.partial_rows, static_cast<int>(count), shape.groups, shape.hidden,
                            args.dgamma, args.gamma_dtype);
}

// How many clusters of each size run at the same time if their blocks have an SM each: GPCs differ from chip
// to chip, and part of a chip may be all there is. Ends at the largest size that finds a place.
void CountResidentClusters(Device* device) {
  constexpr int kLargeSharedMemory = 160 * 1024;  // leaves no room for a second block
  const int shared = std::min(device->shared_memory - kOtherSharedMemory, kLargeSharedMemory);
  const int wanted = device->max_cluster;
  device->max_cluster = 1;
  cudaFuncSetAttribute(FinishKernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(FinishKernel<1>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int size = 2; size <= wanted; ++size) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(size));
    launch.blockDim = dim3(512);
    launch.dynamicSmemBytes = static_cast<size_t>(shared);
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    int count = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, FinishKernel<1>, &launch);
    if (error != cudaSuccess || count < 1) break;
    device->resident_clusters[size] = count;
    device->max_cluster = size;
  }
  (void)cudaGetLastError();  // sizes that do not fit are no error of the caller's
}

// The L2 cache's size and the memory's specified bandwidth, where both are to be had.
void ReadMemory(int ordinal, Device* device) {
  int l2_bytes = 0, khz = 0, bits = 0;
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrL2CacheSize, &l2_bytes}, std::pair{cudaDevAttrMemoryClockRate, &khz},
        std::pair{cudaDevAttrGlobalMemoryBusWidth, &bits}}) {
    if (cudaDeviceGetAttribute(value, attribute, ordinal) != cudaSuccess) return;
  }
  device->l2_bytes = l2_bytes;
  device->memory_bandwidth = 2e-6 * khz * bits / 8;  // two transfers a cycle
}

}  // namespace

cudaError_t CurrentDevice(Device* device) {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static Device devices[kDevices];
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  if (ordinal >= kDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (devices[ordinal].sm_count > 0) {
    *device = devices[ordinal];
    return cudaSuccess;
  }
  int major = 0;
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_memory},
        std::pair{cudaDevAttrComputeCapabilityMajor, &major},
        std::pair{cudaDevAttrMultiProcessorCount, &device->sm_count}}) {
    error = cudaDeviceGetAttribute(value, attribute, ordinal);
    if (error != cudaSuccess) return error;
  }
  // What of its bandwidth the memory gives, and that it is shared unevenly, is known of Hopper.
  if (major == 9) ReadMemory(ordinal, device);
  // Clusters and dependent launches need code compiled for 9.0 or later, which is not what an older build's
  // PTX becomes on a newer chip. 16 blocks are what data-centre chips allow beyond the portable 8.
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, FinishKernel<1>);
  if (error != cudaSuccess) return error;
  device->dependent_launch = major >= 9 && attributes.ptxVersion >= 90;
  device->bulk_copies = device->dependent_launch;
  device->max_cluster = !device->dependent_launch ? 1 : major < 12 ? 16 : 8;
  if (device->max_cluster > 1) CountResidentClusters(device);
  // With as little shared memory as can be it starts a microsecond sooner behind a kernel that has much.
  for (const bool aligned : {false, true}) {
    cudaFuncSetAttribute(FindFinish(aligned), cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxL1);
  }
  (void)cudaGetLastError();  // without that preference, and without the memory's figures, it works too
  devices[ordinal] = *device;
  return cudaSuccess;
}

cudaError_t LaunchForward(const ForwardArgs& args, int margin, cudaStream_t stream) {
  const Shape& shape = args.shape;
  if (shape.groups == 0 || shape.rows == 0) return cudaSuccess;
  Device device;
  cudaError_t error = CurrentDevice(&device);
  if (error != cudaSuccess) return error;
  const bool tensors_aligned =
      Aligned(args.x) && Aligned(args.y) && Aligned(args.gamma) && Aligned(args.addend) && Aligned(args.h);
  const Alignment alignment = AlignmentOf(tensors_aligned, shape.hidden, 16 / SizeOf(args.x_dtype));
  const Fused fused{FusionOf(args), args.rotary.width, args.rotary.heads, args.rotary.interleaved};
  if (fused.fusion == Fusion::kRotary) {
    error = CheckRotary(shape, args.rotary, alignment, SizeOf(args.x_dtype), fused, false);
    if (error != cudaSuccess) return error;
  }
  const DType gamma = args.gamma == nullptr ? args.x_dtype : args.gamma_dtype;
  const LaunchConfig config =
      ConfigureForward(device, shape, args.x_dtype, gamma, args.y_dtype, alignment, margin, fused);
  return DispatchType(args.x_dtype,
                      [&](auto x) { return LaunchForwardAs<decltype(x)>(args, config, stream); });
}

cudaError_t LaunchBackward(const BackwardArgs& args, int margin, cudaStream_t stream) {
  const Shape& shape = args.shape;
  if (shape.groups == 0) return cudaSuccess;
  if (shape.rows == 0) {  // no rows: dgamma is a sum of nothing
    if (args.dgamma == nullptr) return cudaSuccess;
    return cudaMemsetAsync(args.dgamma, 0, shape.groups * shape.hidden * SizeOf(args.gamma_dtype), stream);
  }
  Device device;
  cudaError_t error = CurrentDevice(&device);
  if (error != cudaSuccess) return error;
  const bool tensors_aligned =
      Aligned(args.x) && Aligned(args.dx) && std::all_of(args.dy, args.dy + args.gradients, Aligned) &&
      Aligned(args.gamma) && Aligned(args.dgamma) && Aligned(args.partials) && Aligned(args.dh);
  const int64_t size = std::min(SizeOf(args.x_dtype), SizeOf(args.dy_dtype));
  const Alignment alignment = AlignmentOf(tensors_aligned, shape.hidden, 16 / size);
  const Fused fused{FusionOf(args),          args.rotary.width, args.rotary.heads,
                    args.rotary.interleaved, args.gradients,    args.dh != nullptr};
  if (fused.fusion == Fusion::kRotary) {
    error = CheckRotary(shape, args.rotary, alignment, size, fused, true);
    if (error != cudaSuccess) return error;
  }
  const int64_t partial_rows = args.dgamma == nullptr ? 0 : args.partial_rows;
  const LaunchConfig config =
      ConfigureBackward(device, shape, args.x_dtype, args.dy_dtype, alignment, partial_rows, margin, fused);
  error = DispatchType(args.x_dtype, [&](auto x) {
    return DispatchTypeBeside<decltype(x)>(args.dy_dtype, [&](auto dy) {
      return LaunchBackwardAs<decltype(x), decltype(dy)>(args, config, stream);
    });
  });
  if (error != cudaSuccess || args.dgamma == nullptr || config.method == Method::kFew ||
      config.blocks_per_group == 1)
    return error;
  return LaunchFinish(args, device, config.blocks_per_group, stream);
}

}  // namespace jax_rmsnorm
