// The XLA FFI handlers of the CPU kernels.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_rmsnorm {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuBackward);

}  // namespace jax_rmsnorm
