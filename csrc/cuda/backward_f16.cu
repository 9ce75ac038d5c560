#include "backward.cuh"

namespace jax_rmsnorm {

template cudaError_t LaunchBackwardAs<__half, float>(const BackwardArgs&, const LaunchConfig&, cudaStream_t);
template cudaError_t LaunchBackwardAs<__half, __half>(const BackwardArgs&, const LaunchConfig&, cudaStream_t);

}  // namespace jax_rmsnorm
