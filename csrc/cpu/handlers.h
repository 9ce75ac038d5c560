// The XLA FFI handlers of the CPU kernels.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_rmsnorm {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuAddForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuRopeForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuBackward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuAddBackward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CpuRopeBackward);

}  // namespace jax_rmsnorm
