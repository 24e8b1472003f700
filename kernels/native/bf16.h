// Products of bf16 by the processor's own dot products (AVX-512 BF16), sums in fp32. Compiled only where there are such.
//
// A matrix [n, k] is packed: its rows in blocks of 16, four blocks to a panel (fewer in the last one), and a panel pair by pair
// of inputs, [k / 2][blocks][16][2]. So a panel is read from its first byte to its last, a vector holds a pair of inputs of 16
// rows, and the pair of the other operand that goes with it is one broadcast. Rows and inputs are filled up with zeros.
//
// Every output is one chain of sums over the pairs in their order, whatever the size of the tile that it is computed in: what a
// row gives does not depend on the rows beside it.
#pragma once
#include "team.h"
#include <algorithm>
#include <vector>

constexpr long LANES = 16;  // rows of a block
constexpr long BLOCKS = 4;  // blocks of a panel
constexpr long PANEL = LANES * BLOCKS;
constexpr int TALL = 6;  // rows of the other operand in a tile: 24 sums, 4 vectors of weights and a broadcast in 32 registers
constexpr long ROWS = 240;  // rows of a work item: with 1,024 inputs they and a panel stay in a cache of 1 MiB

static inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
static inline long padded(long n) { return ceil_div(n, LANES) * LANES; }
static inline long pairs_of(long k) { return (k + 1) / 2; }

static inline __m512i load_bits(const bf16* p) { return _mm512_loadu_si512(p); }
static inline vf widen(__m256i h) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
static inline __m256i narrow(vf v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
static inline __mmask16 lanes(long n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// Rounds a row of k floats to bf16; an odd row ends with a zero.
static inline void round_row(const float* in, bf16* out, long k) {
  long i = 0;
  for (; i + LANES <= k; i += LANES) _mm256_storeu_si256((__m256i*)(out + i), narrow(load(in + i)));
  if (i < k) {
    __m256i last = narrow((vf)_mm512_maskz_loadu_ps(lanes(k - i), in + i));
    _mm256_mask_storeu_epi16(out + i, lanes(2 * pairs_of(k) - i), last);
  }
}

// Rows of k floats to memory of the calling thread, which grows to the largest step.
static inline const bf16* round_rows(const float* in, std::vector<bf16>& rounded, long rows, long k, int threads) {
  long width = 2 * pairs_of(k);
  if ((long)rounded.size() < rows * width) rounded.resize(rows * width);
  bf16* out = rounded.data();
  auto round = [&](long i) { round_row(in + i * k, out + i * width, k); };
  constexpr long EACH = 16;  // rows
  share(threads_for(4 * rows * k, threads), ceil_div(rows, EACH), [&](long i) {
    for (long row = i * EACH; row < rows && row < (i + 1) * EACH; row++) round(row);
  });
  return out;
}

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

// Calls tile.run<M, NB>(row) for all rows, TALL at a time and then the rest, with the panel's number of blocks.
template <int NB, class Tile>
static inline void tall_tiles(long rows, const Tile& tile) {
  long r = 0;
  for (; r + TALL <= rows; r += TALL) tile.template run<TALL, NB>(r);
  switch (rows - r) {
    case 5: tile.template run<5, NB>(r); break;
    case 4: tile.template run<4, NB>(r); break;
    case 3: tile.template run<3, NB>(r); break;
    case 2: tile.template run<2, NB>(r); break;
    case 1: tile.template run<1, NB>(r); break;
  }
}
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
