// The loops for AVX-512 (F, BW, DQ, VL): Intel servers since 2017, AMD since Zen 4.
#include "loops.h"

#if FFW_HAS_X86_LOOPS
#define FFW_ISA avx512_loops
#define FFW_ISA_NAME "avx512"
#if defined(__clang__)
#define FFW_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else  // GCC would keep to 32-byte vectors
#define FFW_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#define FFW_VECTOR_BYTES 64
#define FFW_FUSED 1
#include "loops.inl"

const ffw::cpu::InstructionSet ffw::cpu::avx512 = ffw::cpu::avx512_loops::set;
#endif
