// The rotary embedding of rows.
#pragma once

#include "rows.h"

namespace jax_rmsnorm {
namespace JAX_RMSNORM_ISA {

inline Vector LoadHalf(Whole at, const float* row) { return LoadVector<Vector>(row + at.column / 2); }
inline Vector LoadHalf(Rest at, const float* row) { return LoadSome(row + at.column / 2, at.count / 2).a; }

// Rotates rows whose values are in the order of Load<T>, or rotates them back.
template <typename T>
class Rotation {
 public:
  enum Direction { kForth, kBack };

  Rotation(const Rotary& rotary, int64_t hidden, Direction direction)
      : rotary_(rotary), hidden_(hidden), sign_(direction == kForth ? 1.0f : -1.0f) {}

  // load(at) are values of the row, and store(at, values) takes the rotated ones. `row` is counted through
  // all groups, and never less than the last time.
  template <typename LoadValues, typename StoreValues>
  void Rotate(int64_t row, LoadValues&& load, StoreValues&& store) {
    if (row >= end_) FindPosition(row / rotary_.heads);
    const float* const cos = cos_;
    const float* const sin = sin_;
    if (rotary_.interleaved) {
      ForColumns(0, rotary_.width, [&](auto at) {
        const Floats values = load(at);
        const Floats pairs = kRearranged<T> ? values : Deinterleave(values);
        const Vector c = LoadHalf(at, cos), s = LoadHalf(at, sin);
        const Floats rotated = {pairs.a * c - pairs.b * s, pairs.b * c + pairs.a * s};
        store(at, kRearranged<T> ? rotated : Interleave(rotated));
      });
    } else {
      const int64_t half = rotary_.width / 2;
      ForColumns(0, half, [&](auto at) {
        const Floats a = load(at), b = load(at + half);
        const Floats c = LoadFloats<T>(at, cos), s = LoadFloats<T>(at, sin);
        store(at, a * c - b * s);
        store(at + half, b * c + a * s);
      });
    }
    ForColumns(rotary_.width, hidden_, [&](auto at) { store(at, load(at)); });
  }

 private:
  void FindPosition(int64_t rows_of_heads) {
    end_ = (rows_of_heads + 1) * rotary_.heads;
    const int64_t offset = rows_of_heads % rotary_.positions * (rotary_.width / 2);
    cos_ = Table(rotary_.cos, offset, 1.0f, &cos_scratch_);
    sin_ = Table(rotary_.sin, offset, sign_, &sin_scratch_);
  }

  // A position's row of cos or sin as floats: in place where that will do.
  const float* Table(const void* table, int64_t offset, float sign, Scratch* scratch) const {
    const int64_t half = rotary_.width / 2;
    if (!kRearranged<T> && rotary_.dtype == DType::kF32 && sign == 1.0f) {
      return static_cast<const float*>(table) + offset;
    }
    float* row = scratch->Row(half);
    if (rotary_.interleaved) {
      WithRow<float>(rotary_.dtype, table, offset, [&](auto load) {
        ForColumns(0, half, [&](auto at) {
          const Floats values = load(at) * sign;
          at.Store(row, kRearranged<T> ? Floats{PlainNaN(values.a), PlainNaN(values.b)} : values);
        });
      });
    } else {
      WithRow<T>(rotary_.dtype, table, offset, [&](auto load) {
        ForColumns(0, half, [&](auto at) { StoreFloats<T>(at, row, load(at) * sign); });
      });
    }
    return row;
  }

  const Rotary& rotary_;
  const int64_t hidden_;
  const float sign_;
  int64_t end_ = 0;  // the first row of the next position
  const float* cos_ = nullptr;
  const float* sin_ = nullptr;
  Scratch cos_scratch_, sin_scratch_;
};

// Whether steps and pairs meet, so that rows may be rotated in the order of Load<PureBFloat16>.
inline bool RotatesRearranged(const Rotary& rotary, int64_t hidden) {
  if (rotary.interleaved) return rotary.width % kStep == 0 || rotary.width == hidden;
  return rotary.width / 2 % kStep == 0;
}

}  // namespace JAX_RMSNORM_ISA
}  // namespace jax_rmsnorm
