// The loops of the FFT convolution for what the compiler may assume of every machine: SSE2 on x86-64, NEON on
// aarch64.
#include "fft_conv.h"

#define FFW_ISA baseline_fft
#define FFW_TARGET
#define FFW_VECTOR_BYTES 16
#define FFW_TILE_ROWS 4
#include "fft_conv.inl"

const ffw::cpu::FftLoops ffw::cpu::fft_baseline = ffw::cpu::baseline_fft::table;
