// Tiles of products by the matrix unit, a part of bf16.h: 16 rows by 16 outputs of sums in a register, 32 inputs at a time.
//
// The unit keeps two chains of sums within 32 inputs, of their even and of their odd ones, and adds these to the sums before: other
// bits than those of dot products, the same for a row in any tile. It takes as long for one row as for six, and hardly longer
// for 16; so tiles always have 16, of which the last ones may be whatever lies behind the rows.
#pragma once

// The registers of this thread are laid out as we use them, 16 rows of 64 bytes each. Torch lays them out otherwise for its own
// products; asking takes a tenth of the time of telling.
static inline void lay_out_tiles() {
  struct Layout {
    uint8_t palette = 1, start = 0, nothing[14]{};
    uint16_t bytes[16]{64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16]{16, 16, 16, 16, 16, 16, 16, 16};
  };
  alignas(64) static const Layout ours;
  alignas(64) uint8_t current[sizeof(Layout)];
  _tile_storeconfig(current);
  asm volatile("" ::"r"(&ours), "r"(current) : "memory");  // the intrinsics do not tell which memory they read or write
  if (memcmp(&ours, current, sizeof ours)) _tile_loadconfig(&ours);
}

// The sums of one row with all blocks of a panel, by vectors: the unit's order of sums, and its zeros for what is too small, so that
// the bits are the same. They take weights from memory faster than the unit, which waits for each tile of them.
template <int NB>
static inline void row_product(const bf16* x, const bf16* w, long pairs, vf (&sums)[NB]) {
  constexpr unsigned ZEROS = 0x8040;  // results and operands that are denormal are taken for 0
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | ZEROS);
  asm volatile("" ::: "memory");
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  for (int b = 0; b < NB; b++) sums[b] = vf{};
  for (long p = 0; p < pairs; p += LANES) {
    vf even[NB]{}, odd[NB]{};
    for (long i = p; i < p + LANES; i++) {
      int32_t pair;
      memcpy(&pair, x + 2 * i, 4);
      __m512i both = _mm512_set1_epi32(pair);
      vf first = (vf)_mm512_slli_epi32(both, 16), second = (vf)_mm512_and_si512(both, upper);
#pragma GCC unroll 4
      for (int b = 0; b < NB; b++) {
        const bf16* at = w + (b * pairs + i) * TILE;
        _mm_prefetch((const char*)at + PREFETCH / NB, _MM_HINT_T0);
        __m512i bits = load_bits(at);
        even[b] = fma(first, (vf)_mm512_slli_epi32(bits, 16), even[b]);
        odd[b] = fma(second, (vf)_mm512_and_si512(bits, upper), odd[b]);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < NB; b++) sums[b] += even[b] + odd[b];
  }
  for (int b = 0; b < NB; b++) asm volatile("" : "+v"(sums[b]));  // not later than the next line
  _mm_setcsr(control);
}

// H * 16 rows of sums, which lie so many floats apart, = as many rows of x with one block of a panel.
//
// Registers are named by the instruction: 0 to 3 are sums, 4 rows, 5 weights. No more are in use, since where another thread shares
// the core the unit has not many more than their names, and a load waits until products before it have ended: with eight a
// product took 25 ns then, with six 16, with four 14; alone 7 with any (Sapphire Rapids or later).
template <int H>
static inline void block_product(const Strided& x, const bf16* w, long pairs, float* sums, long apart) {
  const long stride = x.width * sizeof(bf16), step = 2 * LANES * sizeof(bf16), lower = LANES * x.width;
  const bf16* rows = x.first;
  _tile_zero(0);
  if (H > 1) _tile_zero(1);
  if (H > 2) _tile_zero(2);
  if (H > 3) _tile_zero(3);
  for (long p = 0; p < pairs; p += LANES, rows += TILE, w += LANES * TILE) {
    for (long line = 0; line < LANES; line++) _mm_prefetch((const char*)(w + line * TILE) + PREFETCH, _MM_HINT_T0);
    _tile_loadd(5, w, step);
    _tile_loadd(4, rows, stride);
    _tile_dpbf16ps(0, 4, 5);
    if (H > 1) {
      _tile_loadd(4, rows + lower, stride);
      _tile_dpbf16ps(1, 4, 5);
    }
    if (H > 2) {
      _tile_loadd(4, rows + 2 * lower, stride);
      _tile_dpbf16ps(2, 4, 5);
    }
    if (H > 3) {
      _tile_loadd(4, rows + 3 * lower, stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  const long bytes = apart * sizeof(float);
  _tile_stored(0, sums, bytes);
  if (H > 1) _tile_stored(1, sums + LANES * apart, bytes);
  if (H > 2) _tile_stored(2, sums + 2 * LANES * apart, bytes);
  if (H > 3) _tile_stored(3, sums + 3 * LANES * apart, bytes);
}

// The same with all blocks, and of as many tiles as hold so many rows.
template <int NB>
static inline void panel_product(const Strided& x, long rows, const bf16* w, long pairs, float* sums, long apart) {
  asm volatile("" ::: "memory");
  for (long b = 0; b < NB; b++, w += 2 * LANES * pairs, sums += LANES) switch (ceil_div(rows, LANES)) {
      case 4: block_product<4>(x, w, pairs, sums, apart); break;
      case 3: block_product<3>(x, w, pairs, sums, apart); break;
      case 2: block_product<2>(x, w, pairs, sums, apart); break;
      case 1: block_product<1>(x, w, pairs, sums, apart); break;
    }
  asm volatile("" ::: "memory");
}

template <int NB, class Tile>
static inline void tall_tiles(long rows, const Tile& tile) {
  constexpr long TALLEST = 4 * LANES, WIDTH = NB * LANES;
  if (rows == 1) {
    vf own[NB];
    row_product<NB>(tile.rows[0], tile.w, tile.pairs, own);
    return tile.template take<NB>(0, own);
  }
  alignas(64) float sums[TALLEST * WIDTH];
  lay_out_tiles();
  for (long r = 0; r < rows; r += TALLEST) {
    long count = std::min(rows - r, TALLEST);
    Strided own{tile.rows[r], tile.rows.width};
    Stored straight = tile.straight(r, count, NB);
    if (straight.first) {
      panel_product<NB>(own, count, tile.w, tile.pairs, straight.first, straight.width);
      continue;
    }
    panel_product<NB>(own, count, tile.w, tile.pairs, sums, WIDTH);
    for (long m = 0; m < count; m++) {
      vf taken[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; b++) taken[b] = load(sums + m * WIDTH + b * LANES);
      tile.template take<NB>(r + m, taken);
    }
  }
}
