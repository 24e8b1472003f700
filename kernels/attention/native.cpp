// Gated grouped-query attention over a paged KV pool. A projected row is [q | gate | k | v].
#include "simd.h"
#include <vector>

static void norm_rotate(const float* in, const float* scale, const float* cos_sin, long d, long half, float eps, float* out) {
  float s = 0;
  for (long i = 0; i < d; i++) s += in[i] * in[i];
  float f = 1.0f / sqrtf(s / d + eps);
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
#pragma omp parallel num_threads(threads) if (t > 2)
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

// One KV head's group of queries against `visible` tokens, page by page, with a running softmax (Milakov & Gimelshein 2018).
template <class KV>
static void attend(const float* q, const KV* keys, const KV* values, const int32_t* pages, long page_size, long visible, long group,
                   long kvh, long d, float scale, float* scores, float* acc) {
  std::vector<float> top(group, -INFINITY), total(group, 0.0f);
  std::vector<const float*> rows(group);
  for (long g = 0; g < group; g++) rows[g] = q + g * d;
  memset(acc, 0, group * d * sizeof(float));
  for (long at = 0; at < visible; at += page_size) {
    long n = visible - at < page_size ? visible - at : page_size, base = (long)pages[at / page_size] * page_size * kvh * d;
    dot_block<KV>(rows.data(), group, keys + base, kvh * d, n, d, scores, page_size);
    for (long g = 0; g < group; g++) {
      float *s = scores + g * page_size, *o = acc + g * d, best = top[g];
      for (long i = 0; i < n; i++) { s[i] *= scale; best = s[i] > best ? s[i] : best; }
      float keep = top[g] == -INFINITY ? 0.0f : fast_exp(top[g] - best);
      top[g] = best;
      total[g] *= keep;
      for (long i = 0; i < n; i++) { s[i] = fast_exp(s[i] - best); total[g] += s[i]; }
      for (long c = 0; c < d; c++) o[c] *= keep;
    }
    for (long i = 0; i < n; i++) {
      const KV* v = values + base + i * kvh * d;
      for (long g = 0; g < group; g++) {
        float p = scores[g * page_size + i], *o = acc + g * d;
        long c = 0;
        for (; c + VL <= d; c += VL) store(o + c, load(o + c) + p * load(v + c));
        for (; c < d; c++) o[c] += p * scalar(v + c);
      }
    }
  }
  for (long g = 0; g < group; g++)
    for (long c = 0; c < d; c++) acc[g * d + c] /= total[g];
}

template <class KV>
static void decode(const float* q, const float* rows, const KV* keys, const KV* values, long page_size, const int32_t* starts,
                   const int32_t* lengths, const int32_t* pages, long max_pages, float* out, long sequences, long qh, long kvh,
                   long d, int threads) {
  long group = qh / kvh, width = (2 * qh + 2 * kvh) * d;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(group * page_size), acc(group * d);
#pragma omp for schedule(dynamic) collapse(2)
    for (long s = 0; s < sequences; s++)
      for (long h = 0; h < kvh; h++)
        for (long t = starts[s]; t < starts[s + 1]; t++) {
          long visible = lengths[s] + t - starts[s] + 1, first = h * group * d;
          attend(q + t * qh * d + first, keys + h * d, values + h * d, pages + s * max_pages, page_size, visible, group, kvh, d,
                 1.0f / sqrtf((float)d), scores.data(), acc.data());
          const float* gate = rows + t * width + qh * d + first;
          for (long c = 0; c < group * d; c++) out[t * qh * d + first + c] = acc[c] * sigmoid(gate[c]);
        }
  }
}

extern "C" void divisi_attention_decode(const float* q, const float* rows, const void* keys, const void* values, int kv_is_bf16,
                                        long page_size, const int32_t* starts, const int32_t* lengths, const int32_t* pages,
                                        long max_pages, float* out, long sequences, long qh, long kvh, long d, int threads) {
  if (kv_is_bf16)
    decode(q, rows, (const bf16*)keys, (const bf16*)values, page_size, starts, lengths, pages, max_pages, out, sequences, qh, kvh, d,
           threads);
  else
    decode(q, rows, (const float*)keys, (const float*)values, page_size, starts, lengths, pages, max_pages, out, sequences, qh, kvh, d,
           threads);
}
