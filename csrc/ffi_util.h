// From XLA's buffers to the structs of problem.h, for the CPU and the CUDA handlers alike.
#pragma once

#include "checks.h"

namespace jax_rmsnorm {

inline ffi::Error DecodeForward(const ffi::AnyBuffer& x, const OptionalArg& gamma,
                                ffi::Result<ffi::AnyBuffer>& y, OptionalRet& rrms,
                                const Arithmetic& arithmetic, ForwardArgs* args) {
  JAX_RMSNORM_RETURN_IF_ERROR(SplitShape(x, gamma, &args->shape));
  const Shape& shape = args->shape;
  const int64_t rows = shape.groups * shape.rows;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("x", x, &args->x_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDTypeBeside(args->x_dtype, "y", *y, &args->y_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("y", *y, rows * shape.hidden));
  args->arithmetic = arithmetic;
  args->x = x.untyped_data();
  args->y = y->untyped_data();
  if (gamma) {
    JAX_RMSNORM_RETURN_IF_ERROR(ToDTypeBeside(args->x_dtype, "gamma", *gamma, &args->gamma_dtype));
    args->gamma = gamma->untyped_data();
  }
  if (rrms) {
    JAX_RMSNORM_RETURN_IF_ERROR(CheckFloat32("rrms", **rrms));
    JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("rrms", **rrms, rows));
    args->rrms = static_cast<float*>((*rrms)->untyped_data());
  }
  return ffi::Error::Success();
}

// All but the gradients of y and of what is fused.
inline ffi::Error DecodeBackward(const ffi::AnyBuffer& x, const ffi::AnyBuffer& rrms,
                                 const OptionalArg& gamma, ffi::Result<ffi::AnyBuffer>& dx,
                                 OptionalRet& dgamma, OptionalRet& partials, const Arithmetic& arithmetic,
                                 BackwardArgs* args) {
  JAX_RMSNORM_RETURN_IF_ERROR(SplitShape(x, gamma, &args->shape));
  const Shape& shape = args->shape;
  const int64_t rows = shape.groups * shape.rows;
  DType dx_dtype, dgamma_dtype;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("x", x, &args->x_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("dx", *dx, &dx_dtype));
  if (dx_dtype != args->x_dtype) return Invalid("dx must have x's dtype");
  JAX_RMSNORM_RETURN_IF_ERROR(CheckFloat32("rrms", rrms));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("rrms", rrms, rows));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("dx", *dx, rows * shape.hidden));
  args->arithmetic = arithmetic;
  args->x = x.untyped_data();
  args->rrms = static_cast<const float*>(rrms.untyped_data());
  args->dx = dx->untyped_data();
  if (!gamma) return ffi::Error::Success();

  if (!dgamma || !partials) return Invalid("with gamma, backward also returns dgamma and partials");
  JAX_RMSNORM_RETURN_IF_ERROR(ToDTypeBeside(args->x_dtype, "gamma", *gamma, &args->gamma_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("dgamma", **dgamma, &dgamma_dtype));
  if (dgamma_dtype != args->gamma_dtype) return Invalid("dgamma must have gamma's dtype");
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("dgamma", **dgamma, shape.groups * shape.hidden));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckFloat32("partials", **partials));
  const auto partial_dims = (*partials)->dimensions();
  if (partial_dims.size() < 2 || partial_dims[partial_dims.size() - 2] < 1) {
    return Invalid("partials must be [*groups, partial rows, hidden] with one partial row or more");
  }
  args->partial_rows = partial_dims[partial_dims.size() - 2];
  JAX_RMSNORM_RETURN_IF_ERROR(
      CheckCount("partials", **partials, shape.groups * args->partial_rows * shape.hidden));
  args->gamma = gamma->untyped_data();
  args->dgamma = (*dgamma)->untyped_data();
  args->partials = static_cast<float*>((*partials)->untyped_data());
  return ffi::Error::Success();
}

