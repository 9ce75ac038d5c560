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

// Calls body(column, load, store) for each vector of the columns [first, last); load and store take a pointer
// to the row's first element, and handle the vector that is not full.
template <typename Body>
inline void ForColumns(int64_t first, int64_t last, Body&& body) {
  int64_t column = first;
  for (; column + kLanes <= last; column += kLanes) {
    body([column](const auto* row) { return Load(row + column); },
         [column](auto* row, Floats values) { Store(row + column, values); });
  }
  if (const int64_t rest = last - column; rest > 0) {
    body([column, rest](const auto* row) { return LoadSome(row + column, rest); },
         [column, rest](auto* row, Floats values) { StoreSome(row + column, values, rest); });
  }
}

// The sum over a row of term(load), in several independent chains: one alone would wait for each addition.
template <typename Term>
inline float SumColumns(int64_t hidden, Term&& term) {
  constexpr int kChains = 4;
  Floats sums[kChains] = {};
  int64_t column = 0;
  for (; column + kChains * kLanes <= hidden; column += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = column + chain * kLanes;
      sums[chain] += term([at](const auto* row) { return Load(row + at); });
    }
  }
  ForColumns(column, hidden, [&](auto load, auto) { sums[0] += term(load); });
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
        ForColumns(0, hidden_, [&](auto load, auto store) { store(values_, load(from) + center); });
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
  Gamma gamma(args);
  for (int64_t row = first; row < last; ++row) {
    const X* x = static_cast<const X*>(args.x) + row * hidden;
    Y* y = static_cast<Y*>(args.y) + row * hidden;
    const float* g = gamma.Row(row / args.shape.rows);
    const float sum = SumColumns(hidden, [&](auto load) {
      const Floats values = load(x);
      return values * values;
    });
    const float rrms = 1.0f / std::sqrt(sum / static_cast<float>(hidden) + args.arithmetic.eps);
    if (args.rrms != nullptr) args.rrms[row] = rrms;
    ForColumns(0, hidden, [&](auto load, auto store) {
      Floats normalized = load(x) * rrms;
      if constexpr (kRound) normalized = RoundTo<X>(normalized);
      store(y, normalized * load(g));
    });
  }
}

// One pass over memory: the second sweep over a row finds it in the cache.
template <typename X, typename D, bool kRound>
void BackwardRows(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  const int64_t hidden = args.shape.hidden;
  Gamma gamma(args);
  const float* g = gamma.Row(group);
  if (partial != nullptr) std::memset(partial, 0, static_cast<size_t>(hidden) * sizeof(float));
  for (int64_t row = first; row < last; ++row) {
    const int64_t index = group * args.shape.rows + row;
    const X* x = static_cast<const X*>(args.x) + index * hidden;
    const D* dy = static_cast<const D*>(args.dy) + index * hidden;
    X* dx = static_cast<X*>(args.dx) + index * hidden;
    const float rrms = args.rrms[index];
    const float sum = SumColumns(hidden, [&](auto load) { return (load(dy) * load(g)) * (load(x) * rrms); });
    const float c = sum / static_cast<float>(hidden);
    const auto write_dx = [&](auto load, auto store, Floats normalized, Floats dys) {
      store(dx, rrms * (dys * load(g) - normalized * c));
    };
    if (partial == nullptr) {
      ForColumns(0, hidden, [&](auto load, auto store) { write_dx(load, store, load(x) * rrms, load(dy)); });
    } else {
      ForColumns(0, hidden, [&](auto load, auto store) {
        const Floats normalized = load(x) * rrms;
        const Floats dys = load(dy);
        store(partial, load(partial) + dys * (kRound ? RoundTo<X>(normalized) : normalized));
        write_dx(load, store, normalized, dys);
      });
    }
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
    ForColumns(first, last, [&](auto load, auto store) {
      Floats total = {};
      for (int64_t row = 0; row < count; ++row) total += load(partials + row * hidden);
      store(dgamma, total);
    });
  });
}

}  // namespace

#define JAX_RMSNORM_NAME_OF(isa) #isa
#define JAX_RMSNORM_NAME(isa) JAX_RMSNORM_NAME_OF(isa)
const CpuKernels kKernels = {JAX_RMSNORM_NAME(JAX_RMSNORM_ISA), Forward, Backward, Finish};

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
