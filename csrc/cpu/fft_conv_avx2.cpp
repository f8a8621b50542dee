// The loops of the FFT convolution for AVX2 with FMA.
#include "fft_conv.h"

#if FFW_HAS_X86_LOOPS
#define FFW_ISA avx2_fft
#define FFW_TARGET __attribute__((target("avx2,fma")))
#define FFW_VECTOR_BYTES 32
#define FFW_TILE_ROWS 4  // 4 x 3 sums, 3 vectors and a factor are 16 registers
#include "fft_conv.inl"

const ffw::cpu::FftLoops ffw::cpu::fft_avx2 = ffw::cpu::avx2_fft::table;
#endif
