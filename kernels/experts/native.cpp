// Routed SwiGLU experts: gather each expert's tokens, two matrix products, sum per token in a fixed tree.
#include "team.h"
#include "tree.h"
#include <vector>

struct Job { long expert, first, count; };  // pairs[first : first + count] go to expert

// A token's sum of gate * part over its choices, in the tree over their experts' leaves; those of one leaf in their order.
static void sum_choices(const float* parts, const int32_t* ids, const float* gates, const int32_t* leaves, const long* at,
                        std::vector<long>& chosen, float* y, long k, long d) {
  constexpr long BLOCK = 128;
  float rows[TreeOrder::MOST * BLOCK];
  chosen.clear();
  for (long c = 0; c < k; c++) {
    if (at[c] < 0) continue;
    long place = (long)chosen.size();
    chosen.push_back(c);
    for (; place && leaves[ids[chosen[place - 1]]] > leaves[ids[c]]; place--) chosen[place] = chosen[place - 1];
    chosen[place] = c;
  }
  for (long j = 0; j < d; j += BLOCK) {
    long width = d - j < BLOCK ? d - j : BLOCK;
    TreeOrder order;
    for (long c : chosen) {
      TreeOrder::Step step = order.next(leaves[ids[c]]);
      merge_sums(rows, width, step.at, step.merges);
      float* o = rows + step.at * width;
      if (step.first) memset(o, 0, width * sizeof(float));
      const float* part = parts + at[c] * d + j;
      float g = gates[c];
      for (long i = 0; i < width; i++) o[i] = __builtin_fmaf(g, part[i], o[i]);
    }
    close_sums(rows, width, order.depth, y + j, width);
  }
}

template <class W>
static void experts(const float* x, const int32_t* ids, const float* gates, const int32_t* leaves, const W* gate_up,
                    const W* down, float* inner, float* parts, float* y, long t, long k, long d, long f, long num_experts,
                    int threads) {
  constexpr long UP = 64, DOWN = 128;  // rows of weights per work item
  std::vector<long> begin(num_experts + 1, 0);
  for (long p = 0; p < t * k; p++) if (ids[p] >= 0) begin[ids[p] + 1]++;
  std::vector<Job> jobs;
  for (long e = 0; e < num_experts; e++) {
    if (begin[e + 1]) jobs.push_back({e, begin[e], begin[e + 1]});
    begin[e + 1] += begin[e];
  }
  std::vector<long> pairs(begin[num_experts]), next(begin.begin(), begin.end() - 1);
  for (long p = 0; p < t * k; p++) if (ids[p] >= 0) pairs[next[ids[p]]++] = p;

  // gate and up rows of the same block side by side, so that their product is taken while it is in cache
  long up_blocks = (f + UP - 1) / UP, down_blocks = (d + DOWN - 1) / DOWN, n = (long)jobs.size();
#pragma omp parallel num_threads(threads) if (3 * (long)pairs.size() * d * f > ALONE)
  {
    std::vector<const float*> rows;
    std::vector<float> tile;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < n * up_blocks; item++) {
      const Job& job = jobs[item / up_blocks];
      long j = item % up_blocks * UP, width = f - j < UP ? f - j : UP;
      rows.resize(job.count);
      tile.resize(2 * job.count * UP);
      for (long i = 0; i < job.count; i++) rows[i] = x + pairs[job.first + i] / k * d;
      const W* w = gate_up + (job.expert * 2 * f + j) * d;
      float* up = tile.data() + job.count * UP;
      dot_block<W>(rows.data(), job.count, w, d, width, d, tile.data(), UP);
      dot_block<W>(rows.data(), job.count, w + f * d, d, width, d, up, UP);
      for (long i = 0; i < job.count; i++) {
        float* o = inner + (job.first + i) * f + j;
        for (long c = 0; c < width; c++) o[c] = silu(tile[i * UP + c]) * up[i * UP + c];
      }
    }
#pragma omp for schedule(dynamic)
    for (long item = 0; item < n * down_blocks; item++) {
      const Job& job = jobs[item / down_blocks];
      long j = item % down_blocks * DOWN, width = d - j < DOWN ? d - j : DOWN;
      rows.resize(job.count);
      for (long i = 0; i < job.count; i++) rows[i] = inner + (job.first + i) * f;
      dot_block<W>(rows.data(), job.count, down + (job.expert * d + j) * f, f, width, f, parts + job.first * d + j, d);
    }
#pragma omp single
    {  // where each pair's result lies
      next.assign(t * k, -1);
      for (long i = 0; i < (long)pairs.size(); i++) next[pairs[i]] = i;
    }
    std::vector<long> chosen;
#pragma omp for schedule(static)
    for (long i = 0; i < t; i++)
      sum_choices(parts, ids + i * k, gates + i * k, leaves, next.data() + i * k, chosen, y + i * d, k, d);
  }
}

// leaves: of each expert; inner: scratch [t * k, f]; parts: scratch [t * k, d]
extern "C" void divisi_experts(const float* x, const int32_t* ids, const float* gates, const int32_t* leaves,
                               const void* gate_up, const void* down, int w_is_bf16, float* inner, float* parts, float* y,
                               long t, long k, long d, long f, long num_experts, int threads) {
  auto run = [&](auto* w, auto* v) {
    experts(x, ids, gates, leaves, w, v, inner, parts, y, t, k, d, f, num_experts, threads);
  };
  if (w_is_bf16) run((const bf16*)gate_up, (const bf16*)down);
  else run((const float*)gate_up, (const float*)down);
}

// y = routed + sigmoid(logit) * shared; the logits of two rows lie `stride` apart
extern "C" void divisi_add_shared(const float* routed, const float* shared, const float* logits, long stride, float* y, long t,
                                  long d, int threads) {
  share_rows(threads_for(4 * t * d, threads), t, [&](long i) {
    float gate = sigmoid(logits[i * stride]);
    for (long j = 0; j < d; j++) y[i * d + j] = __builtin_fmaf(gate, shared[i * d + j], routed[i * d + j]);
  });
}
