// Gated grouped-query attention over a paged KV pool. A projected row is [q | gate | k | v].
#include "simd.h"
#include <vector>

static void norm_rotate(const float* in, const float* scale, const float* cos_sin, long d, long half, float eps, float* out) {
  float f = 1.0f / sqrtf(dot(in, in, d) / d + eps);
  for (long i = 0; i < d; i++) out[i] = in[i] * f * scale[i];
  for (long i = 0; i < half; i++) {
    float a = out[i], b = out[i + half], c = cos_sin[i], n = cos_sin[half + i];
    out[i] = a * c - b * n;
    out[i + half] = b * c + a * n;
  }
}

template <class KV>
static void inputs(const float* rows, const float* cos_sin, const float* q_scale, const float* k_scale, float eps, KV* keys,
                   KV* values, const int32_t* kv_rows, float* q, long t, long qh, long kvh, long d, long half, int threads) {
  long width = (2 * qh + 2 * kvh) * d;
#pragma omp parallel num_threads(threads) if (t * width > ALONE / 4)
  {
    std::vector<float> k(d);
#pragma omp for schedule(static)
    for (long i = 0; i < t; i++) {
      const float *row = rows + i * width, *cs = cos_sin + i * 2 * half;
      for (long h = 0; h < qh; h++) norm_rotate(row + h * d, q_scale, cs, d, half, eps, q + (i * qh + h) * d);
      for (long h = 0; h < kvh; h++) {
        long at = (kv_rows[i] * kvh + h) * d;
        norm_rotate(row + (2 * qh + h) * d, k_scale, cs, d, half, eps, k.data());
        const float* v = row + (2 * qh + kvh + h) * d;
        for (long c = 0; c < d; c++) { put(keys + at + c, k[c]); put(values + at + c, v[c]); }
      }
    }
  }
}

extern "C" void divisi_attention_inputs(const float* rows, const float* cos_sin, const float* q_scale, const float* k_scale,
                                        float eps, void* keys, void* values, int kv_is_bf16, const int32_t* kv_rows, float* q,
                                        long t, long qh, long kvh, long d, long half, int threads) {
  if (kv_is_bf16)
    inputs(rows, cos_sin, q_scale, k_scale, eps, (bf16*)keys, (bf16*)values, kv_rows, q, t, qh, kvh, d, half, threads);
  else
    inputs(rows, cos_sin, q_scale, k_scale, eps, (float*)keys, (float*)values, kv_rows, q, t, qh, kvh, d, half, threads);
}

// acc[g] += p[g] . values over n tokens, for G queries that share the reading of the values; C vectors of width stay in registers.
template <int G, int C, class KV>
static inline long add_columns(const KV* values, long stride, const float* p, long ldp, long n, long d, float* acc, long c) {
  for (; c + C * VL <= d; c += C * VL) {
    vf o[G][C];
    for (int g = 0; g < G; g++)
      for (int j = 0; j < C; j++) o[g][j] = load(acc + g * d + c + j * VL);
    for (long i = 0; i < n; i++) {
      vf v[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; j++) v[j] = load(values + i * stride + c + j * VL);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) o[g][j] = fma(vf{} + p[g * ldp + i], v[j], o[g][j]);
    }
    for (int g = 0; g < G; g++)
      for (int j = 0; j < C; j++) store(acc + g * d + c + j * VL, o[g][j]);
  }
  return c;
}

template <int G, class KV>
static void add_values(const KV* values, long stride, const float* p, long ldp, long n, long d, float* acc) {
  long c = add_columns<G, VB == 64 ? 4 : 2>(values, stride, p, ldp, n, d, acc, 0);
  c = add_columns<G, 1>(values, stride, p, ldp, n, d, acc, c);
  for (; c < d; c++)
    for (int g = 0; g < G; g++)
      for (long i = 0; i < n; i++) acc[g * d + c] += p[g * ldp + i] * scalar(values + i * stride + c);
}

struct Block { long run, row, count; };  // rows of one run that are worked on together

// The queries of one KV head in `count` rows, of which the first sees `visible` tokens and each later one a token more. Page
// by page, with a running softmax (Milakov & Gimelshein 2018), from position `first` on. Rows share the reading of a page, but what each gets depends on
// its own query and position alone: sums over tokens run in their order, page by page, whatever rows are beside it.
template <class KV>
struct Attend {
  long page_size, group, kvh, d, first;
  float scale;
  std::vector<const float*> queries;
  std::vector<float> top, total, scores, acc;

  Attend(long page_size, long group, long kvh, long d, long first, long most)
      : page_size(page_size), group(group), kvh(kvh), d(d), first(first), scale(1.0f / sqrtf((float)d)), queries(most * group),
        top(most * group), total(most * group), scores(most * group * page_size), acc(most * group * d) {}

