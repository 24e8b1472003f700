// Choosing experts: one pass over a row of logits.
#include "team.h"

// Softmax over e logits, then the k largest, best first; the lowest id wins a tie.
extern "C" void divisi_route(const float* logits, long stride, int32_t* ids, float* gates, long t, long e, long k, int normalise,
                             int threads) {
  share(t > 16 ? threads : 1, t, [&](long i) {
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
  });
}
