// The backward kernel of many rows that do not begin at multiples of 16 bytes, where there are bulk copies.
#pragma once

#include <type_traits>

#include "backward_common.cuh"
#include "bulk.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// The values of a packet's words, as they are in arrays of words.
template <int kUnit, int kSize, int kWords>
__device__ __forceinline__ void GetPacket(const float (&words)[kWords][kUnit], int first,
                                          float (&packet)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) packet[i] = words[first + i / kUnit][i % kUnit];
}

// One row (or strip of one) of BackwardBulkKernel, of which a thread has `Words`, x at `x_at` in shared
// memory and dy at `dy_at`.
template <typename T, typename D, int kSize, int kUnit, int kPackets, int kLanes, bool kTail>
struct BulkRow {
  using Words = BulkWords<kSize, kUnit, kPackets, kLanes, kTail>;
  using OfThread = float[Words::kCount][kUnit];
  // Where what comes round is not in the place of the first element it is a window of its own.
  static constexpr bool kRound = CircleSum<kSize, kPackets>::kRound;
  using Circle = CircleSum<kSize, kPackets == 3 ? 4 : kPackets>;

  // Packet k of an operand.
  template <typename Operand>
  static __device__ __forceinline__ void Read(uint32_t at, int k, float (&values)[kSize]) {
    constexpr int kApart = Words::kStep * static_cast<int>(sizeof(Operand));
    ReadWords<Operand, kUnit>(at + k * Words::kOfPacket * kApart, kApart, values);
  }

  // Adds up the products and takes the row's part of dgamma. kInner: all words are the row's, and nothing is
  // rounded before gamma. `further_gamma`: of the element behind the strip's words.
  template <bool kInner>
  static __device__ __forceinline__ void Accumulate(const Words& words, int hidden, int lane, uint32_t x_at,
                                                    uint32_t dy_at, const OfThread& gamma,
                                                    float further_gamma, float rrms, bool round_before_gamma,
                                                    OfThread& dgamma, Circle& circle) {
    float further[kSize] = {};
    if (words.HasFurther()) {
      const int behind = kLanes * kSize * kPackets - lane * kUnit;
      float x[kUnit], dy[kUnit];
      ReadWords<T, kUnit>(x_at + behind * static_cast<int>(sizeof(T)), 0, x);
      ReadWords<D, kUnit>(dy_at + behind * static_cast<int>(sizeof(D)), 0, dy);
      if (lane == 0) further[0] = __fmul_rn(__fmul_rn(dy[0], x[0]), further_gamma);
    }
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      if (!kInner && k > 0 && !words.Reaches(k, hidden)) break;
      constexpr int kOfPacket = Words::kOfPacket;
      float x[kSize], dy[kSize], terms[kSize], gammas[kSize], dgammas[kSize];
      Read<T>(x_at, k, x);
      Read<D>(dy_at, k, dy);
      GetPacket(gamma, k * kOfPacket, gammas);
      GetPacket(dgamma, k * kOfPacket, dgammas);
      AccumulateWindow<T>(x, dy, gammas, rrms, !kInner && round_before_gamma, dgammas, terms);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int word = k * kOfPacket + i / kUnit;
        dgamma[word][i % kUnit] = dgammas[i];
        if (!kInner && !words.Has(word, i % kUnit)) terms[i] = 0.0f;
      }
      if (k == 0) {
        if (!kInner && words.HasHead()) terms[0] = 0.0f;
        if (words.IsTurned()) terms[0] = kRound ? further[0] : 0.0f;
      }
      circle.Add(k, terms);
    }
    if constexpr (kPackets == 3) circle.Add(3, further);
  }

  // Writes dx: `to` is for the first word. kInner: all words are the row's.
  template <bool kInner>
  static __device__ __forceinline__ void Differentiate(const Words& words, int hidden, uint32_t x_at,
                                                       uint32_t dy_at, const OfThread& gamma, float rrms,
                                                       float slope, T* to) {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      if (!kInner && k > 0 && !words.Reaches(k, hidden)) break;
      constexpr int kOfPacket = Words::kOfPacket;
      float x[kSize], dy[kSize], dx[kSize], gammas[kSize];
      Read<T>(x_at, k, x);
      Read<D>(dy_at, k, dy);
      GetPacket(gamma, k * kOfPacket, gammas);
      jax_rmsnorm::Differentiate(x, dy, gammas, rrms, slope, dx);
#pragma unroll
      for (int j = 0; j < kOfPacket; ++j) {
        const int number = k * kOfPacket + j;
        float of_word[kUnit];
#pragma unroll
        for (int u = 0; u < kUnit; ++u) of_word[u] = dx[j * kUnit + u];
        Packet<T, kUnit> word;
        word.Set(of_word);
        word.Store(to + number * Words::kStep, kInner || words.HasAll(number));
      }
      if constexpr (!kInner && kUnit > 1) {
        if (hidden % kUnit == 0) continue;
        // Half a word at either end of the row.
#pragma unroll
        for (int j = 0; j < kOfPacket; ++j) {
          const int number = k * kOfPacket + j;
          if (number > 0 && number < Words::kSure) continue;
          const bool head = number == 0 && words.HasHead();
          const bool end = words.Has(number, 0) && !words.Has(number, kUnit - 1);
          const float value[1] = {head ? dx[kUnit - 1] : dx[j * kUnit]};
          Packet<T, 1> element;
          element.Set(value);
          element.Store(to + number * Words::kStep + (head ? 1 : 0), head || end);
        }
      }
    }
  }
};

