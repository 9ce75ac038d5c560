// The kernels themselves, compiled once for each instruction set, with JAX_RMSNORM_ISA as its name and
// namespace.
#include "kernels.h"

#include <cmath>

#include "rotation.h"
#include "rows.h"

namespace jax_rmsnorm {
namespace JAX_RMSNORM_ISA {
namespace {

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
  WithRow<T>(args.gamma_dtype, args.gamma, group * hidden, [&](auto load) {
    ForColumns(0, hidden, [&](auto at) { StoreFloats<T>(at, row, load(at) + center); });
  });
  return row;
}

template <typename X>
float SumOfSquares(int64_t hidden, const X* x) {
  return SumColumns(hidden, [&](auto at) {
    const Floats values = at.Load(x);
    return values * values;
  });
}

// h = x + addend, rounded; returns the sum of its squares.
template <typename X>
float AddRow(const ForwardArgs& args, int64_t row) {
  const int64_t hidden = args.shape.hidden;
  const X* x = static_cast<const X*>(args.x) + row * hidden;
  X* h = static_cast<X*>(args.h) + row * hidden;
  float sum = 0;
  WithRow<X>(args.addend_dtype, args.addend, row * hidden, [&](auto addend) {
    sum = SumColumns(hidden, [&](auto at) {
      at.Store(h, at.Load(x) + addend(at));
      const Floats values = at.Load(h);
      return values * values;
    });
  });
  return sum;
}

template <typename X, typename Y, bool kRound, Fusion kFusion>
void ForwardRows(const ForwardArgs& args, int64_t first, int64_t last) {
  const int64_t hidden = args.shape.hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  Scratch scratch;
  Rotation<X> rotation(args.rotary, hidden, Rotation<X>::kForth);
  const float* gamma = nullptr;
  for (int64_t row = first; row < last; ++row) {
    if (row == first || row % args.shape.rows == 0) {
      gamma = GammaRow<X>(args, row / args.shape.rows, &scratch);
    }
    const void* normed = kFusion == Fusion::kAdd ? args.h : args.x;
    const X* x = static_cast<const X*>(normed) + row * hidden;
    Y* y = static_cast<Y*>(args.y) + row * hidden;
    const float sum = kFusion == Fusion::kAdd ? AddRow<X>(args, row) : SumOfSquares(hidden, x);
    const float rrms = 1.0f / std::sqrt(sum * inverse_hidden + args.arithmetic.eps);
    if (args.rrms != nullptr) args.rrms[row] = rrms;
    const auto result = [&](auto at) {
      Floats normalized = at.Load(x) * rrms;
      if constexpr (kRound) normalized = RoundTo<X>(normalized);
      return normalized * LoadFloats<X>(at, gamma);
    };
    const auto store = [&](auto at, Floats values) { at.Store(y, values); };
    if constexpr (kFusion == Fusion::kRotary) {
      rotation.Rotate(row, result, store);
    } else {
      ForColumns(0, hidden, [&](auto at) { store(at, result(at)); });
    }
  }
}

// What the backward of a row does for dgamma: nothing, or add the products of dy and the normalised row,
// which may have been rounded to x's dtype.
enum class DGamma { kNone, kPlain, kRounded };

// What it does beside: nothing; add dh to dx; or gather the gradient of y in a row of floats first, where it
// is rotated back or several are added up, and then add dh if there is one.
enum class Beside { kNothing, kAdd, kGather };

// The sum of the gradients of y, [hidden] at `offset`, in the order of Load<X>.
template <typename X>
void AddUpGradients(const BackwardArgs& args, int64_t offset, float* sum) {
  for (int32_t i = 0; i < args.gradients; ++i) {
    WithRow<X>(args.dy_dtype, args.dy[i], offset, [&](auto load) {
      ForColumns(0, args.shape.hidden, [&](auto at) {
        StoreFloats<X>(at, sum, i == 0 ? load(at) : LoadFloats<X>(at, sum) + load(at));
      });
    });
  }
}

// One pass over memory: the second sweep over a row finds it in the cache. D is dy's type, but float where dy
// is gathered, which leaves floats in the order of Load<X>.
template <typename X, typename D, DGamma kDGamma, Beside kBeside>
void BackwardRows(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  const int64_t hidden = args.shape.hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  Scratch gamma_scratch, dgamma_scratch, dy_scratch;
  Rotation<X> rotation(args.rotary, hidden, Rotation<X>::kBack);
  const float* gamma = GammaRow<X>(args, group, &gamma_scratch);
  float* dgamma = partial;
  if constexpr (kDGamma != DGamma::kNone) {
    if constexpr (kRearranged<X>) dgamma = dgamma_scratch.Row(hidden);
    ForColumns(0, hidden, [&](auto at) { StoreFloats<X>(at, dgamma, Broadcast(0.0f)); });
  }
  const bool adds = kBeside == Beside::kAdd || (kBeside == Beside::kGather && args.dh != nullptr);
  for (int64_t row = first; row < last; ++row) {
    const int64_t index = group * args.shape.rows + row;
    const X* x = static_cast<const X*>(args.x) + index * hidden;
    const D* dy = static_cast<const D*>(args.dy[0]) + index * hidden;
    const X* dh = static_cast<const X*>(args.dh) + index * hidden;
    X* dx = static_cast<X*>(args.dx) + index * hidden;
    if constexpr (kBeside == Beside::kGather) {
      float* gathered = dy_scratch.Row(hidden);
      if (args.rotary.cos == nullptr) {
        AddUpGradients<X>(args, index * hidden, gathered);
      } else {
        WithRow<X>(args.dy_dtype, args.dy[0], index * hidden, [&](auto load) {
          rotation.Rotate(index, load, [&](auto at, Floats values) { StoreFloats<X>(at, gathered, values); });
        });
      }
      dy = gathered;
    }
    const auto load_dy = [&](auto at) {
      if constexpr (kBeside == Beside::kGather)
        return LoadFloats<X>(at, dy);
      else
        return at.Load(dy);
    };
    const float rrms = args.rrms[index];
    const float sum = SumColumns(
        hidden, [&](auto at) { return (load_dy(at) * LoadFloats<X>(at, gamma)) * (at.Load(x) * rrms); });
    const float c = sum * inverse_hidden;
    ForColumns(0, hidden, [&](auto at) {
      const Floats normalized = at.Load(x) * rrms;
      const Floats dys = load_dy(at);
      if constexpr (kDGamma != DGamma::kNone) {
        const Floats factor = kDGamma == DGamma::kRounded ? RoundTo<X>(normalized) : normalized;
        StoreFloats<X>(at, dgamma, LoadFloats<X>(at, dgamma) + dys * factor);
      }
      Floats gradient = (dys * LoadFloats<X>(at, gamma) - normalized * c) * rrms;
      if (adds) gradient = gradient + at.Load(dh);
      at.Store(dx, gradient);
    });
  }
  if constexpr (kDGamma != DGamma::kNone && kRearranged<X>) {
    ForColumns(0, hidden, [&](auto at) { at.Store(partial, FromOrderOf<X>(LoadFloats<X>(at, dgamma))); });
  }
}

template <Fusion kFusion>
struct ForwardOf {
  const ForwardArgs& args;
  int64_t first, last;

