// A bank of SwiGLU experts on packed weights, for some rows: tokens sorted by expert once; gate, up and SiLU in one tile; down
// summed into the rows. The work is in items, which threads take in any order: all of `up`, then all of `down`.
#pragma once
#include "bf16.h"
#include "tree.h"
#include <algorithm>
#include <vector>

struct Pair { int32_t token; float gate; TreeOrder::Step step; };  // one choice of a token, and its place in the token's sum
struct Item { long expert, first, count, panel, panels; };  // pairs[first : first + count] and some panels of gate and up

// The rows of an expert's pairs, which come in the order of tokens.
#if defined(DIVISI_AMX)
using Chosen = Strided;
static inline bool is_apart(const Pair* own, long count) {
  for (long i = 1; i < count; i++) if (own[i].token != own->token + i) return true;
  return false;
}
static inline Chosen chosen_of(const bf16* x, long width, const Pair* own, long count) {
  if (!is_apart(own, count)) return {x + own->token * width, width};
  static thread_local RowMemory memory;
  bf16* together = memory.hold(count, width);
  for (long i = 0; i < count; i++) memcpy(together + i * width, x + own[i].token * width, width * sizeof(bf16));
  return {together, width};
}
#else
struct Chosen {
  const bf16* first;
  long width;
  const Pair* pairs;
  const bf16* operator[](long row) const { return first + pairs[row].token * width; }
};
static inline bool is_apart(const Pair*, long) { return false; }
static inline Chosen chosen_of(const bf16* x, long width, const Pair* own, long) { return {x, width, own}; }
#endif

// Blocks of gate and up take turns in a panel: a tile holds both of the same inner channels.
struct UpTile : Taken {
  Chosen rows;
  const bf16* w;
  bf16* inner;
  long pairs, width, column;

  template <int NB>
  void take(long row, const vf (&sums)[NB]) const {
    bf16* out = inner + row * width + column;
#pragma GCC unroll 4
    for (int b = 0; b + 1 < NB; b += 2) _mm256_storeu_si256((__m256i*)(out + b / 2 * LANES), narrow(silu16(sums[b]) * sums[b + 1]));
    if (NB == 2) _mm256_storeu_si256((__m256i*)(out + LANES), __m256i{});  // an odd number of blocks: fills up the inputs of down
  }
};

// Adds to sums of 64 outputs, `each` floats a token, from token `from` on.
struct DownTile : Taken {
  Strided rows;
  const bf16* w;
  const Pair* chosen;
  float* sums;
  long pairs, from, each;

  template <int NB>
  void take(long row, const vf (&parts)[NB]) const {
    const Pair& pair = chosen[row];
    float* out = sums + (pair.token - from) * each + pair.step.at * PANEL;
    __mmask16 before = pair.step.first ? 0 : 0xffff;
    vf gate = all(pair.gate);
#pragma GCC unroll 8
    for (int b = 0; b < NB; b++) store(out + b * LANES, fma(gate, parts[b], (vf)_mm512_maskz_loadu_ps(before, out + b * LANES)));
  }
};

// Memory of the calling thread, which grows to the largest step.
struct Scratch {
  std::vector<long> begin, next;
  std::vector<int32_t> order;  // experts by their leaves
  std::vector<TreeOrder> sums;  // of each token, in the end
  std::vector<Pair> pairs;
  std::vector<Item> items;
  RowMemory inner;
};

// begin: where each expert's pairs start, in the order of tokens. Without ids all tokens are the only expert's, unweighted.
static void sort_pairs(Scratch& s, const int32_t* ids, const float* gates, long t, long k, long experts) {
  s.begin.assign(experts + 1, 0);
  if (!ids) {
    s.begin[1] = t;
    s.pairs.resize(t);
    for (long i = 0; i < t; i++) s.pairs[i] = {(int32_t)i, 1.0f, {}};
    return;
  }
  for (long p = 0; p < t * k; p++) if (ids[p] >= 0) s.begin[ids[p] + 1]++;
  for (long e = 0; e < experts; e++) s.begin[e + 1] += s.begin[e];
  s.next.assign(s.begin.begin(), s.begin.end() - 1);
  s.pairs.resize(s.begin[experts]);
  for (long p = 0; p < t * k; p++) if (ids[p] >= 0) s.pairs[s.next[ids[p]]++] = {(int32_t)(p / k), gates[p], {}};
}

