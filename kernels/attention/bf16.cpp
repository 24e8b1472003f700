// Gated grouped-query attention over bf16 pages by the processor's dot products, for decoded and scanned rows alike. A projected
// row is [q | gate | k | v].
//
// Keys are taken 64 at a time, from positions that are multiples of it, and laid out like a panel of weights, once for all
// queries in some rows. Queries and weights of values are rounded to bf16, sums and the running softmax
// (Milakov & Gimelshein 2018) are fp32. Every 512 positions a softmax begins anew, and these are put together in their order,
// by whichever threads they were computed: what a row gets depends on its own query and position alone.
#include "bf16.h"
#include "transpose.h"
#include <algorithm>
#include <vector>

constexpr long KEYS = PANEL, SPAN = 512, QUERIES = 512;
constexpr size_t MOST_PARTS = 1 << 20;  // floats of spans that are computed apart

struct Pool {  // the keys and values of one run's pages; a row holds all heads
  const bf16 *keys, *values;
  const int32_t* pages;
  long page_size, stride;
  // Where the rows of positions `from` to `to` lie, one after the other; without a division for each.
  template <class Each>
  void rows(long from, long to, Each each) const {
    long page = from / page_size, offset = from % page_size;
    for (long position = from; position < to; position++) {
      each(position, ((long)pages[page] * page_size + offset) * stride);
      if (++offset == page_size) { offset = 0; page++; }
    }
  }
};

// 64 keys and values of all heads, packed for each as two matrices: keys [64, d] and, turned, values [d, 64]. All heads at once,
// so that memory is read row by row. Rows not from `from` to `to` are zero.
struct KeyTile {
  long d, heads, key_size, value_size;
  std::vector<vf> keys, values;
  KeyTile(long d, long heads)
      : d(d), heads(heads), key_size(pairs_of(d) * BLOCKS), value_size(ceil_div(d, LANES) * KEYS / 2), keys(heads * key_size),
        values(heads * value_size) {}
  const bf16* key_panel(long head) const { return (const bf16*)&keys[head * key_size]; }
  Packed turned(long head) const { return {(const bf16*)&values[head * value_size], ceil_div(d, LANES), KEYS / 2}; }

  void load(const Pool& pool, long at, long from, long to) {
    const bf16 *key[2 * KEYS]{}, *value[2 * KEYS]{};  // of this tile and of the next
    pool.rows(std::max(at, from), std::min(at + 2 * KEYS, to), [&](long position, long row) {
      key[position - at] = pool.keys + row;
      value[position - at] = pool.values + row;
    });
    for (long b = 0; b < BLOCKS; b++) load_keys(b, key + b * LANES);
    for (long p = 0; p < KEYS / 2; p++) {
      load_values(p, value[2 * p], value[2 * p + 1]);
      for (long i = KEYS + 2 * p; i < KEYS + 2 * p + 2; i++)
        for (long c = 0; key[i] && c < pool.stride; c += 2 * LANES) {
          _mm_prefetch((const char*)(key[i] + c), _MM_HINT_T1);
          _mm_prefetch((const char*)(value[i] + c), _MM_HINT_T1);
        }
    }
  }

  void load_keys(long block, const bf16* const* key) {
    for (long h = 0; h < heads; h++)
      for (long c = 0; c < d; c += 2 * LANES) {
        __m512i rows[LANES];
        __mmask32 wanted = d - c >= 32 ? 0xffffffff : (1u << (d - c)) - 1;
        for (int l = 0; l < LANES; l++)
          rows[l] = key[l] ? _mm512_maskz_loadu_epi16(wanted, key[l] + h * d + c) : _mm512_setzero_si512();
        transpose16(rows);
        long first = c / 2, count = std::min(LANES, pairs_of(d) - first);
        for (long p = 0; p < count; p++) keys[h * key_size + (first + p) * BLOCKS + block] = (vf)rows[p];
      }
  }

  void load_values(long pair, const bf16* even, const bf16* odd) {
    Packed packed = turned(0);
    for (long h = 0; h < heads; h++)
      for (long b = 0; b < packed.blocks; b++) {
        long panel = b / BLOCKS, c = b * LANES;
        auto half = [&](const bf16* in) {
          return in ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(d - c), in + h * d + c)) : _mm512_setzero_si512();
        };
        long at = panel * BLOCKS * KEYS / 2 + pair * packed.blocks_of(panel) + b % BLOCKS;
        values[h * value_size + at] = (vf)_mm512_or_si512(half(even), _mm512_slli_epi32(half(odd), 16));
      }
  }
};

