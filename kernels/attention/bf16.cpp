// Gated grouped-query attention over bf16 pages by the processor's dot products, for decoded and scanned rows alike. A projected
// row is [q | gate | k | v].
//
// Keys are taken 64 at a time, from positions that are multiples of it, and laid out like a panel of weights, head by head, once
// for all queries in some rows. Queries and weights of values are rounded to bf16, sums and the running softmax
// (Milakov & Gimelshein 2018) are fp32. Every 512 positions a softmax begins anew, and these are put together in their order,
// by whichever threads they were computed: what a row gets depends on its own query and position alone.
#include "tile.h"
#include <memory>

constexpr long SPAN = 512, QUERIES = 512;
constexpr size_t MOST_PARTS = 1 << 20;  // floats of spans that are computed apart

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

struct Rows {  // some KV heads of some rows of one run, of which the first sees `visible` positions and each later one more
  const float* q;  // of the first head; those of two rows lie `stride` apart
  long stride, count, heads, visible;
};

struct ScoreTile {
  Strided rows;
  const bf16* w;
  float* scores;  // there is room for further rows
  long pairs;
  Stored straight(long row, long, long) const { return {scores + row * KEYS, KEYS}; }
  template <int NB>
  void take(long row, const vf (&sums)[NB]) const {
#pragma GCC unroll 8
    for (int b = 0; b < NB; b++) store(scores + row * KEYS + b * LANES, sums[b]);
  }
};

struct ValueTile : Taken {
  Strided rows;
  const bf16* w;
  const float* keep;
  float* sums;
  long pairs, width;
  template <int NB>
  void take(long row, const vf (&parts)[NB]) const {
    float* out = sums + row * width;
#pragma GCC unroll 8
    for (int b = 0; b < NB; b++) store(out + b * LANES, fma(load(out + b * LANES), all(keep[row]), parts[b]));
  }
};

// What one thread works with. Queries are in the order of KV heads, then rows, then those of a row that share the head.
struct Attend {
  long group, heads, d, rows, width;
  vf scale;
  KeyTile tile;
  RowMemory q_memory, weight_memory;
  bf16 *q, *weights;
  std::vector<float> scores, keep;
  std::vector<vf> totals;  // of each query's weights, lane by lane
  Partial sum, part;
  Attend(long group, long heads, long d, long rows)
      : group(group), heads(heads), d(d), rows(rows), width(padded(d)), scale(all(1.44269504f / sqrtf((float)d))), tile(d, heads),
        q(q_memory.hold(rows * group * heads, width_of(d))), weights(weight_memory.hold(rows * group, KEYS)), scores((rows * group + LANES - 1) * KEYS), keep(rows * group),
        totals(rows * group * heads), sum(rows * group * heads, width), part(rows * group * heads, width) {}

  // The softmax over positions `from` to `to` (`first` is the first that has a key), into `out`.
  void span(const Rows& own, const Pool& pool, long first, long from, long to, Partial& out) {
    long queries = own.count * group, pairs = pairs_of(d), step = width_of(d);
    for (long m = 0; m < queries * own.heads; m++) {
      long head = m / queries * group + m % group, row = m % queries / group;
      round_query(own.q + row * own.stride + head * d, &q[m * step]);
    }
    out.clear(queries * own.heads);
    std::fill_n(totals.begin(), queries * own.heads, vf{});
    to = std::min(to, own.visible + own.count - 1);
    for (long at = from; at < to; at += KEYS) {
      tile.begin(pool, at, first, to);
      long row = std::max(0L, at + 1 - own.visible) * group, count = queries - row;  // earlier rows see nothing here
      for (long h = 0; h < own.heads; h++) {
        long base = h * queries + row;
        tile.load_keys(h);
        tile.fetch_next(h);
        tiles(count, BLOCKS, ScoreTile{{&q[base * step], step}, tile.key_panel().data, scores.data(), pairs});
        for (long m = 0; m < count; m++) {
          long begin = first - at, end = own.visible + (row + m) / group - at;
          if (begin <= 0 && end >= KEYS) soften<false>(m, ~0ull, base + m, out);
          else soften<true>(m, between(begin, end), base + m, out);
        }
        tile.load_values(h);
        Packed values = tile.turned();
        for (long p = 0; p < values.panels(); p++) {
          float* sums = &out.sums[base * width + p * PANEL];
          tiles(count, values.blocks_of(p), ValueTile{{}, {weights, KEYS}, values.panel(p), keep.data(), sums, KEYS / 2, width});
        }
      }
    }
    for (long m = 0; m < queries * own.heads; m++) out.total[m] = ::sum(totals[m]);
  }

  // In powers of 2, so that scores need no factor.
  void round_query(const float* in, bf16* to) const {
    for (long c = 0; c < 2 * pairs_of(d); c += LANES)
      _mm256_storeu_si256((__m256i*)(to + c), narrow((vf)_mm512_maskz_loadu_ps(lanes(d - c), in + c) * scale));
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
    vf total = totals[query] * keep[m];
    for (int b = 0; b < BLOCKS; b++) {
      vf weight = (vf)powers<MASKED>(_mm512_sub_ps(s[b], _mm512_set1_ps(best)));
      total += weight;
      _mm256_storeu_si256((__m256i*)&weights[m * KEYS + b * LANES], narrow(weight));
    }
    totals[query] = total;
  }
};

