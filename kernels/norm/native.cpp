// Root-mean-square norms: one pass over a row.
#include "team.h"

// residual += update (unless null), out = residual / rms(residual) * scale
extern "C" void divisi_add_rms_norm(float* residual, const float* update, const float* scale, float* out, long t, long d,
                                    float eps, int threads) {
  share_rows(threads_for(4 * t * d, threads), t, [&](long i) {
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
  });
}
