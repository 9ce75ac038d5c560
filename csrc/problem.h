// What one call asks for, free of XLA and of CUDA: the handlers fill these structs, the launchers read them.
#pragma once

#include <cstdint>

namespace jax_rmsnorm {

enum class DType : int32_t { kF32, kBF16, kF16 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// x is [groups, rows, hidden], row-major; gamma is [groups, hidden]. One group unless gamma was batched by
// vmap.
struct Shape {
  int64_t groups = 1;
  int64_t rows = 0;
  int64_t hidden = 0;
};

// The arithmetic, common to forward and backward; see jax_rmsnorm/_reference.py for the equations.
struct Arithmetic {
  float eps = 0;
  bool zero_centered_gamma = false;
  bool round_before_gamma = false;
};

struct ForwardArgs {
  Shape shape;
  Arithmetic arithmetic;
  const void* x = nullptr;
  const void* gamma = nullptr;  // null: gamma is one
  void* y = nullptr;
  float* rrms = nullptr;  // null: not wanted
  DType x_dtype = DType::kF32;
  DType gamma_dtype = DType::kF32;
  DType y_dtype = DType::kF32;
};

struct BackwardArgs {
  Shape shape;
  Arithmetic arithmetic;
  const void* x = nullptr;
  const void* gamma = nullptr;  // null: gamma is one, and dgamma and partials are null too
  const float* rrms = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
  void* dgamma = nullptr;
  float* partials = nullptr;  // scratch, [groups, partial_rows, hidden]
  int64_t partial_rows = 0;
  DType x_dtype = DType::kF32;
  DType gamma_dtype = DType::kF32;
  DType dy_dtype = DType::kF32;
};

}  // namespace jax_rmsnorm
