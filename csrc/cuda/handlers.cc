#include "handlers.h"

#include <cuda_runtime_api.h>

#include "../handlers.h"
#include "launch.h"
#include "roof.h"

namespace jax_rmsnorm {
namespace {

ffi::Error ToError(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  (void)cudaGetLastError();  // a launch error must not be found again by whoever asks next
  return ffi::Error::Internal(std::string("jax_rmsnorm: CUDA ") + what + ": " + cudaGetErrorString(error));
}

struct Cuda {
  using Context = cudaStream_t;

  static ffi::Error Launch(const ForwardArgs& args, int64_t sm_margin, Context stream) {
    return ToError("forward", LaunchForward(args, static_cast<int>(sm_margin), stream));
  }
  static ffi::Error Launch(const BackwardArgs& args, int64_t sm_margin, Context stream) {
    return ToError("backward", LaunchBackward(args, static_cast<int>(sm_margin), stream));
  }
};

ffi::Error Roof(ffi::AnyBuffer a, OptionalArg b, ffi::Result<ffi::AnyBuffer> out, int64_t variant,
                cudaStream_t stream) {
  const auto bytes = static_cast<int64_t>(a.size_bytes());
  if (bytes % 16 != 0 || static_cast<int64_t>(out->size_bytes()) != bytes ||
      (b && static_cast<int64_t>(b->size_bytes()) != bytes)) {
    return Invalid("roof takes tensors of the same size, a multiple of 16 bytes");
  }
  return ToError("roof", LaunchRoof(a.untyped_data(), b ? b->untyped_data() : nullptr, out->untyped_data(),
                                    bytes, static_cast<int>(variant), stream));
}

}  // namespace

// Command-buffer compatible: XLA may record the launches into a CUDA graph and replay them.
#define JAX_RMSNORM_DEFINE_HANDLER(name)                                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Cuda##name, name<Cuda>,                                   \
                                name##Binding().Ctx<ffi::PlatformStream<cudaStream_t>>(), \
                                {ffi::Traits::kCmdBufferCompatible})

JAX_RMSNORM_DEFINE_HANDLER(Forward);
JAX_RMSNORM_DEFINE_HANDLER(AddForward);
JAX_RMSNORM_DEFINE_HANDLER(RopeForward);
JAX_RMSNORM_DEFINE_HANDLER(Backward);
JAX_RMSNORM_DEFINE_HANDLER(AddBackward);
JAX_RMSNORM_DEFINE_HANDLER(RopeBackward);
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaRoof, Roof,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()          // a
                                  .OptionalArg<ffi::AnyBuffer>()  // b
                                  .Ret<ffi::AnyBuffer>()          // out
                                  .Attr<int64_t>("variant")
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_rmsnorm
