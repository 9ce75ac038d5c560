#include "backward.cuh"

namespace jax_rmsnorm {

template cudaError_t LaunchBackwardAs<__nv_bfloat16, float>(const BackwardArgs&, const LaunchConfig&,
                                                            cudaStream_t);
template cudaError_t LaunchBackwardAs<__nv_bfloat16, __nv_bfloat16>(const BackwardArgs&, const LaunchConfig&,
                                                                    cudaStream_t);

}  // namespace jax_rmsnorm
