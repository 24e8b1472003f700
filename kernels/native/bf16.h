// Products of bf16 by the processor's own dot products (AVX-512 BF16) or its matrix unit (AMX), sums in fp32. Compiled only where
// there are such.
//
// A matrix [n, k] is packed: its rows in blocks of 16, four blocks to a panel (fewer in the last one), and a panel pair by pair
// of inputs, [k / 2][blocks][16][2]. So a panel is read from its first byte to its last, a vector holds a pair of inputs of 16
// rows, and the pair of the other operand that goes with it is one broadcast. Of AMX 16 such vectors of a block are a tile, and a
// panel is block by block, [blocks][k / 2][16][2]. Rows are filled up with zeros to whole blocks, inputs to whole tiles.
//
// Every output is summed over the pairs in one order (a chain; of AMX see amx.h), whatever the size of the tile that it is computed
// in: what a row gives does not depend on the rows beside it.
#pragma once
#include "team.h"
#include <algorithm>
#include <vector>

constexpr long LANES = 16;  // rows of a block
constexpr long BLOCKS = 4;  // blocks of a panel
constexpr long PANEL = LANES * BLOCKS;
constexpr long TILE = 2 * LANES;  // inputs of a tile of AMX
constexpr int TALL = 6;  // rows of the other operand in a tile: 24 sums, 4 vectors of weights and a broadcast in 32 registers
constexpr long ROWS = 240;  // rows of a work item: with 1,024 inputs they and a panel stay in a cache of 1 MiB

static inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
static inline long padded(long n) { return ceil_div(n, LANES) * LANES; }
static inline long pairs_of(long k) { return ceil_div(k, TILE) * LANES; }
// From one rounded row to the next: an odd number of tiles, so that a tile's 16 lines lie in as many sets of the first cache.
static inline long width_of(long k) { return (ceil_div(k, TILE) | 1) * TILE; }

static inline __m512i load_bits(const bf16* p) { return _mm512_loadu_si512(p); }
static inline vf widen(__m256i h) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
static inline __m256i narrow(vf v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
static inline __mmask16 lanes(long n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// Rounds a row of k floats to bf16, and fills it up with zeros.
static inline void round_row(const float* in, bf16* out, long k) {
  long i = 0;
  for (; i + LANES <= k; i += LANES) _mm256_storeu_si256((__m256i*)(out + i), narrow(load(in + i)));
  for (; i < 2 * pairs_of(k); i += LANES)
    _mm256_storeu_si256((__m256i*)(out + i), narrow((vf)_mm512_maskz_loadu_ps(lanes(k - i), in + i)));
}

// Rows of bf16, from the beginning of a cache line; it grows, and holds the further rows that a tile of AMX takes in and nobody
// looks at.
class RowMemory {
  std::vector<vf> values;

 public:
  bf16* hold(long rows, long width) {
    long lines = ceil_div((rows + LANES - 1) * width, TILE);
    if ((long)values.size() < lines) values.resize(lines);
    return data();
  }
  bf16* data() { return (bf16*)values.data(); }
};

// Rows of k floats to memory of the calling thread, which grows to the largest step.
static inline const bf16* round_rows(const float* in, RowMemory& rounded, long rows, long k, int threads) {
  long width = width_of(k);
  bf16* out = rounded.hold(rows, width);
  share_rows(threads_for(4 * rows * k, threads), rows, [&](long i) { round_row(in + i * k, out + i * width, k); });
  return out;
}

// Rows that lie `width` values apart.
struct Strided {
  const bf16* first;
  long width;
  const bf16* operator[](long row) const { return first + row * width; }
};

// A tile is a struct of `rows` (by their numbers), `w` (a panel) and its `pairs`, that takes the sums of a row with NB blocks in
// take<NB>(row, sums). tiles(rows, blocks, tile) computes them for all rows. straight(row, count, blocks) tells where
// the sums of so many rows may be stored as they are, a tile of AMX at a time; null: they are to be taken.
struct Stored { float* first; long width; };  // width: floats from one row to the next
struct Taken {
  Stored straight(long, long, long) const { return {}; }
};
#if defined(DIVISI_AMX)
#include "amx.h"
#else
// acc[m][n] += the dot products of M rows of x with NB blocks of a panel over all pairs.
template <int M, int NB>
static inline __attribute__((always_inline)) void multiply(const bf16* const* x, const bf16* w, long pairs, vf (&acc)[M][NB]) {
  for (long p = 0; p < pairs; p++, w += NB * 2 * LANES) {
    __m512bh b[NB];
#pragma GCC unroll 8
    for (int n = 0; n < NB; n++) {
      if (M <= 2) _mm_prefetch((const char*)(w + n * 2 * LANES) + PREFETCH, _MM_HINT_T0);
      b[n] = (__m512bh)load_bits(w + n * 2 * LANES);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      int32_t pair;
      memcpy(&pair, x[m] + 2 * p, 4);
      __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int n = 0; n < NB; n++) acc[m][n] = (vf)_mm512_dpbf16_ps((__m512)acc[m][n], a, b[n]);
    }
  }
}

template <int M, int NB, class Tile>
static inline void run(const Tile& tile, long row) {
  const bf16* rows[M];
  for (int m = 0; m < M; m++) rows[m] = tile.rows[row + m];
  vf acc[M][NB]{};
  multiply<M, NB>(rows, tile.w, tile.pairs, acc);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) tile.template take<NB>(row + m, acc[m]);
}

