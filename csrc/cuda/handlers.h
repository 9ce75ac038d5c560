// The XLA FFI handlers of the CUDA kernels.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_rmsnorm {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaBackward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaAddForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaAddBackward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaRopeForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaRopeBackward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaRoof);  // of the benchmark

}  // namespace jax_rmsnorm
