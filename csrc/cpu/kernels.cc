// The kernels themselves, compiled once for each instruction set, with JAX_RMSNORM_ISA as its name and
// namespace.
#include "kernels.h"

#include <cmath>
#include <new>
#include <type_traits>

#include "elements.h"

namespace jax_rmsnorm {
namespace JAX_RMSNORM_ISA {
namespace {

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

// Calls f(X{}, Y{}) likewise.
template <typename F>
void WithTypes(DType x_dtype, DType y_dtype, F&& f) {
  if (x_dtype == DType::kBF16 && y_dtype == DType::kBF16) return f(PureBFloat16{}, PureBFloat16{});
  WithType(x_dtype, [&](auto x) {
    WithType(y_dtype, [&](auto y) {
      constexpr bool kPure = std::is_same_v<decltype(x), BFloat16> && std::is_same_v<decltype(y), BFloat16>;
      if constexpr (!kPure) f(x, y);
    });
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

// One group's gamma, or ones where there is none: in place where that will do.
template <typename T, typename Args>
const float* GammaRow(const Args& args, int64_t group, Scratch* scratch) {
  const int64_t hidden = args.shape.hidden;
  const bool zero_centered = args.arithmetic.zero_centered_gamma;
  if (!kRearranged<T> && args.gamma != nullptr && args.gamma_dtype == DType::kF32 && !zero_centered) {
    return static_cast<const float*>(args.gamma) + group * hidden;
  }
  float* row = scratch->Row(hidden);
  if (args.gamma == nullptr) {
    ForColumns(0, hidden, [&](auto at) { StoreFloats<T>(at, row, Broadcast(1.0f)); });
    return row;
  }
  const Floats center = Broadcast(zero_centered ? 1.0f : -0.0f);
  WithType(args.gamma_dtype, [&](auto tag) {
    const auto* gamma = static_cast<const decltype(tag)*>(args.gamma) + group * hidden;
    ForColumns(0, hidden, [&](auto at) { StoreFloats<T>(at, row, ToOrderOf<T>(at.Load(gamma) + center)); });
  });
  return row;
}

template <typename X, typename Y, bool kRound>
void ForwardRows(const ForwardArgs& args, int64_t first, int64_t last) {
  const int64_t hidden = args.shape.hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  Scratch scratch;
  const float* gamma = nullptr;
  for (int64_t row = first; row < last; ++row) {
    if (row == first || row % args.shape.rows == 0) {
      gamma = GammaRow<X>(args, row / args.shape.rows, &scratch);
    }
    const X* x = static_cast<const X*>(args.x) + row * hidden;
    Y* y = static_cast<Y*>(args.y) + row * hidden;
    const float sum = SumColumns(hidden, [&](auto at) {
      const Floats values = at.Load(x);
      return values * values;
    });
    const float rrms = 1.0f / std::sqrt(sum * inverse_hidden + args.arithmetic.eps);
    if (args.rrms != nullptr) args.rrms[row] = rrms;
    ForColumns(0, hidden, [&](auto at) {
      Floats normalized = at.Load(x) * rrms;
      if constexpr (kRound) normalized = RoundTo<X>(normalized);
      at.Store(y, normalized * LoadFloats<X>(at, gamma));
    });
  }
}

// What the backward of a row does for dgamma: nothing, or add the products of dy and the normalised row,
// which may have been rounded to x's dtype.
enum class DGamma { kNone, kPlain, kRounded };

// One pass over memory: the second sweep over a row finds it in the cache.
template <typename X, typename D, DGamma kDGamma>
void BackwardRows(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  const int64_t hidden = args.shape.hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  Scratch gamma_scratch, dgamma_scratch;
  const float* gamma = GammaRow<X>(args, group, &gamma_scratch);
  float* dgamma = partial;
  if constexpr (kDGamma != DGamma::kNone) {
    if constexpr (kRearranged<X>) dgamma = dgamma_scratch.Row(hidden);
    ForColumns(0, hidden, [&](auto at) { StoreFloats<X>(at, dgamma, Broadcast(0.0f)); });
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t index = group * args.shape.rows + row;
    const X* x = static_cast<const X*>(args.x) + index * hidden;
    const D* dy = static_cast<const D*>(args.dy) + index * hidden;
    X* dx = static_cast<X*>(args.dx) + index * hidden;
    const float rrms = args.rrms[index];
    const float sum = SumColumns(
        hidden, [&](auto at) { return (at.Load(dy) * LoadFloats<X>(at, gamma)) * (at.Load(x) * rrms); });
    const float c = sum * inverse_hidden;
    ForColumns(0, hidden, [&](auto at) {
      const Floats normalized = at.Load(x) * rrms;
      const Floats dys = at.Load(dy);
      if constexpr (kDGamma != DGamma::kNone) {
        const Floats factor = kDGamma == DGamma::kRounded ? RoundTo<X>(normalized) : normalized;
        StoreFloats<X>(at, dgamma, LoadFloats<X>(at, dgamma) + dys * factor);
      }
      at.Store(dx, (dys * LoadFloats<X>(at, gamma) - normalized * c) * rrms);
    });
  }
  if constexpr (kDGamma != DGamma::kNone && kRearranged<X>) {
    ForColumns(0, hidden, [&](auto at) { at.Store(partial, FromOrderOf<X>(LoadFloats<X>(at, dgamma))); });
  }
}

void Forward(const ForwardArgs& args, int64_t first, int64_t last) {
  WithTypes(args.x_dtype, args.y_dtype, [&](auto x, auto y) {
    if (args.arithmetic.round_before_gamma) {
      ForwardRows<decltype(x), decltype(y), true>(args, first, last);
    } else {
      ForwardRows<decltype(x), decltype(y), false>(args, first, last);
    }
  });
}

void Backward(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  WithTypes(args.x_dtype, args.dy_dtype, [&](auto x, auto dy) {
    using X = decltype(x);
    using D = decltype(dy);
    if (partial == nullptr) {
      BackwardRows<X, D, DGamma::kNone>(args, group, first, last, partial);
    } else if (args.arithmetic.round_before_gamma) {
      BackwardRows<X, D, DGamma::kRounded>(args, group, first, last, partial);
    } else {
      BackwardRows<X, D, DGamma::kPlain>(args, group, first, last, partial);
    }
  });
}

void Finish(const BackwardArgs& args, int64_t group, int64_t count, int64_t first, int64_t last) {
  const int64_t hidden = args.shape.hidden;
  const float* partials = args.partials + group * args.partial_rows * hidden;
  WithType(args.gamma_dtype, [&](auto tag) {
    auto* dgamma = static_cast<decltype(tag)*>(args.dgamma) + group * hidden;
    ForColumns(first, last, [&](auto at) {
      Floats total = {};
      for (int64_t row = 0; row < count; ++row) total = total + at.Load(partials + row * hidden);
      at.Store(dgamma, total);
    });
  });
}

}  // namespace

#define JAX_RMSNORM_NAME_OF(isa) #isa
#define JAX_RMSNORM_NAME(isa) JAX_RMSNORM_NAME_OF(isa)
const CpuKernels kKernels = {JAX_RMSNORM_NAME(JAX_RMSNORM_ISA), Forward, Backward, Finish};

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