// order: the experts by their leaves, those of one leaf as they are.
static void sort_experts(Scratch& s, const int32_t* leaves, long experts) {
  s.next.assign(*std::max_element(leaves, leaves + experts) + 2, 0);
  for (long e = 0; e < experts; e++) s.next[leaves[e] + 1]++;
  for (size_t leaf = 1; leaf < s.next.size(); leaf++) s.next[leaf] += s.next[leaf - 1];
  s.order.resize(experts);
  for (long e = 0; e < experts; e++) s.order[s.next[leaves[e]]++] = (int32_t)e;
}

// Where each pair's output goes, the same for all panels of down.
static void place_pairs(Scratch& s, const int32_t* leaves, long t) {
  s.sums.assign(t, TreeOrder{});
  for (int32_t e : s.order)
    for (long p = s.begin[e]; p < s.begin[e + 1]; p++) s.pairs[p].step = s.sums[s.pairs[p].token].next(leaves[e]);
}

// One panel of down for the tokens from `from` to `to`, expert by expert in the order of their leaves: a token's sum runs in the
// tree over these.
static void down_panel(Scratch& s, const int32_t* leaves, const bf16* down, long size, long panel, long from, long to,
                       float* y, long d, long f, long experts) {
  static thread_local std::vector<float> memory;
  Packed shape{down, ceil_div(d, LANES), pairs_of(f)};
  long width = width_of(f), column = panel * PANEL, wide = std::min(d - column, PANEL);
  long each = (TreeOrder::levels(leaves[s.order[experts - 1]] + 1) + 1) * PANEL;
  if ((long)memory.size() < (to - from) * each) memory.resize((to - from) * each);
  float* sums = memory.data();
  auto before = [](const Pair& pair, long token) { return pair.token < token; };
  for (long e : s.order) {
    const Pair *own = s.pairs.data() + s.begin[e], *end = s.pairs.data() + s.begin[e + 1];
    const Pair *first = std::lower_bound(own, end, from, before), *last = std::lower_bound(first, end, to, before);
    if (first == last) continue;
    for (const Pair* pair = first; pair < last; pair++)
      merge_sums(sums + (pair->token - from) * each, PANEL, pair->step.at, pair->step.merges);
    Packed packed{down + e * size, shape.blocks, shape.pairs};
    Strided inner{s.inner.data() + (first - s.pairs.data()) * width, width};
    tiles(last - first, packed.blocks_of(panel), DownTile{{}, inner, packed.panel(panel), first, sums, packed.pairs, from, each});
  }
  for (long i = from; i < to; i++) close_sums(sums + (i - from) * each, PANEL, s.sums[i].depth, y + i * d + column, wide);
}

// All experts of a layer, or the one that all rows go to; x: the rows, rounded. `sort` comes first.
struct Bank {
  static constexpr long TOKENS = 512;  // whose panel of sums stays in the cache
  static constexpr long PANELS = 4;  // of an item whose many rows are put together for all of them
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
    place_pairs(s, leaves, t);
    s.items.clear();
    for (long e = 0; e < experts; e++)
      for (long at = s.begin[e]; at < s.begin[e + 1]; at += ROWS) {
        long count = std::min(ROWS, s.begin[e + 1] - at), panels = up().panels();
        long each = count >= LANES && is_apart(&s.pairs[at], count) ? PANELS : 1;
        for (long panel = 0; panel < panels; panel += each) s.items.push_back({e, at, count, panel, std::min(each, panels - panel)});
      }
    s.inner.hold((long)s.pairs.size(), width_of(f));
  }
  void up_item(long i) const {
    const Item& item = s.items[i];
    long width = width_of(f);
    Packed packed{gate_up + item.expert * up().size(), up().blocks, up().pairs};
    bf16* inner = s.inner.data() + item.first * width;
    Chosen rows = chosen_of(x, width_of(d), &s.pairs[item.first], item.count);
    for (long panel = item.panel; panel < item.panel + item.panels; panel++)
      tiles(item.count, packed.blocks_of(panel), UpTile{{}, rows, packed.panel(panel), inner, packed.pairs, width, panel * PANEL / 2});
  }
  void down_item(long i) const {
    long panels = flat().panels(), from = i / panels * TOKENS;
    down_panel(s, leaves, down, flat().size(), i % panels, from, std::min(from + TOKENS, t), y, d, f, experts);
  }
};
