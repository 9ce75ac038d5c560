#include "forward.cuh"

namespace jax_rmsnorm {

template cudaError_t LaunchForwardAs<__nv_bfloat16>(const ForwardArgs&, const LaunchConfig&, cudaStream_t);

}  // namespace jax_rmsnorm