  void operator()(const float* q, long count, long visible, const KV* keys, const KV* values, const int32_t* pages) {
    long m = count * group, last = visible + count - 1;
    for (long g = 0; g < m; g++) queries[g] = q + (g / group * kvh * group + g % group) * d;
    for (long g = 0; g < m; g++) { top[g] = -INFINITY; total[g] = 0.0f; }
    memset(acc.data(), 0, m * d * sizeof(float));
    for (long at = first / page_size * page_size; at < last; at += page_size) {
      long skip = first > at ? first - at : 0, n = last - at < page_size ? last - at : page_size, base = (long)pages[at / page_size] * page_size * kvh * d;
      dot_block<KV>(queries.data(), m, keys + base, kvh * d, n, d, scores.data(), page_size);
      for (long r = 0; r < count; r++) {
        long own = (visible + r - at < n ? visible + r - at : n) - skip;
        if (own <= 0) continue;
        long g = r * group, end = g + group;
        const KV* seen = values + base + skip * kvh * d;
        float* weights = scores.data() + skip;
        for (long i = g; i < end; i++) soften(i, weights + i * page_size, own);
        for (; g + 4 <= end; g += 4) add_values<4>(seen, kvh * d, weights + g * page_size, page_size, own, d, &acc[g * d]);
        for (; g + 2 <= end; g += 2) add_values<2>(seen, kvh * d, weights + g * page_size, page_size, own, d, &acc[g * d]);
        for (; g < end; g++) add_values<1>(seen, kvh * d, weights + g * page_size, page_size, own, d, &acc[g * d]);
      }
    }
    for (long g = 0; g < m; g++)
      for (long c = 0; c < d; c++) acc[g * d + c] /= total[g];
  }

  // Scores of one query against a page become weights; what it summed before is scaled to the new maximum.
  void soften(long g, float* s, long n) {
    float *o = &acc[g * d], best = top[g];
    for (long i = 0; i < n; i++) s[i] *= scale;
    for (long i = 0; i < n; i++) best = s[i] > best ? s[i] : best;
    float keep = top[g] == -INFINITY ? 0.0f : fast_exp(top[g] - best);
    top[g] = best;
    float sum = total[g] * keep;
    for (long i = 0; i < n; i++) { s[i] = fast_exp(s[i] - best); sum += s[i]; }
    total[g] = sum;
    for (long c = 0; c < d; c++) o[c] *= keep;
  }
};

template <class KV>
static void attend_runs(const float* q, const float* rows, const KV* keys, const KV* values, long page_size, const int32_t* starts,
                        const int32_t* lengths, const int32_t* pages, long max_pages, long first, float* out, long runs,
                        long qh, long kvh, long d, int threads) {
  constexpr long MOST = 8;
  long group = qh / kvh, width = (2 * qh + 2 * kvh) * d;
  long products = 0;
  std::vector<Block> blocks;
  for (long s = 0; s < runs; s++) {
    long end = starts[s + 1], own = end - starts[s];
    products += 2 * own * (lengths[s] + own) * qh * d;
    for (long t = starts[s]; t < end; t += MOST) blocks.push_back({s, t, end - t < MOST ? end - t : MOST});
  }
#pragma omp parallel num_threads(threads) if (products > ALONE)
  {
    Attend<KV> attend(page_size, group, kvh, d, first, MOST);
#pragma omp for schedule(dynamic) collapse(2)
    for (long b = 0; b < (long)blocks.size(); b++)
      for (long h = 0; h < kvh; h++) {
        auto [s, t, count] = blocks[b];
        long first = h * group * d;
        attend(q + t * qh * d + first, count, lengths[s] + t - starts[s] + 1, keys + h * d, values + h * d, pages + s * max_pages);
        for (long r = 0; r < count; r++) {
          const float *gate = rows + (t + r) * width + qh * d + first, *acc = &attend.acc[r * group * d];
          for (long c = 0; c < group * d; c++) out[(t + r) * qh * d + first + c] = acc[c] * sigmoid(gate[c]);
        }
      }
  }
}

extern "C" void divisi_attention(const float* q, const float* rows, const void* keys, const void* values, int kv_is_bf16,
                                 long page_size, const int32_t* starts, const int32_t* lengths, const int32_t* pages, long max_pages,
                                 long first, float* out, long runs, long qh, long kvh, long d, int threads) {
  if (kv_is_bf16)
    attend_runs(q, rows, (const bf16*)keys, (const bf16*)values, page_size, starts, lengths, pages, max_pages, first, out, runs,
                qh, kvh, d, threads);
  else
    attend_runs(q, rows, (const float*)keys, (const float*)values, page_size, starts, lengths, pages, max_pages, first, out, runs,
                qh, kvh, d, threads);
}