// TALL rows at a time and then the rest.
template <int NB, class Tile>
static inline void tall_tiles(long rows, const Tile& tile) {
  long r = 0;
  for (; r + TALL <= rows; r += TALL) run<TALL, NB>(tile, r);
  switch (rows - r) {
    case 5: run<5, NB>(tile, r); break;
    case 4: run<4, NB>(tile, r); break;
    case 3: run<3, NB>(tile, r); break;
    case 2: run<2, NB>(tile, r); break;
    case 1: run<1, NB>(tile, r); break;
  }
}
#endif

template <class Tile>
static inline void tiles(long rows, long blocks, const Tile& tile) {
  switch (blocks) {
    case 4: tall_tiles<4>(rows, tile); break;
    case 3: tall_tiles<3>(rows, tile); break;
    case 2: tall_tiles<2>(rows, tile); break;
    case 1: tall_tiles<1>(rows, tile); break;
  }
}

// A matrix that was packed by divisi_pack.
struct Packed {
  const bf16* data;
  long blocks, pairs;
  // Values from one pair of a block of a panel to the next, and from one block to the next.
#if defined(DIVISI_AMX)
  long step(long) const { return 2 * LANES; }
  long block() const { return 2 * LANES * pairs; }
#else
  long step(long panel) const { return 2 * LANES * blocks_of(panel); }
  long block() const { return 2 * LANES; }
#endif
  long panels() const { return ceil_div(blocks, BLOCKS); }
  long blocks_of(long panel) const { long left = blocks - panel * BLOCKS; return left < BLOCKS ? left : BLOCKS; }
  const bf16* panel(long index) const { return data + index * PANEL * 2 * pairs; }
  long size() const { return blocks * LANES * 2 * pairs; }
};

static inline vf exp16(vf v) {  // as fast_exp, for 16 at once; of -inf it is 0
  __m512 x = _mm512_max_ps((__m512)v, _mm512_set1_ps(-87.0f));
  x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, x), x, x), _mm512_set1_ps(1.0f));
  __mmask16 nothing = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(-87.0f), _CMP_LT_OS);
  return (vf)_mm512_maskz_scalef_ps((__mmask16)~nothing, p, n);
}
static inline vf silu16(vf v) { return v / (1.0f + exp16(-v)); }