// The calling thread's, which lasts: it grows to the most rows of a step.
static Attend& attend_with(long group, long heads, long d, long rows) {
  static thread_local std::unique_ptr<Attend> kept;
  bool fits = kept && kept->group == group && kept->heads == heads && kept->d == d && kept->rows >= rows;
  if (!fits) kept = std::make_unique<Attend>(group, heads, d, rows);
  return *kept;
}

// Some KV heads of some rows of a run over some positions; part: where its partial softmax goes; -1: it is the whole.
struct Work { long run, row, count, head, heads, from, to, part; };

// What a call is cut into.
struct Cut {
  long most = 1, pieces = 0, products = 0;  // rows of a piece, how many there are if every span is one, multiplications
  size_t parts = 0;                         // floats of spans that are computed apart
  std::vector<Work> whole, work;
  std::vector<Partial> partial;

  Cut(const int32_t* starts, const int32_t* lengths, long runs, long qh, long kvh, long d, int threads) {
    for (long s = 0; s < runs; s++) most = std::max(most, (long)starts[s + 1] - starts[s]);
    most = std::min(most, std::max(1L, QUERIES / qh));
    for (long s = 0; s < runs; s++)
      for (long t = starts[s]; t < starts[s + 1]; t += most) {
        long count = std::min(most, (long)starts[s + 1] - t), last = lengths[s] + t - starts[s] + count;
        whole.push_back({s, t, count, 0, kvh, 0, last, -1});
        pieces += ceil_div(last, SPAN);
        parts += ceil_div(last, SPAN) * count * qh * (padded(d) + 2);
        products += 2 * last * count * qh * d;
      }
    if (threads_for(products, threads) > 1) share_heads(kvh, threads);
    if (parts > MOST_PARTS) work = whole;  // there is enough to do without cutting
    else cut_spans(qh / kvh, padded(d));
  }
 private:
  // Where there are fewer pieces than threads, each is of some heads only.
  void share_heads(long heads, int threads) {
    long shares = 1;
    while (pieces * shares < threads && heads % (2 * shares) == 0) shares *= 2;
    if (shares == 1) return;
    std::vector<Work> all = std::move(whole);
    whole.clear();
    for (Work& each : all)
      for (each.head = 0, each.heads = heads / shares; each.head < heads; each.head += each.heads) whole.push_back(each);
  }
  void cut_spans(long group, long width) {
    for (Work& all : whole) {
      bool cut = all.to > SPAN;
      if (cut) all.part = (long)partial.size();
      for (long from = 0; from < all.to; from += SPAN) {
        work.push_back(all);
        Work& piece = work.back();
        piece.from = from, piece.to = std::min(from + SPAN, all.to), piece.part = cut ? (long)partial.size() : -1;
        if (cut) partial.emplace_back(all.count * all.heads * group, width);
      }
    }
  }
};

extern "C" void divisi_tiled_attention(const float* q, const float* rows, const void* keys, const void* values, long page_size,
                                       const int32_t* starts, const int32_t* lengths, const int32_t* pages, long max_pages,
                                       long first, float* out, long runs, long qh, long kvh, long d, int threads) {
  long width = padded(d), group = qh / kvh;
  Cut cut(starts, lengths, runs, qh, kvh, d, threads);
  auto finish = [&](const Work& w, const Partial& sum) {
    long queries = w.count * group;
    for (long m = 0; m < queries * w.heads; m++) {
      long row = w.row + m % queries / group, head = (w.head + m / queries) * group + m % group;
      const float *gate = rows + (row * (2 * qh + 2 * kvh) + qh + head) * d, *sums = &sum.sums[m * width];
      float* o = out + (row * qh + head) * d;
      float total = sum.total[m];
      for (long c = 0; c < d; c++) o[c] = sums[c] / total * sigmoid(gate[c]);
    }
  };
  auto attend = [&](long i) {
    const Work& w = cut.work[cut.work.size() - 1 - i];  // the last rows of a prompt have the most to see
    Attend& own = attend_with(group, kvh, d, cut.most);
    Rows some{q + (w.row * qh + w.head * group) * d, qh * d, w.count, w.heads, lengths[w.run] + w.row - starts[w.run] + 1};
    Pool pool{(const bf16*)keys + w.head * d, (const bf16*)values + w.head * d, pages + w.run * max_pages, page_size, kvh * d};
    if (w.part >= 0) return own.span(some, pool, first, w.from, w.to, cut.partial[w.part]);
    own.span(some, pool, first, w.from, std::min(w.from + SPAN, w.to), own.sum);
    for (long from = w.from + SPAN; from < w.to; from += SPAN) {
      own.span(some, pool, first, from, std::min(from + SPAN, w.to), own.part);
      own.sum.add(own.part, w.count * w.heads * group);
    }
    finish(w, own.sum);
  };
  auto put_together = [&](long i) {
    const Work& w = cut.whole[i];
    if (w.part < 0) return;
    Partial& sum = attend_with(group, kvh, d, cut.most).sum;
    long queries = w.count * w.heads * group;
    sum.clear(queries);
    for (long p = 0; p < ceil_div(w.to, SPAN); p++) sum.add(cut.partial[w.part + p], queries);
    finish(w, sum);
  };
  threads = threads_for(cut.products, threads);
  Phase spans{[&] { return (long)cut.work.size(); }, attend};
  if (cut.partial.empty()) in_phases(threads, spans);
  else in_phases(threads, spans, Phase{[&] { return (long)cut.whole.size(); }, put_together});
}
