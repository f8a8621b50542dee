// The loops for AVX2 with FMA: every x86-64 server and desktop since 2013.
#include "loops.h"

#if FFW_HAS_X86_LOOPS
#define FFW_ISA avx2_loops
#define FFW_ISA_NAME "avx2"
#define FFW_TARGET __attribute__((target("avx2,fma")))
#define FFW_VECTOR_BYTES 32
#define FFW_FUSED 1
#include "loops.inl"

const ffw::cpu::InstructionSet ffw::cpu::avx2 = ffw::cpu::avx2_loops::set;
#endif
