// Loops over the columns of a row, whatever its elements.
#pragma once

#include <new>
#include <type_traits>

#include "../problem.h"
#include "elements.h"

namespace jax_rmsnorm {
namespace JAX_RMSNORM_ISA {

// Calls f(T{}) with the element type that `dtype` names.
template <typename F>
void WithType(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(BFloat16{});
    case DType::kF16:
      return f(Float16{});
  }
}

// Calls f(X{}, Y{}) likewise, for two types that are not two halves.
template <typename F>
void WithTypes(DType x_dtype, DType y_dtype, F&& f) {
  WithType(x_dtype, [&](auto x) {
    WithType(y_dtype, [&](auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      if constexpr (std::is_same_v<X, Y> || std::is_same_v<X, float> || std::is_same_v<Y, float>) f(x, y);
    });
  });
}

// The same, with PureBFloat16 for two of bfloat16.
template <typename F>
void WithFastTypes(DType x_dtype, DType y_dtype, F&& f) {
  if (x_dtype == DType::kBF16 && y_dtype == DType::kBF16) return f(PureBFloat16{}, PureBFloat16{});
  WithTypes(x_dtype, y_dtype, [&](auto x, auto y) {
    constexpr bool kPure = std::is_same_v<decltype(x), BFloat16> && std::is_same_v<decltype(y), BFloat16>;
    if constexpr (!kPure) f(x, y);
  });
}

// Where in a row a loop is: a whole step, or what is left of the row after the last one.
struct Whole {
  int64_t column;

  template <typename T>
  Floats Load(const T* row) const {
    return JAX_RMSNORM_ISA::Load(row + column);
  }
  template <typename T>
  void Store(T* row, Floats values) const {
    JAX_RMSNORM_ISA::Store(row + column, values);
  }
  Whole operator+(int64_t columns) const { return {column + columns}; }
};

struct Rest {
  int64_t column;
  int64_t count;

  template <typename T>
  Floats Load(const T* row) const {
    return LoadSome(row + column, count);
  }
  template <typename T>
  void Store(T* row, Floats values) const {
    StoreSome(row + column, values, count);
  }
  Rest operator+(int64_t columns) const { return {column + columns, count}; }
};

// Calls body(at) for each step of the columns [first, last).
template <typename Body>
inline void ForColumns(int64_t first, int64_t last, Body&& body) {
  int64_t column = first;
  for (; column + kStep <= last; column += kStep) body(Whole{column});
  if (column < last) body(Rest{column, last - column});
}

// Where a row of float32 that takes part in a loop over T has its values in the order of Load<T> within each
// step, and the last step whole; else it is like any other row, and may be used in place.
template <typename T>
constexpr bool kRearranged = std::is_same_v<T, PureBFloat16>;

template <typename T, typename At>
inline Floats LoadFloats(At at, const float* row) {
  if constexpr (kRearranged<T>) return Load(row + at.column);
  return at.Load(row);
}

template <typename T, typename At>
inline void StoreFloats(At at, float* row, Floats values) {
  if constexpr (kRearranged<T>) return Store(row + at.column, values);
  at.Store(row, values);
}

// Calls f(load) where load(at) are values of the row of `dtype` at `rows` + `offset` elements, in the order
// of Load<T>.
template <typename T, typename F>
void WithRow(DType dtype, const void* rows, int64_t offset, F&& f) {
  WithType(dtype, [&](auto tag) {
    using Element = decltype(tag);
    if constexpr (kRearranged<T> && std::is_same_v<Element, BFloat16>) {
      const auto* row = static_cast<const T*>(rows) + offset;
      f([row](auto at) { return at.Load(row); });
    } else {
      const auto* row = static_cast<const Element*>(rows) + offset;
      f([row](auto at) { return ToOrderOf<T>(at.Load(row)); });
    }
  });
}

// Such a row for as long as a task takes. Not a std::vector, whose code would be shared between instruction
// sets.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { operator delete[](values_, kAlignment); }

  float* Row(int64_t hidden) {
    if (values_ == nullptr) values_ = new (kAlignment) float[static_cast<size_t>(hidden + kStep)];
    return values_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* values_ = nullptr;
};

// The sum over a row of term(at), in several independent chains: one alone would wait for each addition.
template <typename Term>
inline float SumColumns(int64_t hidden, Term&& term) {
  Floats even = {}, odd = {};
  int64_t column = 0;
  for (; column + 2 * kStep <= hidden; column += 2 * kStep) {
    even = even + term(Whole{column});
    odd = odd + term(Whole{column + kStep});
  }
  ForColumns(column, hidden, [&](auto at) { even = even + term(at); });
  return Sum(even + odd);
}

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
