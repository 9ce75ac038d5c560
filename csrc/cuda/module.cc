// Python module jax_rmsnorm._cuda: the handlers as capsules, and the launch configuration for tests on a
// host.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "config.h"
#include "handlers.h"
#include "roof.h"

namespace nb = nanobind;

namespace jax_rmsnorm {
namespace {

template <typename Handler>
nb::capsule Capsule(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

DType ParseDType(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

Alignment ParseAlignment(const std::string& name) {
  if (name == "rows") return Alignment::kRows;
  if (name == "tensors") return Alignment::kTensors;
  if (name == "none") return Alignment::kNone;
  throw std::invalid_argument("alignment must be rows, tensors or none, got " + name);
}

Fused ParseFused(const std::string& fusion, int64_t rotary_width, int64_t heads, bool interleaved) {
  if (fusion == "none") return {};
  if (fusion == "add") return {Fusion::kAdd};
  if (fusion == "rotary") return {Fusion::kRotary, rotary_width, heads, interleaved};
  throw std::invalid_argument("fusion must be none, add or rotary, got " + fusion);
}

nb::dict ToDict(const LaunchConfig& config) {
  constexpr const char* kMethods[] = {"plain", "staged", "ring", "windows", "bulk", "few"};
  constexpr const char* kScopes[] = {"lanes", "block", "cluster", "loop"};
  nb::dict dict;
  dict["method"] = kMethods[static_cast<int>(config.method)];
  dict["scope"] = kScopes[static_cast<int>(config.scope)];
  dict["aligned"] = config.aligned;
  dict["width"] = config.width;
  dict["packets"] = config.packets;
  dict["threads_per_row"] = config.threads_per_row;
  dict["share"] = config.share;
  dict["slots"] = config.slots;
  dict["block"] = config.block;
  dict["cluster"] = config.cluster;
  dict["more_registers"] = config.more_registers;
  dict["eager"] = config.eager;
  dict["grid"] = config.grid;
  dict["dependent"] = config.dependent;
  dict["tiles"] = config.tiles;
  dict["tile_packets"] = config.tile_packets;
  dict["shared_memory"] = config.shared_memory;
  dict["most_shared_memory"] = config.most_shared_memory;
  dict["blocks_per_group"] = config.blocks_per_group;
  dict["rows"] = config.rows;
  dict["places"] = config.places;
  dict["place_bytes"] = config.place_bytes;
  dict["turn_ns"] = config.turn_ns;
  return dict;
}

Device MakeDevice(int sm_count, int shared_memory, int max_cluster, int64_t l2_bytes,
                  double memory_bandwidth) {
  Device device;
  device.sm_count = sm_count;
  device.shared_memory = shared_memory;
  device.max_cluster = max_cluster;
  device.dependent_launch = device.bulk_copies = max_cluster > 1;
  device.l2_bytes = l2_bytes;
  device.memory_bandwidth = memory_bandwidth;
  return device;
}

nb::dict ForwardConfig(int64_t rows, int64_t hidden, const std::string& x, const std::string& gamma,
                       const std::optional<std::string>& y, const std::string& alignment, int sm_count,
                       int shared_memory, int max_cluster, int margin, const std::string& fusion,
                       int64_t rotary_width, int64_t heads, bool interleaved, int64_t l2_bytes,
                       double memory_bandwidth) {
  const Device device = MakeDevice(sm_count, shared_memory, max_cluster, l2_bytes, memory_bandwidth);
  return ToDict(ConfigureForward(device, {1, rows, hidden}, ParseDType(x), ParseDType(gamma),
                                 ParseDType(y.value_or(x)), ParseAlignment(alignment), margin,
                                 ParseFused(fusion, rotary_width, heads, interleaved)));
}

nb::dict BackwardConfig(int64_t rows, int64_t hidden, const std::string& x, const std::string& dy,
                        const std::string& alignment, int64_t groups, int64_t partial_rows, int sm_count,
                        int shared_memory, int max_cluster, int margin, const std::string& fusion,
                        int64_t rotary_width, int64_t heads, bool interleaved, int gradients,
                        bool gradient_of_h, int64_t l2_bytes, double memory_bandwidth) {
  const Device device = MakeDevice(sm_count, shared_memory, max_cluster, l2_bytes, memory_bandwidth);
  Fused fused = ParseFused(fusion, rotary_width, heads, interleaved);
  fused.gradients = gradients;
  fused.gradient_of_h = gradient_of_h;
  return ToDict(ConfigureBackward(device, {groups, rows, hidden}, ParseDType(x), ParseDType(dy),
                                  ParseAlignment(alignment), partial_rows, margin, fused));
}

bool FusesRope(int64_t hidden, int64_t width, bool interleaved, const std::string& x,
               const std::optional<std::string>& dy) {
  int64_t size = SizeOf(ParseDType(x));
  if (dy) size = std::min(size, SizeOf(ParseDType(*dy)));
  return FusesRotary(hidden, size, {Fusion::kRotary, width, 1, interleaved}, dy.has_value());
}

}  // namespace
}  // namespace jax_rmsnorm

NB_MODULE(_cuda, m) {
  using namespace nb::literals;  // NOLINT
  namespace rms = jax_rmsnorm;
  m.doc() = "XLA FFI handlers of the CUDA kernels.";
  m.attr("architectures") = JAX_RMSNORM_CUDA_ARCHITECTURES;
  m.def(
      "forward", [] { return rms::Capsule(rms::CudaForward); },
      "The forward handler, for register_ffi_target.");
  m.def(
      "backward", [] { return rms::Capsule(rms::CudaBackward); },
      "The backward handler, for register_ffi_target.");
  m.def(
      "add_forward", [] { return rms::Capsule(rms::CudaAddForward); },
      "The forward with an addend, likewise.");
  m.def("add_backward", [] { return rms::Capsule(rms::CudaAddBackward); }, "Its backward, likewise.");
  m.def(
      "rope_forward", [] { return rms::Capsule(rms::CudaRopeForward); },
      "The forward with a rotary embedding, likewise.");
  m.def("rope_backward", [] { return rms::Capsule(rms::CudaRopeBackward); }, "Its backward, likewise.");
  m.def(
      "roof", [] { return rms::Capsule(rms::CudaRoof); },
      "The benchmark's copy kernels, for register_ffi_target.");
  m.attr("roof_variants") = rms::kRoofVariants;
  m.def("forward_config", &rms::ForwardConfig, nb::kw_only(), "rows"_a, "hidden"_a, "x"_a = "bfloat16",
        "gamma"_a = "bfloat16", "y"_a = nb::none(), "alignment"_a = "rows", "sm_count"_a = 132,
        "shared_memory"_a = 232448, "max_cluster"_a = 16, "margin"_a = 0, "fusion"_a = "none",
        "rotary_width"_a = 0, "heads"_a = 1, "interleaved"_a = false, "l2_bytes"_a = 0,
        "memory_bandwidth"_a = 0);
  m.def("backward_config", &rms::BackwardConfig, nb::kw_only(), "rows"_a, "hidden"_a, "x"_a = "bfloat16",
        "dy"_a = "bfloat16", "alignment"_a = "rows", "groups"_a = 1, "partial_rows"_a = 1024,
        "sm_count"_a = 132, "shared_memory"_a = 232448, "max_cluster"_a = 16, "margin"_a = 0,
        "fusion"_a = "none", "rotary_width"_a = 0, "heads"_a = 1, "interleaved"_a = false, "gradients"_a = 1,
        "gradient_of_h"_a = false, "l2_bytes"_a = 0, "memory_bandwidth"_a = 0);
  m.def("fuses_rope", &rms::FusesRope, nb::kw_only(), "hidden"_a, "width"_a, "interleaved"_a, "x"_a,
        "dy"_a.none(),
        "Whether a rotary embedding of `width` elements is fused with the norm of `hidden` elements of dtype "
        "x; "
        "with dy its dtype: whether their backward is.");
}
