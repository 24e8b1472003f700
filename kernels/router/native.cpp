// Choosing experts: one pass over a row of logits.
#include "team.h"

// The k largest so far, best first, in the caller's memory; the first of two alike.
struct Largest {
  int32_t* ids;
  float* values;
  long k, held = 0;

  bool full() const { return held == k; }
  float least() const { return values[k - 1]; }
  void offer(float value, long id) {
    if (full() && !(value > least())) return;
    long p = full() ? k - 1 : held++;
    for (; p > 0 && value > values[p - 1]; p--) { values[p] = values[p - 1]; ids[p] = ids[p - 1]; }
    values[p] = value;
    ids[p] = (int32_t)id;
  }
};

static float largest_of(const float* l, long e) {
  vf most = all(l[0]);
  long j = 0;
  for (; j + VL <= e; j += VL) most = max(load(l + j), most);
  float best = most_of(most);
  for (; j < e; j++) best = l[j] > best ? l[j] : best;
  return best;
}

static float sum_of_powers(const float* l, long e, float best) {
  vf total{};
  long j = 0;
  for (; j + VL <= e; j += VL) total += exps(load(l + j) - best);
  float whole = sum(total);
  for (; j < e; j++) whole += fast_exp(l[j] - best);
  return whole;
}

// Softmax over e logits, then the k largest, best first; the lowest id wins a tie.
extern "C" void divisi_route(const float* logits, long stride, int32_t* ids, float* gates, long t, long e, long k, int normalise,
                             int threads) {
  share_rows(t > 16 ? threads : 1, t, [&](long i) {
    const float* l = logits + i * stride;
    float *g = gates + i * k, best = largest_of(l, e), total = sum_of_powers(l, e, best), kept = 0;
    Largest chosen{ids + i * k, g, k};
    long j = 0;
    for (; j + VL <= e; j += VL)  // most lanes are not among them
      for (uint32_t left = chosen.full() ? above(load(l + j), all(chosen.least())) : (1u << VL) - 1; left; left &= left - 1)
        chosen.offer(l[j + __builtin_ctz(left)], j + __builtin_ctz(left));
    for (; j < e; j++) chosen.offer(l[j], j);
    for (j = 0; j < k; j++) { g[j] = fast_exp(g[j] - best) / total; kept += g[j]; }
    if (normalise) for (j = 0; j < k; j++) g[j] /= kept;
  });
}
