// Gated grouped-query attention over bf16 pages by the processor's dot products, for decoded and scanned rows alike. A projected
// row is [q | gate | k | v].
//
// Keys are taken 64 at a time, from positions that are multiples of it, and laid out like a panel of weights, once for all
// queries of a KV head in up to 128 / group rows. Queries and weights of values are rounded to bf16, sums and the running softmax
// (Milakov & Gimelshein 2018) are fp32. Every 1,024 positions a softmax begins anew, and these are put together in their order,
// by whichever threads they were computed: what a row gets depends on its own query and position alone.
#include "bf16.h"
#include "transpose.h"
#include <algorithm>
#include <vector>

constexpr long KEYS = PANEL, SPAN = 1024, QUERIES = 128;
constexpr size_t MOST_PARTS = 1 << 20;  // floats of spans that are computed apart

struct Pool {  // the keys and values of one KV head in one run's pages
  const bf16 *keys, *values;
  const int32_t* pages;
  long page_size, stride;
  long row(long position) const { return ((long)pages[position / page_size] * page_size + position % page_size) * stride; }
};

// 64 keys and their values, packed as two matrices: keys [64, d] and, turned, values [d, 64]. Rows not from `from` to `to` are zero.
struct KeyTile {
  long d;
  std::vector<vf> keys, values;
  explicit KeyTile(long d) : d(d), keys(pairs_of(d) * BLOCKS), values(ceil_div(d, LANES) * KEYS / 2) {}
  const bf16* key_panel() const { return (const bf16*)keys.data(); }
  Packed turned() const { return {(const bf16*)values.data(), ceil_div(d, LANES), KEYS / 2}; }

  void load(const Pool& pool, long at, long from, long to) {
    const bf16 *key[KEYS], *value[KEYS];
    for (long i = 0; i < KEYS; i++) {
      bool there = at + i >= from && at + i < to;
      long row = there ? pool.row(at + i) : 0;
      key[i] = there ? pool.keys + row : nullptr;
      value[i] = there ? pool.values + row : nullptr;
    }
    for (long b = 0; b < BLOCKS; b++)
      for (long c = 0; c < d; c += 2 * LANES) {
        __m512i rows[LANES];
        __mmask32 wanted = d - c >= 32 ? 0xffffffff : (1u << (d - c)) - 1;
        for (int l = 0; l < LANES; l++) {
          const bf16* in = key[b * LANES + l];
          rows[l] = in ? _mm512_maskz_loadu_epi16(wanted, in + c) : _mm512_setzero_si512();
        }
        transpose16(rows);
        long first = c / 2, count = std::min(LANES, pairs_of(d) - first);
        for (long p = 0; p < count; p++) keys[(first + p) * BLOCKS + b] = (vf)rows[p];
      }
    Packed packed = turned();
    for (long p = 0; p < KEYS / 2; p++)
      for (long b = 0; b < packed.blocks; b++) {
        long panel = b / BLOCKS, c = b * LANES;
        auto half = [&](const bf16* in) {
          return in ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(d - c), in + c)) : _mm512_setzero_si512();
        };
        __m512i pair = _mm512_or_si512(half(value[2 * p]), _mm512_slli_epi32(half(value[2 * p + 1]), 16));
        values[panel * BLOCKS * KEYS / 2 + p * packed.blocks_of(panel) + b % BLOCKS] = (vf)pair;
      }
  }
};

// A softmax on its way, of several queries: the largest score, the sum of weights, the weighted values.
struct Partial {
  long width;
  std::vector<float> top, total, sums;
  Partial(long queries, long width) : width(width), top(queries), total(queries), sums(queries * width) {}
  void clear() {
    std::fill(top.begin(), top.end(), -INFINITY);
    std::fill(total.begin(), total.end(), 0.0f);
    std::fill(sums.begin(), sums.end(), 0.0f);
  }
  void add(const Partial& part, long queries) {
    for (long m = 0; m < queries; m++) {
      if (part.top[m] == -INFINITY) continue;
      float best = std::max(top[m], part.top[m]), other = fast_exp(part.top[m] - best);
      float keep = top[m] == -INFINITY ? 0.0f : fast_exp(top[m] - best);
      top[m] = best;
      total[m] = total[m] * keep + part.total[m] * other;
      for (long c = m * width; c < (m + 1) * width; c++) sums[c] = sums[c] * keep + part.sums[c] * other;
    }
  }
};

struct Queries {  // those of one KV head in `count` rows, of which the first sees `visible` positions and each later one more
  const float* q;
  long stride, count, visible;
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

struct Attend {  // what one thread works with
  long group, d;
  float scale;
  KeyTile tile;
  std::vector<bf16> q, weights;
  std::vector<float> scores, keep;
  Attend(long group, long d, long most)
      : group(group), d(d), scale(1.0f / sqrtf((float)d)), tile(d), q(most * 2 * pairs_of(d)), weights(most * KEYS),
        scores(most * KEYS), keep(most) {}

