// Python module jax_rmsnorm._cpu: the handlers as capsules, and the instruction sets.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "handlers.h"
#include "kernels.h"

namespace nb = nanobind;

namespace jax_rmsnorm {
namespace {

template <typename Handler>
nb::capsule Capsule(Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (const CpuKernels* const* set = AvailableKernels(); *set != nullptr; ++set)
    names.emplace_back((*set)->name);
  return names;
}

}  // namespace
}  // namespace jax_rmsnorm

NB_MODULE(_cpu, m) {
  namespace rms = jax_rmsnorm;
  m.doc() = "XLA FFI handlers of the CPU kernels.";
  m.def(
      "forward", [] { return rms::Capsule(rms::CpuForward); },
      "The forward handler, for register_ffi_target.");
  m.def(
      "add_forward", [] { return rms::Capsule(rms::CpuAddForward); },
      "The fused add's forward handler, for register_ffi_target.");
  m.def(
      "rope_forward", [] { return rms::Capsule(rms::CpuRopeForward); },
      "The fused rotary embedding's forward handler, for register_ffi_target.");
  m.def(
      "backward", [] { return rms::Capsule(rms::CpuBackward); },
      "The backward handler, for register_ffi_target.");
  m.def(
      "add_backward", [] { return rms::Capsule(rms::CpuAddBackward); },
      "The fused add's backward handler, for register_ffi_target.");
  m.def(
      "rope_backward", [] { return rms::Capsule(rms::CpuRopeBackward); },
      "The fused rotary embedding's backward handler, for register_ffi_target.");
  m.def("instruction_sets", &rms::InstructionSets, "Instruction sets that this machine can run, best first.");
  m.def(
      "active_instruction_set", [] { return std::string(rms::ActiveKernels().name); },
      "The one in use: the best, or the one named by JAX_RMSNORM_CPU_ISA.");
}
