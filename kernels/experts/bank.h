// A bank of SwiGLU experts on packed weights, for some rows: tokens sorted by expert once; gate, up and SiLU in one tile; down
// summed into the rows. The work is in items, which threads take in any order: all of `up`, then all of `down`.
#pragma once
#include "bf16.h"
#include "tree.h"
#include <algorithm>
#include <vector>

struct Pair { int32_t token; float gate; };  // one choice of a token
struct Item { long expert, first, count, panel; };  // pairs[first : first + count] and a panel of gate and up

// Blocks of gate and up take turns in a panel: a tile holds both of the same inner channels.
struct UpTile {
  const Pair* pairs;
  const bf16* x;
  const bf16* w;
  bf16* inner;
  long inputs, width, column;

  template <int M, int NB>
  void run(long row) const {
    const bf16* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x + pairs[row + m].token * 2 * inputs;
    vf acc[M][NB]{};
    multiply<M, NB>(rows, w, inputs, acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int b = 0; b + 1 < NB; b += 2) {
        vf out = silu16(acc[m][b]) * acc[m][b + 1];
        _mm256_storeu_si256((__m256i*)(inner + (row + m) * width + column + b / 2 * LANES), narrow(out));
      }
  }
};

struct DownTile {
  const Pair* pairs;
  const bf16* inner;
  const bf16* w;
  float* const* sums;  // of each token from `from` on: where this expert's output is added
  long inputs, width, from;

  template <int M, int NB>
  void run(long row) const {
    const bf16* rows[M];
    for (int m = 0; m < M; m++) rows[m] = inner + (row + m) * width;
    vf acc[M][NB]{};
    multiply<M, NB>(rows, w, inputs, acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) {
        float* out = sums[pairs[row + m].token - from] + b * LANES;
        store(out, fma(all(pairs[row + m].gate), acc[m][b], load(out)));
      }
  }
};

// Memory of the calling thread, which grows to the largest step.
struct Scratch {
  std::vector<long> begin, next;
  std::vector<int32_t> order;  // experts by their leaves
  std::vector<Pair> pairs;
  std::vector<Item> items;
  std::vector<bf16> inner;
};

// begin: where each expert's pairs start, in the order of tokens. Without ids all tokens are the only expert's, unweighted.
static void sort_pairs(Scratch& s, const int32_t* ids, const float* gates, long t, long k, long experts) {
  s.begin.assign(experts + 1, 0);
  if (!ids) {
    s.begin[1] = t;
    s.pairs.resize(t);
    for (long i = 0; i < t; i++) s.pairs[i] = {(int32_t)i, 1.0f};
    return;
  }
  for (long p = 0; p < t * k; p++) if (ids[p] >= 0) s.begin[ids[p] + 1]++;
  for (long e = 0; e < experts; e++) s.begin[e + 1] += s.begin[e];
  s.next.assign(s.begin.begin(), s.begin.end() - 1);
  s.pairs.resize(s.begin[experts]);
  for (long p = 0; p < t * k; p++) if (ids[p] >= 0) s.pairs[s.next[ids[p]]++] = {(int32_t)(p / k), gates[p]};
}

// order: the experts by their leaves, those of one leaf as they are.
static void sort_experts(Scratch& s, const int32_t* leaves, long experts) {
  s.next.assign(*std::max_element(leaves, leaves + experts) + 2, 0);
  for (long e = 0; e < experts; e++) s.next[leaves[e] + 1]++;
  for (size_t leaf = 1; leaf < s.next.size(); leaf++) s.next[leaf] += s.next[leaf - 1];
  s.order.resize(experts);
  for (long e = 0; e < experts; e++) s.order[s.next[leaves[e]]++] = (int32_t)e;
}

// Sums of one panel that wait to be added up, by token. Memory of the thread that adds them.
struct Sums {
  std::vector<TreeSum> trees;
  std::vector<float> rows;
  std::vector<float*> open;
};