// 2 to the power of x, to 1e-4 of it, a twentieth of what rounding to bf16 may cost, and exact of 0; 0 for -inf, where it may come.
template <bool MASKED>
static inline __m512 powers(__m512 x) {
  if (MASKED) x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
  __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n), p = _mm512_set1_ps(5.500893e-2f);
  for (float c : {2.4221096e-1f, 6.9328293e-1f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// A softmax on its way, of several queries: the largest score (in powers of 2), the sum of weights, the weighted values.
struct Partial {
  long width;
  std::vector<float> top, total, sums;
  Partial(long queries, long width) : width(width), top(queries), total(queries), sums(queries * width) {}
  void clear(long queries) {
    std::fill_n(top.begin(), queries, -INFINITY);
    std::fill_n(total.begin(), queries, 0.0f);
    std::fill_n(sums.begin(), queries * width, 0.0f);
  }
  void add(const Partial& part, long queries) {
    for (long m = 0; m < queries; m++) {
      if (part.top[m] == -INFINITY) continue;
      float best = std::max(top[m], part.top[m]), other = exp2f(part.top[m] - best), keep = exp2f(top[m] - best);
      top[m] = best;
      total[m] = total[m] * keep + part.total[m] * other;
      for (long c = m * width; c < (m + 1) * width; c++) sums[c] = sums[c] * keep + part.sums[c] * other;
    }
  }
};

struct Rows {  // some rows of one run, of which the first sees `visible` positions and each later one more
  const float* q;
  long count, visible;
};

struct ScoreTile {
  const bf16* q;
  const bf16* keys;
  float* scores;
  long pairs;
  template <int M, int NB>
  void run(long row) const {
    const bf16* rows[M];
    for (int m = 0; m < M; m++) rows[m] = q + (row + m) * 2 * pairs;
    vf acc[M][NB]{};
    multiply<M, NB>(rows, keys, pairs, acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) store(scores + (row + m) * KEYS + b * LANES, acc[m][b]);
  }
};

struct ValueTile {
  const bf16* weights;
  const bf16* values;
  const float* keep;
  float* sums;
  long width;
  template <int M, int NB>
  void run(long row) const {
    const bf16* rows[M];
    for (int m = 0; m < M; m++) rows[m] = weights + (row + m) * KEYS;
    vf acc[M][NB];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) acc[m][b] = load(sums + (row + m) * width + b * LANES) * keep[row + m];
    multiply<M, NB>(rows, values, KEYS / 2, acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) store(sums + (row + m) * width + b * LANES, acc[m][b]);
  }
};

// What one thread works with. Queries are in the order of KV heads, then rows, then those of a row that share the head.
struct Attend {
  long group, heads, d, width;
  vf scale;
  KeyTile tile;
  std::vector<bf16> q, weights;
  std::vector<float> scores, keep;
  std::vector<vf> totals;  // of each query's weights, lane by lane
  Attend(long group, long heads, long d, long rows)
      : group(group), heads(heads), d(d), width(padded(d)), scale(all(1.44269504f / sqrtf((float)d))), tile(d, heads),
        q(rows * group * heads * 2 * pairs_of(d)), weights(rows * group * KEYS), scores(rows * group * KEYS), keep(rows * group), totals(rows * group * heads) {}

  // The softmax over positions `from` to `to` (`first` is the first that has a key), into `out`.
  void span(const Rows& own, const Pool& pool, long first, long from, long to, Partial& out) {
    long queries = own.count * group, pairs = pairs_of(d);
    for (long m = 0; m < queries * heads; m++) {
      long head = m / queries * group + m % group, row = m % queries / group;
      round_query(own.q + (row * heads * group + head) * d, &q[m * 2 * pairs]);
    }
    out.clear(queries * heads);
    std::fill_n(totals.begin(), queries * heads, vf{});
    to = std::min(to, own.visible + own.count - 1);
    for (long at = from; at < to; at += KEYS) {
      tile.load(pool, at, first, to);
      long row = std::max(0L, at + 1 - own.visible) * group, count = queries - row;  // earlier rows see nothing here
      for (long h = 0; h < heads; h++) {
        long base = h * queries + row;
        tiles(count, BLOCKS, ScoreTile{&q[base * 2 * pairs], tile.key_panel(h), scores.data(), pairs});
        for (long m = 0; m < count; m++) {
          long begin = first - at, end = own.visible + (row + m) / group - at;
          if (begin <= 0 && end >= KEYS) soften<false>(m, ~0ull, base + m, out);
          else soften<true>(m, between(begin, end), base + m, out);
        }
        Packed values = tile.turned(h);
        for (long p = 0; p < values.panels(); p++) {
          float* sums = &out.sums[base * width + p * PANEL];
          tiles(count, values.blocks_of(p), ValueTile{weights.data(), values.panel(p), keep.data(), sums, width});
        }
      }
    }
    for (long m = 0; m < queries * heads; m++) out.total[m] = sum(totals[m]);
  }

  // In powers of 2, so that scores need no factor.
  void round_query(const float* in, bf16* to) const {
    for (long c = 0; c < d; c += LANES) {
      vf scaled = (vf)_mm512_maskz_loadu_ps(lanes(d - c), in + c) * scale;
      _mm256_mask_storeu_epi16(to + c, lanes(2 * pairs_of(d) - c), narrow(scaled));
    }
  }

  static uint64_t between(long begin, long end) {
    uint64_t seen = end >= KEYS ? ~0ull : (1ull << end) - 1;
    return begin > 0 ? seen & ~0ull << begin : seen;
  }

  // Scores of one query (row m of `scores`) become weights, of those keys that are `seen`; `keep` is for the sums before them.
  template <bool MASKED>
  void soften(long m, uint64_t seen, long query, Partial& out) {
    __m512 s[BLOCKS], most = _mm512_set1_ps(-INFINITY);
    for (int b = 0; b < BLOCKS; b++) {
      s[b] = (__m512)load(&scores[m * KEYS + b * LANES]);
      if (MASKED) s[b] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> b * LANES), s[b]);
      most = _mm512_max_ps(most, s[b]);
    }
    float before = out.top[query], best = std::max(before, _mm512_reduce_max_ps(most));
    keep[m] = before == best ? 1.0f : exp2f(before - best);
    out.top[query] = best;
    vf sum = totals[query] * keep[m];
    for (int b = 0; b < BLOCKS; b++) {
      vf weight = (vf)powers<MASKED>(_mm512_sub_ps(s[b], _mm512_set1_ps(best)));
      sum += weight;
      _mm256_storeu_si256((__m256i*)&weights[m * KEYS + b * LANES], narrow(weight));
    }
    totals[query] = sum;
  }
};

