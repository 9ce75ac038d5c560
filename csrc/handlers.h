// The six calls as XLA makes them, the same on every platform: the operands, results and attributes of each,
// and the way to the platform's launch.
//
// A Platform has a type Context, which is what XLA hands its handlers beside buffers and attributes, and
//   static ffi::Error Launch(const ForwardArgs&, int64_t sm_margin, Context)
//   static ffi::Error Launch(const BackwardArgs&, int64_t sm_margin, Context)
#pragma once

#include <utility>

#include "ffi_util.h"

namespace jax_rmsnorm {

using Arg = ffi::AnyBuffer;
using Ret = ffi::Result<ffi::AnyBuffer>;

template <typename Binding>
auto WithBackwardAttributes(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<bool>("zero_centered_gamma")
      .template Attr<bool>("round_before_gamma")
      .template Attr<int64_t>("sm_margin");
}

template <typename Binding>
auto WithForwardAttributes(Binding&& binding) {
  return WithBackwardAttributes(std::forward<Binding>(binding).template Attr<float>("eps"));
}

template <typename Binding>
auto WithRotaryAttributes(Binding&& binding) {
  return std::forward<Binding>(binding).template Attr<int64_t>("heads").template Attr<bool>("interleaved");
}

inline auto ForwardBinding() {
  auto operands = ffi::Ffi::Bind()
                      .Arg<Arg>()           // x
                      .OptionalArg<Arg>()   // gamma
                      .Ret<Arg>()           // y
                      .OptionalRet<Arg>();  // rrms
  return WithForwardAttributes(std::move(operands));
}

template <typename Platform>
ffi::Error Forward(Arg x, OptionalArg gamma, Ret y, OptionalRet rrms, float eps, bool zero_centered_gamma,
                   bool round_before_gamma, int64_t sm_margin, typename Platform::Context context) {
  ForwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(
      DecodeForward(x, gamma, y, rrms, {eps, zero_centered_gamma, round_before_gamma}, &args));
  return Platform::Launch(args, sm_margin, context);
}

inline auto AddForwardBinding() {
  auto operands = ffi::Ffi::Bind()
                      .Arg<Arg>()           // x
                      .Arg<Arg>()           // addend
                      .OptionalArg<Arg>()   // gamma
                      .Ret<Arg>()           // y
                      .Ret<Arg>()           // h
                      .OptionalRet<Arg>();  // rrms
  return WithForwardAttributes(std::move(operands));
}

template <typename Platform>
ffi::Error AddForward(Arg x, Arg addend, OptionalArg gamma, Ret y, Ret h, OptionalRet rrms, float eps,
                      bool zero_centered_gamma, bool round_before_gamma, int64_t sm_margin,
                      typename Platform::Context context) {
  ForwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(
      DecodeForward(x, gamma, y, rrms, {eps, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeAddend(addend, h, &args));
  return Platform::Launch(args, sm_margin, context);
}

inline auto RopeForwardBinding() {
  auto operands = ffi::Ffi::Bind()
                      .Arg<Arg>()           // x
                      .Arg<Arg>()           // cos
                      .Arg<Arg>()           // sin
                      .OptionalArg<Arg>()   // gamma
                      .Ret<Arg>()           // y
                      .OptionalRet<Arg>();  // rrms
  return WithRotaryAttributes(WithForwardAttributes(std::move(operands)));
}

template <typename Platform>
ffi::Error RopeForward(Arg x, Arg cos, Arg sin, OptionalArg gamma, Ret y, OptionalRet rrms, float eps,
                       bool zero_centered_gamma, bool round_before_gamma, int64_t sm_margin, int64_t heads,
                       bool interleaved, typename Platform::Context context) {
  ForwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(
      DecodeForward(x, gamma, y, rrms, {eps, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeRotary(cos, sin, heads, interleaved, args.shape, &args.rotary));
  return Platform::Launch(args, sm_margin, context);
}

inline auto BackwardBinding() {
  auto operands = ffi::Ffi::Bind()
                      .Arg<Arg>()           // x
                      .Arg<Arg>()           // rrms
                      .RemainingArgs()      // `gradients` times dy, gamma or none
                      .Ret<Arg>()           // dx
                      .OptionalRet<Arg>()   // dgamma
                      .OptionalRet<Arg>();  // partials, scratch
  return WithBackwardAttributes(std::move(operands)).Attr<int64_t>("gradients");
}

template <typename Platform>
ffi::Error Backward(Arg x, Arg rrms, ffi::RemainingArgs rest, Ret dx, OptionalRet dgamma,
                    OptionalRet partials, bool zero_centered_gamma, bool round_before_gamma,
                    int64_t sm_margin, int64_t gradients, typename Platform::Context context) {
  BackwardArgs args;
  OptionalArg gamma;
  JAX_RMSNORM_RETURN_IF_ERROR(GammaBehindGradients(rest, gradients, &gamma));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeBackward(x, rrms, gamma, dx, dgamma, partials,
                                             {0.0f, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeGradients(rest, gradients, &args));
  return Platform::Launch(args, sm_margin, context);
}

inline auto AddBackwardBinding() {
  auto operands = ffi::Ffi::Bind()
                      .Arg<Arg>()           // h
                      .Arg<Arg>()           // rrms
                      .Arg<Arg>()           // dh
                      .RemainingArgs()      // `gradients` times dy, gamma or none
                      .Ret<Arg>()           // dx
                      .OptionalRet<Arg>()   // dgamma
                      .OptionalRet<Arg>();  // partials, scratch
  return WithBackwardAttributes(std::move(operands)).Attr<int64_t>("gradients");
}

template <typename Platform>
ffi::Error AddBackward(Arg h, Arg rrms, Arg dh, ffi::RemainingArgs rest, Ret dx, OptionalRet dgamma,
                       OptionalRet partials, bool zero_centered_gamma, bool round_before_gamma,
                       int64_t sm_margin, int64_t gradients, typename Platform::Context context) {
  BackwardArgs args;
  OptionalArg gamma;
  JAX_RMSNORM_RETURN_IF_ERROR(GammaBehindGradients(rest, gradients, &gamma));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeBackward(h, rrms, gamma, dx, dgamma, partials,
                                             {0.0f, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeGradients(rest, gradients, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeGradientOfSum(dh, &args));
  return Platform::Launch(args, sm_margin, context);
}

inline auto RopeBackwardBinding() {
  auto operands = ffi::Ffi::Bind()
                      .Arg<Arg>()           // x
                      .Arg<Arg>()           // rrms
                      .Arg<Arg>()           // dy
                      .Arg<Arg>()           // cos
                      .Arg<Arg>()           // sin
                      .OptionalArg<Arg>()   // gamma
                      .Ret<Arg>()           // dx
                      .OptionalRet<Arg>()   // dgamma
                      .OptionalRet<Arg>();  // partials, scratch
  return WithRotaryAttributes(WithBackwardAttributes(std::move(operands)));
}

template <typename Platform>
ffi::Error RopeBackward(Arg x, Arg rrms, Arg dy, Arg cos, Arg sin, OptionalArg gamma, Ret dx,
                        OptionalRet dgamma, OptionalRet partials, bool zero_centered_gamma,
                        bool round_before_gamma, int64_t sm_margin, int64_t heads, bool interleaved,
                        typename Platform::Context context) {
  BackwardArgs args;
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeBackward(x, rrms, gamma, dx, dgamma, partials,
                                             {0.0f, zero_centered_gamma, round_before_gamma}, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeGradient(dy, 1, &args));
  JAX_RMSNORM_RETURN_IF_ERROR(DecodeRotary(cos, sin, heads, interleaved, args.shape, &args.rotary));
  return Platform::Launch(args, sm_margin, context);
}

}  // namespace jax_rmsnorm