// The gradient of y, the last of `gradients` so far.
inline ffi::Error DecodeGradient(const ffi::AnyBuffer& dy, int32_t gradients, BackwardArgs* args) {
  DType dtype;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDTypeBeside(args->x_dtype, "dy", dy, &dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(
      CheckCount("dy", dy, args->shape.groups * args->shape.rows * args->shape.hidden));
  if (gradients > 1 && dtype != args->dy_dtype) return Invalid("all dy must be of one dtype");
  args->dy_dtype = dtype;
  args->dy[gradients - 1] = dy.untyped_data();
  args->gradients = gradients;
  return ffi::Error::Success();
}

// Of `rest`, the operands that are as many as the attribute `gradients` says, each a dy; gamma may be one
// more.
inline ffi::Error GammaBehindGradients(const ffi::RemainingArgs& rest, int64_t gradients,
                                       OptionalArg* gamma) {
  if (gradients < 1 || gradients > kMostGradients) {
    return Invalid("gradients must be from 1 to " + std::to_string(kMostGradients) + ", got " +
                   std::to_string(gradients));
  }
  const auto count = static_cast<int64_t>(rest.size());
  if (count != gradients && count != gradients + 1) {
    return Invalid("expected " + std::to_string(gradients) +
                   " dy as the last operands, and gamma or none, got " + std::to_string(count) + " operands");
  }
  if (count == gradients) return ffi::Error::Success();
  const auto last = rest.get<ffi::AnyBuffer>(static_cast<size_t>(gradients));
  if (last.has_error()) return last.error();
  *gamma = last.value();
  return ffi::Error::Success();
}

// The first `gradients` of `rest`, whose number was checked.
inline ffi::Error DecodeGradients(const ffi::RemainingArgs& rest, int64_t gradients, BackwardArgs* args) {
  for (int32_t i = 0; i < gradients; ++i) {
    const auto dy = rest.get<ffi::AnyBuffer>(static_cast<size_t>(i));
    if (dy.has_error()) return dy.error();
    JAX_RMSNORM_RETURN_IF_ERROR(DecodeGradient(dy.value(), i + 1, args));
  }
  return ffi::Error::Success();
}

inline ffi::Error DecodeAddend(const ffi::AnyBuffer& addend, ffi::Result<ffi::AnyBuffer>& h,
                               ForwardArgs* args) {
  const int64_t elements = args->shape.groups * args->shape.rows * args->shape.hidden;
  DType h_dtype;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDTypeBeside(args->x_dtype, "addend", addend, &args->addend_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("h", *h, &h_dtype));
  if (h_dtype != args->x_dtype) return Invalid("h must have x's dtype");
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("addend", addend, elements));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("h", *h, elements));
  args->addend = addend.untyped_data();
  args->h = h->untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error DecodeGradientOfSum(const ffi::AnyBuffer& dh, BackwardArgs* args) {
  const int64_t elements = args->shape.groups * args->shape.rows * args->shape.hidden;
  DType dh_dtype;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("dh", dh, &dh_dtype));
  if (dh_dtype != args->x_dtype) return Invalid("dh must have h's dtype");
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("dh", dh, elements));
  args->dh = dh.untyped_data();
  return ffi::Error::Success();
}

// cos and sin are [*positions, width / 2].
inline ffi::Error DecodeRotary(const ffi::AnyBuffer& cos, const ffi::AnyBuffer& sin, int64_t heads,
                               bool interleaved, const Shape& shape, Rotary* rotary) {
  const auto dims = cos.dimensions();
  if (dims.size() == 0 || dims.back() > shape.hidden / 2)
    return Invalid("cos must end in an axis of at most half the elements of x's last one");
  rotary->positions = 1;
  for (size_t axis = 0; axis + 1 < dims.size(); ++axis) rotary->positions *= dims[axis];
  rotary->width = 2 * dims.back();
  DType sin_dtype;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("cos", cos, &rotary->dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("sin", sin, &sin_dtype));
  if (sin_dtype != rotary->dtype) return Invalid("sin must have cos's dtype");
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("sin", sin, static_cast<int64_t>(cos.element_count())));
  const int64_t rows = shape.groups * shape.rows;
  const bool fits = heads > 0 && rows % heads == 0 &&
                    (rows == 0 || (rotary->positions > 0 && rows / heads % rotary->positions == 0));
  if (!fits) {
    return Invalid("x's " + std::to_string(rows) + " rows must be a multiple of " + std::to_string(heads) +
                   " heads at " + std::to_string(rotary->positions) + " positions");
  }
  rotary->heads = heads;
  rotary->interleaved = interleaved;
  rotary->cos = cos.untyped_data();
  rotary->sin = sin.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_rmsnorm
