#include "backward.cuh"

namespace jax_rmsnorm {

template cudaError_t LaunchBackwardAs<float, float>(const BackwardArgs&, const LaunchConfig&, cudaStream_t);
template cudaError_t LaunchBackwardAs<float, __nv_bfloat16>(const BackwardArgs&, const LaunchConfig&,
                                                            cudaStream_t);
template cudaError_t LaunchBackwardAs<float, __half>(const BackwardArgs&, const LaunchConfig&, cudaStream_t);

}  // namespace jax_rmsnorm