  // The softmax over positions `from` to `to` (`first` is the first that has a key), into `out`.
  void span(const Queries& own, const Pool& pool, long first, long from, long to, Partial& out) {
    long queries = own.count * group, pairs = pairs_of(d);
    for (long m = 0; m < queries; m++) round_row(own.q + m / group * own.stride + m % group * d, &q[m * 2 * pairs], d);
    out.clear();
    to = std::min(to, own.visible + own.count - 1);
    for (long at = from; at < to; at += KEYS) {
      tile.load(pool, at, first, to);
      long row = std::max(0L, at + 1 - own.visible) * group, count = queries - row;  // earlier rows see nothing here
      tiles(count, BLOCKS, ScoreTile{&q[row * 2 * pairs], tile.key_panel(), &scores[row * KEYS], pairs});
      for (long m = row; m < queries; m++) soften(m, first - at, own.visible + m / group - at, out);
      Packed values = tile.turned();
      for (long p = 0; p < values.panels(); p++) {
        float* sums = &out.sums[row * out.width + p * PANEL];
        tiles(count, values.blocks_of(p), ValueTile{&weights[row * KEYS], values.panel(p), &keep[row], sums, out.width});
      }
    }
  }

  // Scores of one query become weights, of those from `from` to `to`; `keep` is what becomes of the sums before them.
  void soften(long m, long from, long to, Partial& out) {
    uint64_t seen = to >= KEYS ? ~0ull : (1ull << to) - 1;
    if (from > 0) seen &= ~0ull << from;
    vf s[BLOCKS];
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int b = 0; b < BLOCKS; b++) {
      s[b] = (vf)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> b * LANES),
                                    (__m512)(load(&scores[m * KEYS + b * LANES]) * scale));
      most = _mm512_max_ps(most, (__m512)s[b]);
    }
    float best = std::max(out.top[m], _mm512_reduce_max_ps(most));
    keep[m] = out.top[m] == -INFINITY ? 0.0f : fast_exp(out.top[m] - best);
    out.top[m] = best;
    vf sum{};
    for (int b = 0; b < BLOCKS; b++) {
      __m256i weight = narrow(exp16(s[b] - best));
      _mm256_storeu_si256((__m256i*)&weights[m * KEYS + b * LANES], weight);
      sum += widen(weight);
    }
    out.total[m] = out.total[m] * keep[m] + _mm512_reduce_add_ps((__m512)sum);
  }
};

struct Work { long run, row, count, head, from, to, part; };  // part: where its partial softmax goes; -1: it is the whole

extern "C" void divisi_tiled_attention(const float* q, const float* rows, const void* keys, const void* values, long page_size,
                                       const int32_t* starts, const int32_t* lengths, const int32_t* pages, long max_pages,
                                       long first, float* out, long runs, long qh, long kvh, long d, int threads) {
  long group = qh / kvh, most = std::max(1L, QUERIES / group), width = padded(d);
  std::vector<Work> whole, work;
  size_t parts = 0;
  for (long s = 0; s < runs; s++)
    for (long t = starts[s]; t < starts[s + 1]; t += most)
      for (long h = 0; h < kvh; h++) {
        long count = std::min(most, (long)starts[s + 1] - t), last = lengths[s] + t - starts[s] + count;
        whole.push_back({s, t, count, h, 0, last, -1});
        parts += ceil_div(last, SPAN) * count * group * (width + 2);
      }
  std::vector<Partial> partial;
  if (parts > MOST_PARTS) work = whole;  // there is enough to do without cutting
  else
    for (Work& all : whole) {
      long last = all.to;
      if (last > SPAN) all.part = (long)partial.size();
      for (long from = 0; from < last; from += SPAN) {
        work.push_back({all.run, all.row, all.count, all.head, from, std::min(from + SPAN, last), -1});
        if (last <= SPAN) continue;
        work.back().part = (long)partial.size();
        partial.emplace_back(all.count * group, width);
      }
    }
  auto finish = [&](const Work& w, const Partial& sum) {
    for (long m = 0; m < w.count * group; m++) {
      long row = w.row + m / group, head = w.head * group + m % group;
      const float *gate = rows + (row * (2 * qh + 2 * kvh) + qh + head) * d, *sums = &sum.sums[m * width];
      float* o = out + (row * qh + head) * d;
      float total = sum.total[m];
      for (long c = 0; c < d; c++) o[c] = sums[c] / total * sigmoid(gate[c]);
    }
  };
#pragma omp parallel num_threads(threads)
  {
    Attend attend(group, d, most * group);
    Partial sum(most * group, width), part(most * group, width);
#pragma omp for schedule(dynamic)
    for (long i = (long)work.size() - 1; i >= 0; i--) {  // the last rows of a prompt have the most to see
      const Work& w = work[i];
      Queries own{q + (w.row * qh + w.head * group) * d, qh * d, w.count, lengths[w.run] + w.row - starts[w.run] + 1};
      Pool pool{(const bf16*)keys + w.head * d, (const bf16*)values + w.head * d, pages + w.run * max_pages, page_size, kvh * d};
      if (w.part >= 0) { attend.span(own, pool, first, w.from, w.to, partial[w.part]); continue; }
      attend.span(own, pool, first, w.from, std::min(w.from + SPAN, w.to), sum);
      for (long from = w.from + SPAN; from < w.to; from += SPAN) {
        attend.span(own, pool, first, from, std::min(from + SPAN, w.to), part);
        sum.add(part, w.count * group);
      }
      finish(w, sum);
    }
#pragma omp for schedule(dynamic)
    for (long i = 0; i < (long)whole.size(); i++) {
      const Work& w = whole[i];
      if (w.part < 0) continue;
      sum.clear();
      for (long p = 0; p < ceil_div(w.to, SPAN); p++) sum.add(partial[w.part + p], w.count * group);
      finish(w, sum);
    }
  }
}
