#include "forward.cuh"

namespace jax_rmsnorm {

template cudaError_t LaunchForwardAs<float>(const ForwardArgs&, const LaunchConfig&, cudaStream_t);

}  // namespace jax_rmsnorm