  template <typename X, typename Y>
  void operator()(X, Y) const {
    if (args.arithmetic.round_before_gamma) {
      ForwardRows<X, Y, true, kFusion>(args, first, last);
    } else {
      ForwardRows<X, Y, false, kFusion>(args, first, last);
    }
  }
};

void Forward(const ForwardArgs& args, int64_t first, int64_t last) {
  const DType x = args.x_dtype, y = args.y_dtype;
  switch (FusionOf(args)) {
    case Fusion::kNone:
      return WithFastTypes(x, y, ForwardOf<Fusion::kNone>{args, first, last});
    case Fusion::kAdd:
      return WithFastTypes(x, y, ForwardOf<Fusion::kAdd>{args, first, last});
    case Fusion::kRotary:
      const ForwardOf<Fusion::kRotary> forward{args, first, last};
      if (RotatesRearranged(args.rotary, args.shape.hidden)) return WithFastTypes(x, y, forward);
      return WithTypes(x, y, forward);
  }
}

template <Beside kBeside>
struct BackwardOf {
  const BackwardArgs& args;
  int64_t group, first, last;
  float* partial;

  template <typename X, typename D>
  void operator()(X, D) const {
    if (partial == nullptr) {
      BackwardRows<X, D, DGamma::kNone, kBeside>(args, group, first, last, partial);
    } else if (args.arithmetic.round_before_gamma) {
      BackwardRows<X, D, DGamma::kRounded, kBeside>(args, group, first, last, partial);
    } else {
      BackwardRows<X, D, DGamma::kPlain, kBeside>(args, group, first, last, partial);
    }
  }
};

// Whether gathering dy moves no value between the lanes of PureBFloat16.
bool GathersRearranged(const BackwardArgs& args) {
  if (args.x_dtype != DType::kBF16) return false;
  if (args.rotary.cos != nullptr) return RotatesRearranged(args.rotary, args.shape.hidden);
  return args.dy_dtype == DType::kBF16;
}

void Backward(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial) {
  const DType x = args.x_dtype, dy = args.dy_dtype;
  if (args.gradients > 1 || args.rotary.cos != nullptr) {
    const BackwardOf<Beside::kGather> backward{args, group, first, last, partial};
    if (GathersRearranged(args)) return backward(PureBFloat16{}, float{});
    return WithType(x, [&](auto tag) { backward(tag, float{}); });
  }
  if (args.dh != nullptr) {
    return WithFastTypes(x, dy, BackwardOf<Beside::kAdd>{args, group, first, last, partial});
  }
  WithFastTypes(x, dy, BackwardOf<Beside::kNothing>{args, group, first, last, partial});
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
