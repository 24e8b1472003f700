// SwiGLU.
#include "simd.h"

extern "C" void divisi_silu_mul(const float* gate_up, float* out, long t, long inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (t * inner > 16384)
  for (long i = 0; i < t; i++) {
    const float *g = gate_up + 2 * i * inner, *u = g + inner;
    for (long j = 0; j < inner; j++) out[i * inner + j] = silu(g[j]) * u[j];
  }
}
