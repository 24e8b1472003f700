// A dense SwiGLU layer of few rows.
#include "calls.h"
#include <vector>

extern "C" void divisi_mlp(const float* x, const void* gate_up, const void* down, int w_is_bf16, float* y, long t, long d, long f,
                           int threads) {
  static thread_local std::vector<float> scratch;  // of the calling thread; it grows to its largest step of few rows
  if ((long)scratch.size() < 3 * t * f) scratch.resize(3 * t * f);
  float *both = scratch.data(), *inner = both + 2 * t * f;
  divisi_linear(x, gate_up, w_is_bf16, both, t, 2 * f, d, threads);
  divisi_silu_mul(both, inner, t, f, threads);
  divisi_linear(inner, down, w_is_bf16, y, t, d, f, threads);
}
