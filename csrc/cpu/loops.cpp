// The choice of instruction set.
#include "loops.h"

#include <cstdlib>
#include <cstring>

namespace ffw::cpu {
namespace {

const InstructionSet& choose() {
#if FFW_HAS_X86_LOOPS
  const char* limit = std::getenv("FFW_FAST_CPU_CAPABILITY");
  if (limit != nullptr && std::strcmp(limit, "baseline") == 0) return baseline;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (limit == nullptr || std::strcmp(limit, "avx2") != 0)) return avx512;
  if (has_avx2) return avx2;
#endif
  return baseline;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

template <>
const Loops<float>& loops<float>() {
  return instruction_set().single_precision;
}

template <>
const Loops<double>& loops<double>() {
  return instruction_set().double_precision;
}

}  // namespace ffw::cpu

// Name of the instruction set in use, for ffw_fast.backend.
extern "C" __attribute__((visibility("default"))) const char* ffw_fast_cpu_capability() {
  return ffw::cpu::instruction_set().name;
}
