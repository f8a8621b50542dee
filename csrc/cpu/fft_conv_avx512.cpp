// The loops of the FFT convolution for AVX-512.
#include "fft_conv.h"

#if FFW_HAS_X86_LOOPS
#define FFW_ISA avx512_fft
#if defined(__clang__)
#define FFW_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else  // GCC would keep to 32-byte vectors
#define FFW_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#define FFW_VECTOR_BYTES 64
#define FFW_TILE_ROWS 8  // 8 x 3 sums and 3 vectors of 32 registers
#include "fft_conv.inl"

const ffw::cpu::FftLoops ffw::cpu::fft_avx512 = ffw::cpu::avx512_fft::table;
#endif
