// Norms, SwiGLU and routing: small, so each is one pass over its rows.
#include "simd.h"

// residual += update (unless null), out = residual / rms(residual) * scale
extern "C" void divisi_add_rms_norm(float* residual, const float* update, const float* scale, float* out, long t, long d,
                                    float eps) {
  for (long i = 0; i < t; i++) {
    float* r = residual + i * d;
    float* o = out + i * d;
    if (update) for (long j = 0; j < d; j++) r[j] += update[i * d + j];
    vf acc{};
    long j = 0;
    for (; j + VL <= d; j += VL) { vf v = load(r + j); acc += v * v; }
    float s = sum(acc);
    for (; j < d; j++) s += r[j] * r[j];
    float f = 1.0f / sqrtf(s / d + eps);
    for (long c = 0; c < d; c++) o[c] = r[c] * f * scale[c];
  }
}

extern "C" void divisi_silu_mul(const float* gate_up, float* out, long t, long inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (t * inner > 16384)
  for (long i = 0; i < t; i++) {
    const float *g = gate_up + 2 * i * inner, *u = g + inner;
    for (long j = 0; j < inner; j++) out[i * inner + j] = silu(g[j]) * u[j];
  }
}

// Softmax over e logits, then the k largest, best first; the lowest id wins a tie.
extern "C" void divisi_route(const float* logits, long stride, int32_t* ids, float* gates, long t, long e, long k, int normalise,
                             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (t > 16)
  for (long i = 0; i < t; i++) {
    const float* l = logits + i * stride;
    float best = l[0], total = 0, kept = 0;
    for (long j = 1; j < e; j++) best = l[j] > best ? l[j] : best;
    for (long j = 0; j < e; j++) total += fast_exp(l[j] - best);
    int32_t* id = ids + i * k;
    float* g = gates + i * k;
    long held = 0;
    for (long j = 0; j < e; j++) {  // insertion into a sorted list of k logits, held in g
      if (held == k && !(l[j] > g[k - 1])) continue;
      long p = held < k ? held++ : k - 1;
      for (; p > 0 && l[j] > g[p - 1]; p--) { g[p] = g[p - 1]; id[p] = id[p - 1]; }
      g[p] = l[j]; id[p] = (int32_t)j;
    }
    for (long j = 0; j < k; j++) { g[j] = fast_exp(g[j] - best) / total; kept += g[j]; }
    if (normalise) for (long j = 0; j < k; j++) g[j] /= kept;
  }
}
