#include "forward.cuh"

namespace jax_rmsnorm {

template cudaError_t LaunchForwardAs<__half>(const ForwardArgs&, const LaunchConfig&, cudaStream_t);

}  // namespace jax_rmsnorm
