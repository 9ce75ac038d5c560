// From XLA's buffers to the structs of problem.h, for the CPU and the CUDA handlers alike. Python has checked
// every argument at trace time; what is checked again here is what would otherwise reach outside a buffer.
#pragma once

#include <optional>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_rmsnorm {

namespace ffi = ::xla::ffi;

#define JAX_RMSNORM_RETURN_IF_ERROR(expression)                            \
  do {                                                                     \
    if (ffi::Error error_ = (expression); error_.failure()) return error_; \
  } while (false)

using OptionalArg = std::optional<ffi::AnyBuffer>;
using OptionalRet = std::optional<ffi::Result<ffi::AnyBuffer>>;

inline ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("jax_rmsnorm: " + message);
}

inline ffi::Error ToDType(const char* name, const ffi::AnyBuffer& buffer, DType* dtype) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32:
      *dtype = DType::kF32;
      return ffi::Error::Success();
    case ffi::DataType::BF16:
      *dtype = DType::kBF16;
      return ffi::Error::Success();
    case ffi::DataType::F16:
      *dtype = DType::kF16;
      return ffi::Error::Success();
    default:
      return Invalid(std::string(name) + " must be float32, bfloat16 or float16");
  }
}

inline ffi::Error CheckCount(const char* name, const ffi::AnyBuffer& buffer, int64_t expected) {
  const auto count = static_cast<int64_t>(buffer.element_count());
  if (count == expected) return ffi::Error::Success();
  return Invalid(std::string(name) + " has " + std::to_string(count) + " elements, expected " +
                 std::to_string(expected));
}

inline ffi::Error CheckFloat32(const char* name, const ffi::AnyBuffer& buffer) {
  if (buffer.element_type() == ffi::DataType::F32) return ffi::Error::Success();
  return Invalid(std::string(name) + " must be float32");
}

// x is [*groups, *rows, hidden]; gamma, where there is one, is [*groups, hidden].
inline ffi::Error SplitShape(const ffi::AnyBuffer& x, const OptionalArg& gamma, Shape* shape) {
  const auto x_dims = x.dimensions();
  if (x_dims.size() == 0 || x_dims.back() == 0)
    return Invalid("x must end in an axis of one element or more");
  shape->hidden = x_dims.back();
  // The kernels count columns in 32 bits, and add a block's width to them.
  if (shape->hidden > int64_t{1} << 30) return Invalid("x's last axis must have 2^30 elements or fewer");
  shape->groups = 1;
  size_t group_axes = 0;
  if (gamma) {
    const auto gamma_dims = gamma->dimensions();
    bool matches =
        gamma_dims.size() > 0 && gamma_dims.size() <= x_dims.size() && gamma_dims.back() == shape->hidden;
    group_axes = matches ? gamma_dims.size() - 1 : 0;
    for (size_t axis = 0; axis < group_axes; ++axis) {
      matches = matches && gamma_dims[axis] == x_dims[axis];
      shape->groups *= gamma_dims[axis];
    }
    if (!matches) return Invalid("gamma must begin with x's first axes and end in x's last one");
  }
  shape->rows = 1;
  for (size_t axis = group_axes; axis + 1 < x_dims.size(); ++axis) shape->rows *= x_dims[axis];
  return ffi::Error::Success();
}

// Operands and attributes that every handler takes; a platform adds its context.
inline auto ForwardBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()          // x
      .OptionalArg<ffi::AnyBuffer>()  // gamma
      .Ret<ffi::AnyBuffer>()          // y
      .OptionalRet<ffi::AnyBuffer>()  // rrms
      .Attr<float>("eps")
      .Attr<bool>("zero_centered_gamma")
      .Attr<bool>("round_before_gamma")
      .Attr<int64_t>("sm_margin");
}

inline auto BackwardBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()          // x
      .Arg<ffi::AnyBuffer>()          // rrms
      .Arg<ffi::AnyBuffer>()          // dy
      .OptionalArg<ffi::AnyBuffer>()  // gamma
      .Ret<ffi::AnyBuffer>()          // dx
      .OptionalRet<ffi::AnyBuffer>()  // dgamma
      .OptionalRet<ffi::AnyBuffer>()  // partials, scratch
      .Attr<bool>("zero_centered_gamma")
      .Attr<bool>("round_before_gamma")
      .Attr<int64_t>("sm_margin");
}

inline ffi::Error DecodeForward(const ffi::AnyBuffer& x, const OptionalArg& gamma,
                                ffi::Result<ffi::AnyBuffer>& y, OptionalRet& rrms,
                                const Arithmetic& arithmetic, ForwardArgs* args) {
  JAX_RMSNORM_RETURN_IF_ERROR(SplitShape(x, gamma, &args->shape));
  const Shape& shape = args->shape;
  const int64_t rows = shape.groups * shape.rows;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("x", x, &args->x_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("y", *y, &args->y_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("y", *y, rows * shape.hidden));
  args->arithmetic = arithmetic;
  args->x = x.untyped_data();
  args->y = y->untyped_data();
  if (gamma) {
    JAX_RMSNORM_RETURN_IF_ERROR(ToDType("gamma", *gamma, &args->gamma_dtype));
    args->gamma = gamma->untyped_data();
  }
  if (rrms) {
    JAX_RMSNORM_RETURN_IF_ERROR(CheckFloat32("rrms", **rrms));
    JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("rrms", **rrms, rows));
    args->rrms = static_cast<float*>((*rrms)->untyped_data());
  }
  return ffi::Error::Success();
}

inline ffi::Error DecodeBackward(const ffi::AnyBuffer& x, const ffi::AnyBuffer& rrms,
                                 const ffi::AnyBuffer& dy, const OptionalArg& gamma,
                                 ffi::Result<ffi::AnyBuffer>& dx, OptionalRet& dgamma, OptionalRet& partials,
                                 const Arithmetic& arithmetic, BackwardArgs* args) {
  JAX_RMSNORM_RETURN_IF_ERROR(SplitShape(x, gamma, &args->shape));
  const Shape& shape = args->shape;
  const int64_t rows = shape.groups * shape.rows;
  DType dx_dtype, dgamma_dtype;
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("x", x, &args->x_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("dy", dy, &args->dy_dtype));
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("dx", *dx, &dx_dtype));
  if (dx_dtype != args->x_dtype) return Invalid("dx must have x's dtype");
  JAX_RMSNORM_RETURN_IF_ERROR(CheckFloat32("rrms", rrms));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("rrms", rrms, rows));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("dy", dy, rows * shape.hidden));
  JAX_RMSNORM_RETURN_IF_ERROR(CheckCount("dx", *dx, rows * shape.hidden));
  args->arithmetic = arithmetic;
  args->x = x.untyped_data();
  args->rrms = static_cast<const float*>(rrms.untyped_data());
  args->dy = dy.untyped_data();
  args->dx = dx->untyped_data();
  if (!gamma) return ffi::Error::Success();

  if (!dgamma || !partials) return Invalid("with gamma, backward also returns dgamma and partials");
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType("gamma", *gamma, &args->gamma_dtype));
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

}  // namespace jax_rmsnorm
