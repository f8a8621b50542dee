// The loops for what the compiler may assume of every machine it builds for: SSE2 on x86-64, NEON on aarch64.
#include "loops.h"

#define FFW_ISA baseline_loops
#define FFW_ISA_NAME "baseline"
#define FFW_TARGET
#define FFW_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FFW_FUSED 1
#else
#define FFW_FUSED 0
#endif
#include "loops.inl"

const ffw::cpu::InstructionSet ffw::cpu::baseline = ffw::cpu::baseline_loops::set;
