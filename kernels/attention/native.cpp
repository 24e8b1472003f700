// Gated grouped-query attention over a paged KV pool. A projected row is [q | gate | k | v].
#include "team.h"
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
  share(threads_for(4 * t * width, threads), t, [&](long i) {
    static thread_local std::vector<float> k;
    k.resize(d);
    const float *row = rows + i * width, *cs = cos_sin + i * 2 * half;
    for (long h = 0; h < qh; h++) norm_rotate(row + h * d, q_scale, cs, d, half, eps, q + (i * qh + h) * d);
    for (long h = 0; h < kvh; h++) {
      long at = (kv_rows[i] * kvh + h) * d;
      norm_rotate(row + (2 * qh + h) * d, k_scale, cs, d, half, eps, k.data());
      const float* v = row + (2 * qh + kvh + h) * d;
      for (long c = 0; c < d; c++) { put(keys + at + c, k[c]); put(values + at + c, v[c]); }
    }
  });
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
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) v[j] = load(values + i * stride + c + j * VL);
#pragma GCC unroll 8
      for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) o[g][j] = fma(all(p[g * ldp + i]), v[j], o[g][j]);
    }
    for (int g = 0; g < G; g++)
      for (int j = 0; j < C; j++) store(acc + g * d + c + j * VL, o[g][j]);
  }
  return c;
}

template <int G, class KV>
static void add_some(const KV* values, long stride, const float* p, long ldp, long n, long d, float* acc) {
  long c = add_columns<G, (G == 1 ? 8 : G == 2 ? 4 : 2), KV>(values, stride, p, ldp, n, d, acc, 0);
  if (G <= 2) c = add_columns<G, (G == 1 ? 4 : 2), KV>(values, stride, p, ldp, n, d, acc, c);
  c = add_columns<G, 1>(values, stride, p, ldp, n, d, acc, c);
  for (; c < d; c++)
    for (int g = 0; g < G; g++)
      for (long i = 0; i < n; i++) acc[g * d + c] += p[g * ldp + i] * scalar(values + i * stride + c);
}

// The same for m queries. Each sums over tokens in their order, whatever the number that share them.
template <class KV>
static void add_values(const KV* values, long stride, const float* p, long ldp, long n, long d, float* acc, long m) {
  long g = 0;
  for (; g + 6 <= m; g += 6) add_some<6>(values, stride, p + g * ldp, ldp, n, d, acc + g * d);
  for (; g + 4 <= m; g += 4) add_some<4>(values, stride, p + g * ldp, ldp, n, d, acc + g * d);
  for (; g + 2 <= m; g += 2) add_some<2>(values, stride, p + g * ldp, ldp, n, d, acc + g * d);
  for (; g < m; g++) add_some<1>(values, stride, p + g * ldp, ldp, n, d, acc + g * d);
}

struct Block { long run, row, count; };  // rows of one run that are worked on together
constexpr long TILE = 64;  // positions that a softmax takes up at once, from multiples of it: a multiple of VL

// The queries of one KV head in `count` rows, of which the first sees `visible` tokens and each later one a token more. Tile by
// tile, with a running softmax (Milakov & Gimelshein 2018), from position `first` on. Rows share the reading of keys and values, but
// what each gets depends on its own query and position alone: sums over tokens run in an order that positions give.
template <class KV>
struct Attend {
  long page_size, group, kvh, d, first;
  float scale;
  std::vector<const float*> queries;
  std::vector<float> top, scores, acc;
  std::vector<vf> total;  // lane by lane

  Attend(long page_size, long group, long kvh, long d, long first, long most)
      : page_size(page_size), group(group), kvh(kvh), d(d), first(first), scale(1.0f / sqrtf((float)d)), queries(most * group),
        top(most * group), scores(most * group * TILE), acc(most * group * d), total(most * group) {}

  void operator()(const float* q, long count, long visible, const KV* keys, const KV* values, const int32_t* pages) {
    long m = count * group, last = visible + count - 1, stride = kvh * d;
    for (long g = 0; g < m; g++) queries[g] = q + (g / group * kvh * group + g % group) * d;
    for (long g = 0; g < m; g++) { top[g] = -INFINITY; total[g] = vf{}; }
    memset(acc.data(), 0, m * d * sizeof(float));
    for (long at = first / TILE * TILE; at < last; at += TILE) {
      long from = first > at ? first : at, to = last - at < TILE ? last : at + TILE;
      parts(from, to, pages, [&](long position, long n, long row) {
        dot_block<KV>(queries.data(), m, keys + row * stride, stride, n, d, &scores[position - at], TILE);
      });
      for (long r = 0; r < count; r++) {
        long end = seen(visible + r, to);
        for (long g = r * group; end > from && g < (r + 1) * group; g++) soften(g, &scores[g * TILE], from - at, end - at);
      }
      parts(from, to, pages, [&](long position, long n, long row) {
        const KV* own = values + row * stride;
        float* weights = &scores[position - at];
        long shared = seen(visible - position, n);
        add_values(own, stride, weights, TILE, shared, d, acc.data(), m);
        for (long r = 1; r < count; r++) {
          long more = seen(visible + r - position, n) - shared, g = r * group;
          if (more > 0) add_values(own + shared * stride, stride, weights + g * TILE + shared, TILE, more, d, &acc[g * d], group);
        }
      });
    }
    for (long g = 0; g < m; g++) {
      float whole = sum(total[g]);
      for (long c = 0; c < d; c++) acc[g * d + c] /= whole;
    }
  }

  // Calls each(position, count, row of the pool) for those that lie one after the other.
  template <class Each>
  void parts(long from, long to, const int32_t* pages, const Each& each) const {
    for (long position = from; position < to;) {
      long page = position / page_size, offset = position - page * page_size, left = page_size - offset;
      long n = to - position < left ? to - position : left;
      each(position, n, (long)pages[page] * page_size + offset);
      position += n;
    }
  }
  static long seen(long count, long most) { return count < 0 ? 0 : count < most ? count : most; }

  // Scores of one query against positions `from` to `to` of a tile become weights; what it summed before is scaled to the new maximum.
  void soften(long g, float* s, long from, long to) {
    long end = (to + VL - 1) / VL * VL;
    for (long i = 0; i < from; i++) s[i] = -INFINITY;
    for (long i = to; i < end; i++) s[i] = -INFINITY;
    vf most = all(top[g]);
    for (long i = 0; i < end; i += VL) {
      vf v = load(s + i) * scale;
      store(s + i, v);
      most = max(most, v);
    }
    float best = most_of(most), *o = &acc[g * d];
    if (best > top[g]) {
      float keep = fast_exp(top[g] - best);
      for (long c = 0; c < d; c++) o[c] *= keep;
      total[g] *= keep;
      top[g] = best;
    }
    vf weight, whole = total[g];
    for (long i = 0; i < end; i += VL) {
      store(s + i, weight = exps(load(s + i) - best));
      whole += weight;
    }
    total[g] = whole;
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
