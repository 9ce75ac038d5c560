// Checks of XLA's buffers. Python has checked every argument at trace time; what is checked again here is
// what would otherwise reach outside a buffer.
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

// The same for what is read or written beside x.
inline ffi::Error ToDTypeBeside(DType x, const char* name, const ffi::AnyBuffer& buffer, DType* dtype) {
  JAX_RMSNORM_RETURN_IF_ERROR(ToDType(name, buffer, dtype));
  if (!AreTwoHalves(x, *dtype)) return ffi::Error::Success();
  return Invalid(std::string(name) + " must have x's dtype, or one be float32");
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

}  // namespace jax_rmsnorm