// Grid, and what is done in a turn: as BackwardKernel. The block's last warp copies: the rows of all slots,
// which lie side by side, at once. The sums have the bits of windows (unaligned.cuh), round whose circle a
// row of odd parity is turned by one element.
//
// Preconditions: all tensors are aligned to 16 bytes; the row fits, hidden + kSize - 1 <= kSize * kPackets *
// threads_per_row * blocks of the cluster; kSize <= threads_per_row, which is kLanes where part of a warp has
// a row; all rows of a slot and group have the same parity.
template <typename T, typename D, int kPackets, int kLanes, Scope kScope>
__global__ __launch_bounds__(BulkThreads(kPackets) + 32,
                             1) void BackwardBulkKernel(const __grid_constant__ BackwardParams params) {
#if __CUDA_ARCH__ >= 900
  constexpr int kNarrowest = sizeof(T) < sizeof(D) ? sizeof(T) : sizeof(D);
  constexpr int kSize = 16 / kNarrowest, kUnit = 4 / kNarrowest;
  constexpr bool kTail = kScope != Scope::kLanes;
  constexpr int kBehind = kTail ? 1 : 0;  // turns from a row's sum to its dx
  constexpr int kElements = kLanes * kSize * kPackets;
  // gamma is read all at the same time, or else, where warps have rows of their own, one element after
  // another: that takes longer for some warps than for others, and warps that do not all do the same at the
  // same time are faster, but for the longest rows of a warp.
  constexpr bool kAtOnce = kTail || (kLanes == 32 && kPackets == 4);
  using Row = BulkRow<T, D, kSize, kUnit, kPackets, kLanes, kTail>;
  using Words = typename Row::Words;
  extern __shared__ __align__(kLine) uint4 shared[];
  __shared__ typename SplitRowSum<kScope>::Shared sum_memory;
  __shared__ BulkRing::Shared ring_memory;
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const ClusterPlace<kScope> place;
  const Slots<kScope, kScope == Scope::kCluster> slots(params.threads_per_row, params.slots);
  const int readers = params.slots * params.threads_per_row;
  const bool produces = static_cast<int>(threadIdx.x) >= readers;
  const int lane = Anew(static_cast<int>(threadIdx.x % 32)), lane_of_row = lane % kLanes;
  // The block's columns begin with `slice`, those of the warp's strip with `first`.
  const int slice_size = place.blocks == 1 ? hidden : slots.threads / 32 * kElements;
  const int slice = place.rank * slice_size;
  const int first = slice + (kTail ? slots.thread / 32 * kElements : 0);
  BulkRing ring(ring_memory, params.ring_places, params.place_bytes);
  const uint32_t memory = SharedAddress(shared), x_bytes = params.x_bytes;
  if (threadIdx.x == 0) ring.Start(readers / 32);
  SplitRowSum<kScope> row_sum(sum_memory, slots.threads, slots.number, slots.thread);
  LaunchDependents();
  __syncthreads();
  row_sum.Start();
  WaitForPrimary();
  Pace pace(params.turn_ns, produces);
  const auto parity_of = [](int64_t start) { return static_cast<int>(start) & (kUnit - 1); };

  const int64_t items = args.shape.groups * params.blocks_per_group;
  unsigned turn = 0;  // counted on from item to item, for row_sum
  for (int64_t item = blockIdx.x / place.blocks; item < items; item += gridDim.x / place.blocks) {
    int column = hidden + 32;  // of no part of dgamma
    float dgamma[Words::kCount][kUnit] = {};
    if (produces) {
      const Turns<> turns(args.shape, params.blocks_per_group, item, params.slots, 0);
      const int64_t elements = args.shape.groups * args.shape.rows * hidden;
      const int64_t end = (turns.group + 1) * args.shape.rows;
      for (int64_t row = turns.row; row < end && lane == 0; row += turns.step) {
        const int64_t start = row * hidden;
        const int parity = parity_of(start);
        const int rows = static_cast<int>(min(end - row, int64_t{params.slots}));
        const int count = place.blocks == 1 ? rows * hidden : min(hidden - slice, slice_size);
        // One before the rows of odd parity, and none where the block has no columns.
        const int copied = max(count + parity, 0);
        const int64_t begin = copied > 0 ? start + slice - parity : 0;
        const BulkSpan<T> x(args.x, begin, copied, elements);
        const BulkSpan<D> dy(args.dy[0], begin, copied, elements);
        pace.Wait();
        PrefetchBulk(args.rrms + row, rows);
        ring.WaitEmpty();
        const uint32_t to = memory + ring.Offset();
        x.CopyRest(to);
        dy.CopyRest(to + x_bytes);
        ring.Expect(x.Bytes() + dy.Bytes());
        x.Copy(to, ring.Full());
        dy.Copy(to + x_bytes, ring.Full());
        ring.Next();
      }
    } else {
      const Turns<> turns(args.shape, params.blocks_per_group, item, params.slots, slots.number);
      const int all = turns.All(), own = turns.Own();
      const int64_t start = turns.row * hidden;
      const int parity = parity_of(start);
      const Words words(hidden, first, parity, lane_of_row);
      column = words.column;
      float gamma[Words::kCount][kUnit], further_gamma = 0.0f;
      WithType(args.gamma_dtype, [&](auto tag) {
        const auto load = [&](int at) {
          const bool inside = at >= 0 && at < hidden;
          float value[1] = {0.0f};
          if (kAtOnce || inside) LoadGammaAs<decltype(tag)>(args, turns.group * hidden, at, value, inside);
          return value[0];
        };
#pragma unroll
        for (int w = 0; w < Words::kCount; ++w) {
#pragma unroll
          for (int u = 0; u < kUnit; ++u) gamma[w][u] = load(words.Column(w) + u);
        }
        if (kTail) further_gamma = load(first + kElements - 1);
      });

      // This thread's first word lies `behind` elements behind the first thing that is copied, which is
      // number `begin` in memory, of which only the place in a line counts.
      const int64_t first_start = start - int64_t{slots.number} * hidden;
      const int first_parity = parity_of(first_start);
      const int behind = slots.number * hidden + first_parity - parity + first - slice + lane_of_row * kUnit;
      auto begin = static_cast<uint32_t>(first_start + slice - first_parity);
      const uint32_t x_base = Anew(memory + behind * static_cast<int>(sizeof(T)));
      // From there to dy, but for the difference of their places in lines.
      const uint32_t to_dy = x_bytes + behind * (static_cast<int>(sizeof(D)) - static_cast<int>(sizeof(T)));
      const auto row_step = Anew(static_cast<int>(turns.step));
      const auto step = Anew(static_cast<int>(turns.step * hidden));
      T* dx_at = static_cast<T*>(args.dx) + start + words.column - kBehind * turns.step * hidden;
      const float* rrms_of = args.rrms + turns.row;
      float rrms = 0.0f, next_rrms = own > 0 ? *rrms_of : 0.0f;
      uint32_t x_at = 0, dy_at = 0;

#pragma unroll 1
      for (int t = 0; t < all + kBehind; ++t) {
        const float last_rrms = rrms;
        const uint32_t last_x_at = x_at, last_dy_at = sizeof(T) == sizeof(D) ? x_at + to_dy : dy_at;
        if (t < all) {
          rrms = next_rrms;
          rrms_of += row_step;
          next_rrms = t + 1 < own ? *rrms_of : 0.0f;
          x_at = x_base + ring.Offset() + InLine<T>(begin);
          dy_at = x_at + to_dy + (sizeof(T) == sizeof(D) ? 0 : InLine<D>(begin) - InLine<T>(begin));
          begin += step;
          ring.WaitFull();
          typename Row::Circle circle;
          if (t < own) {
            const bool round = args.arithmetic.round_before_gamma;
            const auto accumulate = [&](auto inner) {
              Row::template Accumulate<decltype(inner)::value>(words, hidden, lane_of_row, x_at, dy_at, gamma,
                                                               further_gamma, rrms, round, dgamma, circle);
            };
            if (!words.IsOuter() && !round) {
              accumulate(std::true_type{});
            } else {
              accumulate(std::false_type{});
            }
          }
          row_sum.PostOfWarp(turn + t, circle.template OverWords<kUnit>(kLanes));
        }
        if (t >= kBehind) {
          const float mean = row_sum.Wait(turn + t - kBehind) * params.inverse_hidden;
          if (t - kBehind < own) {
            const float of_row = kBehind == 0 ? rrms : last_rrms, slope = Slope(of_row, mean);
            const uint32_t x_from = kBehind == 0 ? x_at : last_x_at;
            const uint32_t dy_from = kBehind == 0 ? dy_at : last_dy_at;
            const auto differentiate = [&](auto inner) {
              Row::template Differentiate<decltype(inner)::value>(words, hidden, x_from, dy_from, gamma,
                                                                  of_row, slope, dx_at);
            };
            if (!words.IsOuter()) {
              differentiate(std::true_type{});
            } else {
              differentiate(std::false_type{});
            }
          }
          ring.Release(kBehind, lane);
        }
        dx_at += step;
        if (t < all) ring.Next();
      }
      turn += all;
    }
    if (args.dgamma == nullptr) continue;

    const int64_t group = args.shape.groups == 1 ? 0 : item / params.blocks_per_group;
    int columns[Words::kCount];
#pragma unroll
    for (int w = 0; w < Words::kCount; ++w) columns[w] = column + w * Words::kStep;
    StoreBlockDgamma<false>(params, group, item - group * params.blocks_per_group, params.slots, slots.number,
                            columns, dgamma, reinterpret_cast<float*>(shared));
    // The slots' shares were in the ring's memory, into which rows are copied next.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (params.slots > 1) __syncthreads();
  }
#endif
}

}  // namespace jax_rmsnorm
