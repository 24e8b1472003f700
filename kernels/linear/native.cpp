// y[t, n] = x[t, :] . w[n, :]
#include "simd.h"
#include <vector>

template <class W>
static void linear(const float* x, const W* w, float* y, long t, long n, long k, int threads) {
  constexpr long BLOCK = 32;  // rows of w per work item
  std::vector<const float*> rows(t);
  for (long i = 0; i < t; i++) rows[i] = x + i * k;
#pragma omp parallel for num_threads(threads) schedule(static) if (t * n * k > ALONE)
  for (long b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
    long j = b * BLOCK, width = n - j < BLOCK ? n - j : BLOCK;
    dot_block<W>(rows.data(), t, w + j * k, k, width, k, y + j, n);
  }
}

extern "C" void divisi_linear(const float* x, const void* w, int w_is_bf16, float* y, long t, long n, long k, int threads) {
  if (w_is_bf16) linear<bf16>(x, (const bf16*)w, y, t, n, k, threads);
  else linear<float>(x, (const float*)w, y, t, n, k, threads);
}
