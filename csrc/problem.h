// What one call asks for, free of XLA and of CUDA: the handlers fill these structs, the launchers read them.
#pragma once

#include <cstdint>

namespace jax_rmsnorm {

enum class DType : int32_t { kF32, kBF16, kF16 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Whether these are bfloat16 and float16, which no kernel reads or writes side by side: gamma, an addend, y
// and its gradients are of x's dtype or of float32, or x is of float32.
constexpr bool AreTwoHalves(DType a, DType b) { return a != b && SizeOf(a) == 2 && SizeOf(b) == 2; }

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

// Rotary embedding of a normalized row of query or key. cos and sin are [positions, width / 2]; row r,
// counted through all groups, has position r / heads % positions. Element i of the first `width` is rotated
// with element i + width / 2 (halves), or 2 i with 2 i + 1 (interleaved); the others stay.
struct Rotary {
  const void* cos = nullptr;  // null: no rotation
  const void* sin = nullptr;
  DType dtype = DType::kF32;  // of both
  int64_t positions = 1;
  int64_t heads = 1;
  int64_t width = 0;
  bool interleaved = false;
};

// What is fused with the norm.
enum class Fusion : int32_t {
  kNone,
  kAdd,     // forward: an addend to x; backward: further gradients, of y or of the sum that is x
  kRotary,  // the rotary embedding of the result
};

struct ForwardArgs {
  Shape shape;
  Arithmetic arithmetic;
  const void* x = nullptr;
  // With an addend a: h = x + a, rounded to x's dtype, is written, and takes x's part from there on.
  const void* addend = nullptr;
  void* h = nullptr;
  Rotary rotary;                // of y, before it is rounded to y's dtype
  const void* gamma = nullptr;  // null: gamma is one
  void* y = nullptr;
  float* rrms = nullptr;  // null: not wanted
  DType x_dtype = DType::kF32;
  DType addend_dtype = DType::kF32;
  DType gamma_dtype = DType::kF32;
  DType y_dtype = DType::kF32;
};

inline Fusion FusionOf(const ForwardArgs& args) {
  return args.addend != nullptr ? Fusion::kAdd : args.rotary.cos != nullptr ? Fusion::kRotary : Fusion::kNone;
}

// Gradients that a kernel adds up: those of y come one for each place that reads it.
constexpr int kMostGradients = 4;

struct BackwardArgs {
  Shape shape;
  Arithmetic arithmetic;
  const void* x = nullptr;
  const void* gamma = nullptr;  // null: gamma is one, and dgamma and partials are null too
  const float* rrms = nullptr;
  const void* dy[kMostGradients] = {};
  int32_t gradients = 1;     // of y, added up in float32
  const void* dh = nullptr;  // of x's dtype: added to dx before that is rounded; null: nothing to add
  Rotary rotary;             // dy is rotated back first
  void* dx = nullptr;
  void* dgamma = nullptr;
  float* partials = nullptr;  // scratch, [groups, partial_rows, hidden]
  int64_t partial_rows = 0;
  DType x_dtype = DType::kF32;
  DType gamma_dtype = DType::kF32;
  DType dy_dtype = DType::kF32;
};

inline Fusion FusionOf(const BackwardArgs& args) {
  const bool add = args.dh != nullptr || args.gradients > 1;
  return add ? Fusion::kAdd : args.rotary.cos != nullptr ? Fusion::kRotary : Fusion::kNone;
}

}  // namespace jax_rmsnorm
