// The kernels themselves, compiled once for each instruction set, with JAX_RMSNORM_ISA as its name and
// namespace.
#include "kernels.h"

#include <cmath>
#include <cstring>

#include "simd.h"

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

// Where in a row a loop is: a whole vector, or what is left of the row after the last one.
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

// Calls body(at) for each vector of the columns [first, last).
template <typename Body>
inline void ForColumns(int64_t first, int64_t last, Body&& body) {
  int64_t column = first;
  for (; column + kLanes <= last; column += kLanes) body(Whole{column});
  if (column < last) body(Rest{column, last - column});
}

// The sum over a row of term(at), in several independent chains: one alone would wait for each addition.
template <typename Term>
inline float SumColumns(int64_t hidden, Term&& term) {
  constexpr int kChains = 4;
  Floats sums[kChains] = {};
  int64_t column = 0;
  for (; column + kChains * kLanes <= hidden; column += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) sums[chain] += term(Whole{column + chain * kLanes});
  }
  ForColumns(column, hidden, [&](auto at) { sums[0] += term(at); });
  return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// gamma as float32, one where there is none: in place where it is that already, else converted once for many
// rows.
class Gamma {
 public:
  template <typename Args>
  explicit Gamma(const Args& args)
      : gamma_(args.gamma),
        dtype_(args.gamma_dtype),
        hidden_(args.shape.hidden),
        zero_centered_(args.arithmetic.zero_centered_gamma) {}

  Gamma(const Gamma&) = delete;
  Gamma& operator=(const Gamma&) = delete;
  ~Gamma() { delete[] values_; }

  const float* Row(int64_t group) {
    if (group == group_) return row_;
    group_ = group;
    if (gamma_ != nullptr && dtype_ == DType::kF32 && !zero_centered_) {
      return row_ = static_cast<const float*>(gamma_) + group * hidden_;
    }
    if (values_ == nullptr) values_ = new float[static_cast<size_t>(hidden_)];
    if (gamma_ == nullptr) {
      for (int64_t i = 0; i < hidden_; ++i) values_[i] = 1.0f;
    } else {
      WithType(dtype_, [&](auto tag) {
        const auto* from = static_cast<const decltype(tag)*>(gamma_) + group * hidden_;
        const Floats center = Broadcast(zero_centered_ ? 1.0f : -0.0f);
        ForColumns(0, hidden_, [&](auto at) { at.Store(values_, at.Load(from) + center); });
      });
    }
    return row_ = values_;
  }

 private:
  const void* gamma_;
  DType dtype_;
  int64_t hidden_;
  bool zero_centered_;
  int64_t group_ = -1;
  const float* row_ = nullptr;
  float* values_ = nullptr;  // not a std::vector, whose code would be shared between instruction sets
};

template <typename X, typename Y, bool kRound>
void ForwardRows(const ForwardArgs& args, int64_t first, int64_t last) {
  const int64_t hidden = args.shape.hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  Gamma gamma(args);
  for (int64_t row = first; row < last; ++row) {
    const X* x = static_cast<const X*>(args.x) + row * hidden;
    Y* y = static_cast<Y*>(args.y) + row * hidden;
    const float* g = gamma.Row(row / args.shape.rows);
    const float sum = SumColumns(hidden, [&](auto at) {
      const Floats values = at.Load(x);
      return values * values;
    });
    const float rrms = 1.0f / std::sqrt(sum * inverse_hidden + args.arithmetic.eps);
    if (args.rrms != nullptr) args.rrms[row] = rrms;
    ForColumns(0, hidden, [&](auto at) {
      Floats normalized = at.Load(x) * rrms;
      if constexpr (kRound) normalized = RoundTo<X>(normalized);
      at.Store(y, normalized * at.Load(g));
    });
  }
}

// One pass over memory: the second sweep over a row finds it in the cache.
template <typename X, typename D, bool kRound>
void BackwardRows(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  const int64_t hidden = args.shape.hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  Gamma gamma(args);
  const float* g = gamma.Row(group);
  if (partial != nullptr) std::memset(partial, 0, static_cast<size_t>(hidden) * sizeof(float));
  for (int64_t row = first; row < last; ++row) {
    const int64_t index = group * args.shape.rows + row;
    const X* x = static_cast<const X*>(args.x) + index * hidden;
    const D* dy = static_cast<const D*>(args.dy) + index * hidden;
    X* dx = static_cast<X*>(args.dx) + index * hidden;
    const float rrms = args.rrms[index];
    const float sum =
        SumColumns(hidden, [&](auto at) { return (at.Load(dy) * at.Load(g)) * (at.Load(x) * rrms); });
    const float c = sum * inverse_hidden;
    ForColumns(0, hidden, [&](auto at) {
      const Floats normalized = at.Load(x) * rrms;
      const Floats dys = at.Load(dy);
      if (partial != nullptr) {
        at.Store(partial, at.Load(partial) + dys * (kRound ? RoundTo<X>(normalized) : normalized));
      }
      at.Store(dx, rrms * (dys * at.Load(g) - normalized * c));
    });
  }
}

void Forward(const ForwardArgs& args, int64_t first, int64_t last) {
  WithType(args.x_dtype, [&](auto x) {
    WithType(args.y_dtype, [&](auto y) {
      if (args.arithmetic.round_before_gamma) {
        ForwardRows<decltype(x), decltype(y), true>(args, first, last);
      } else {
        ForwardRows<decltype(x), decltype(y), false>(args, first, last);
      }
    });
  });
}

void Backward(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  WithType(args.x_dtype, [&](auto x) {
    WithType(args.dy_dtype, [&](auto dy) {
      if (args.arithmetic.round_before_gamma) {
        BackwardRows<decltype(x), decltype(dy), true>(args, group, first, last, partial);
      } else {
        BackwardRows<decltype(x), decltype(dy), false>(args, group, first, last, partial);
      }
    });
  });
}

void Finish(const BackwardArgs& args, int64_t group, int64_t count, int64_t first, int64_t last) {
  const int64_t hidden = args.shape.hidden;
  const float* partials = args.partials + group * args.partial_rows * hidden;
  WithType(args.gamma_dtype, [&](auto tag) {
    auto* dgamma = static_cast<decltype(tag)*>(args.dgamma) + group * hidden;
    ForColumns(first, last, [&](auto at) {
      Floats total = {};
      for (int64_t row = 0; row < count; ++row) total += at.Load(partials + row * hidden);
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