// One panel of down for the tokens from `from` to `to`, expert by expert in the order of their leaves: a token's sum runs in the
// tree over these.
static void down_panel(const Scratch& s, const int32_t* leaves, const bf16* down, long size, long panel, long from, long to,
                       float* y, long d, long f, long experts) {
  static thread_local Sums sums;
  Packed shape{down, ceil_div(d, LANES), pairs_of(f)};
  long width = padded(f), column = panel * PANEL, wide = d - column < PANEL ? d - column : PANEL;
  long rows = TreeSum::levels(leaves[s.order[experts - 1]] + 1) + 1, each = rows * PANEL;
  sums.trees.assign(to - from, TreeSum{});
  if ((long)sums.rows.size() < (to - from) * each) sums.rows.resize((to - from) * each);
  if ((long)sums.open.size() < to - from) sums.open.resize(to - from);
  auto before = [](const Pair& pair, long token) { return pair.token < token; };
  for (long i = 0; i < experts; i++) {
    long e = s.order[i];
    if (s.begin[e] == s.begin[e + 1]) continue;
    const Pair *own = s.pairs.data() + s.begin[e], *end = s.pairs.data() + s.begin[e + 1];
    const Pair *first = std::lower_bound(own, end, from, before), *last = std::lower_bound(first, end, to, before);
    if (first == last) continue;
    for (const Pair* pair = first; pair < last; pair++) {
      long token = pair->token - from;
      sums.open[token] = sums.trees[token].open(sums.rows.data() + token * each, PANEL, leaves[e]);
    }
    Packed packed{down + e * size, shape.blocks, shape.pairs};
    const bf16* inner = s.inner.data() + (first - s.pairs.data()) * width;
    tiles(last - first, packed.blocks_of(panel), DownTile{first, inner, packed.panel(panel), sums.open.data(), packed.pairs, width, from});
  }
  for (long i = from; i < to; i++)
    sums.trees[i - from].close(sums.rows.data() + (i - from) * each, PANEL, y + i * d + column, wide);
}

// All experts of a layer, or the one that all rows go to; x: the rows, rounded. `sort` comes first.
struct Bank {
  static constexpr long TOKENS = 512;  // whose panel of sums stays in the cache
  Scratch& s;
  const int32_t* leaves;
  const bf16 *gate_up, *down;
  long d, f, experts;
  const bf16* x;
  float* y;
  long t;

  Packed up() const { return {gate_up, 2 * ceil_div(f, LANES), pairs_of(d)}; }
  Packed flat() const { return {down, ceil_div(d, LANES), pairs_of(f)}; }
  long up_items() const { return (long)s.items.size(); }
  long down_items() const { return ceil_div(t, TOKENS) * flat().panels(); }
  long products() const { return (long)s.pairs.size() * 3 * d * f; }

  // Without ids all rows go to the only expert, unweighted.
  void sort(const int32_t* ids, const float* gates, long k) const {
    sort_pairs(s, ids, gates, t, k, experts);
    sort_experts(s, leaves, experts);
    s.items.clear();
    for (long e = 0; e < experts; e++)
      for (long at = s.begin[e]; at < s.begin[e + 1]; at += ROWS)
        for (long panel = 0; panel < up().panels(); panel++)
          s.items.push_back({e, at, std::min(ROWS, s.begin[e + 1] - at), panel});
    if (s.inner.size() < s.pairs.size() * padded(f)) s.inner.resize(s.pairs.size() * padded(f));
  }
  void up_item(long i) const {
    const Item& item = s.items[i];
    long width = padded(f);
    Packed packed{gate_up + item.expert * up().size(), up().blocks, up().pairs};
    bf16* inner = s.inner.data() + item.first * width;
    UpTile tile{&s.pairs[item.first], x, packed.panel(item.panel), inner, packed.pairs, width, item.panel * PANEL / 2};
    tiles(item.count, packed.blocks_of(item.panel), tile);
  }
  void down_item(long i) const {
    long panels = flat().panels(), from = i / panels * TOKENS;
    down_panel(s, leaves, down, flat().size(), i % panels, from, std::min(from + TOKENS, t), y, d, f, experts);
  }
};
