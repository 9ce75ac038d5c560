#include "handlers.h"

#include <cuda_runtime_api.h>

#include "../ffi_util.h"
#include "launch.h"
#include "roof.h"

namespace jax_rmsnorm {
namespace {

ffi::Error ToError(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  (void)cudaGetLastError();  // a launch error must not be found again by whoever asks next
  return ffi::Error::Internal(std::string("jax_rmsnorm: CUDA ") + what + ": " + cudaGetErrorString(error));
}

ffi::Error Forward(ffi::AnyBuffer x, OptionalArg gamma, ffi::Result<ffi::AnyBuffer> y, OptionalRet rrms,
                   float eps, bool zero_centered_gamma, bool round_before_gamma, int64_t sm_margin,
                   cudaStream_t stream) {
  ForwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(
      DecodeForward(x, gamma, y, rrms, {eps, zero_centered_gamma, round_before_gamma}, &args));
  return ToError("forward", LaunchForward(args, static_cast<int>(sm_margin), stream));
}

ffi::Error Backward(ffi::AnyBuffer x, ffi::AnyBuffer rrms, ffi::AnyBuffer dy, OptionalArg gamma,
                    ffi::Result<ffi::AnyBuffer> dx, OptionalRet dgamma, OptionalRet partials,
                    bool zero_centered_gamma, bool round_before_gamma, int64_t sm_margin,
                    cudaStream_t stream) {
  BackwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeBackward(x, rrms, dy, gamma, dx, dgamma, partials,
                                             {0.0f, zero_centered_gamma, round_before_gamma}, &args));
  return ToError("backward", LaunchBackward(args, static_cast<int>(sm_margin), stream));
}

ffi::Error AddForward(ffi::AnyBuffer x, ffi::AnyBuffer addend, OptionalArg gamma,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> h, OptionalRet rrms,
                      float eps, bool zero_centered_gamma, bool round_before_gamma, int64_t sm_margin,
                      cudaStream_t stream) {
  ForwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(
      DecodeForward(x, gamma, y, rrms, {eps, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeAddend(addend, h, &args));
  return ToError("forward with an addend", LaunchForward(args, static_cast<int>(sm_margin), stream));
}

ffi::Error AddBackward(ffi::AnyBuffer h, ffi::AnyBuffer rrms, ffi::AnyBuffer dy, ffi::AnyBuffer dh,
                       OptionalArg gamma, ffi::Result<ffi::AnyBuffer> dx, OptionalRet dgamma,
                       OptionalRet partials, bool zero_centered_gamma, bool round_before_gamma,
                       int64_t sm_margin, cudaStream_t stream) {
  BackwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeBackward(h, rrms, dy, gamma, dx, dgamma, partials,
                                             {0.0f, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeGradientOfSum(dh, &args));
  return ToError("backward with an addend", LaunchBackward(args, static_cast<int>(sm_margin), stream));
}

ffi::Error RopeForward(ffi::AnyBuffer x, ffi::AnyBuffer cos, ffi::AnyBuffer sin, OptionalArg gamma,
                       ffi::Result<ffi::AnyBuffer> y, OptionalRet rrms, float eps, bool zero_centered_gamma,
                       bool round_before_gamma, int64_t sm_margin, int64_t heads, bool interleaved,
                       cudaStream_t stream) {
  ForwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(
      DecodeForward(x, gamma, y, rrms, {eps, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeRotary(cos, sin, heads, interleaved, args.shape, &args.rotary));
  return ToError("forward with a rotary embedding", LaunchForward(args, static_cast<int>(sm_margin), stream));
}

ffi::Error RopeBackward(ffi::AnyBuffer x, ffi::AnyBuffer rrms, ffi::AnyBuffer dy, ffi::AnyBuffer cos,
                        ffi::AnyBuffer sin, OptionalArg gamma, ffi::Result<ffi::AnyBuffer> dx,
                        OptionalRet dgamma, OptionalRet partials, bool zero_centered_gamma,
                        bool round_before_gamma, int64_t sm_margin, int64_t heads, bool interleaved,
                        cudaStream_t stream) {
  BackwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeBackward(x, rrms, dy, gamma, dx, dgamma, partials,
                                             {0.0f, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeRotary(cos, sin, heads, interleaved, args.shape, &args.rotary));
  return ToError("backward with a rotary embedding",
                 LaunchBackward(args, static_cast<int>(sm_margin), stream));
}

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
#define JAX_RMSNORM_DEFINE_HANDLER(name)                                                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Cuda##name, name, name##Binding().Ctx<ffi::PlatformStream<cudaStream_t>>(), \
                                {ffi::Traits::kCmdBufferCompatible})

JAX_RMSNORM_DEFINE_HANDLER(Forward);
JAX_RMSNORM_DEFINE_HANDLER(Backward);
JAX_RMSNORM_DEFINE_HANDLER(AddForward);
JAX_RMSNORM_DEFINE_HANDLER(AddBackward);
JAX_RMSNORM_DEFINE_HANDLER(RopeForward);
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