struct Work { long run, row, count, from, to, part; };  // part: where its partial softmax goes; -1: it is the whole

extern "C" void divisi_tiled_attention(const float* q, const float* rows, const void* keys, const void* values, long page_size,
                                       const int32_t* starts, const int32_t* lengths, const int32_t* pages, long max_pages,
                                       long first, float* out, long runs, long qh, long kvh, long d, int threads) {
  long most = 1, width = padded(d);
  for (long s = 0; s < runs; s++) most = std::max(most, (long)starts[s + 1] - starts[s]);
  most = std::min(most, std::max(1L, QUERIES / qh));
  std::vector<Work> whole, work;
  size_t parts = 0;
  long products = 0;
  for (long s = 0; s < runs; s++)
    for (long t = starts[s]; t < starts[s + 1]; t += most) {
      long count = std::min(most, (long)starts[s + 1] - t), last = lengths[s] + t - starts[s] + count;
      whole.push_back({s, t, count, 0, last, -1});
      parts += ceil_div(last, SPAN) * count * qh * (width + 2);
      products += 2 * last * count * qh * d;
    }
  std::vector<Partial> partial;
  if (parts > MOST_PARTS) work = whole;  // there is enough to do without cutting
  else
    for (Work& all : whole) {
      bool cut = all.to > SPAN;
      if (cut) all.part = (long)partial.size();
      for (long from = 0; from < all.to; from += SPAN) {
        work.push_back({all.run, all.row, all.count, from, std::min(from + SPAN, all.to), cut ? (long)partial.size() : -1});
        if (cut) partial.emplace_back(all.count * qh, width);
      }
    }
  auto finish = [&](const Work& w, const Partial& sum) {
    long group = qh / kvh, queries = w.count * group;
    for (long m = 0; m < w.count * qh; m++) {
      long row = w.row + m % queries / group, head = m / queries * group + m % group;
      const float *gate = rows + (row * (2 * qh + 2 * kvh) + qh + head) * d, *sums = &sum.sums[m * width];
      float* o = out + (row * qh + head) * d;
      float total = sum.total[m];
      for (long c = 0; c < d; c++) o[c] = sums[c] / total * sigmoid(gate[c]);
    }
  };
#pragma omp parallel num_threads(threads) if (products > ALONE)
  {
    Attend attend(qh / kvh, kvh, d, most);
    Partial sum(most * qh, width), part(most * qh, width);
#pragma omp for schedule(dynamic)
    for (long i = (long)work.size() - 1; i >= 0; i--) {  // the last rows of a prompt have the most to see
      const Work& w = work[i];
      Rows own{q + w.row * qh * d, w.count, lengths[w.run] + w.row - starts[w.run] + 1};
      Pool pool{(const bf16*)keys, (const bf16*)values, pages + w.run * max_pages, page_size, kvh * d};
      if (w.part >= 0) { attend.span(own, pool, first, w.from, w.to, partial[w.part]); continue; }
      attend.span(own, pool, first, w.from, std::min(w.from + SPAN, w.to), sum);
      for (long from = w.from + SPAN; from < w.to; from += SPAN) {
        attend.span(own, pool, first, from, std::min(from + SPAN, w.to), part);
        sum.add(part, w.count * qh);
      }
      finish(w, sum);
    }
#pragma omp for schedule(dynamic)
    for (long i = 0; i < (long)whole.size(); i++) {
      const Work& w = whole[i];
      if (w.part < 0) continue;
      sum.clear(w.count * qh);
      for (long p = 0; p < ceil_div(w.to, SPAN); p++) sum.add(partial[w.part + p], w.count * qh);
      finish(w, sum);
    }
  }
}
