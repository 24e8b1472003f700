// Keys and values of 64 positions, from the pages where they lie, packed like panels of weights.
#pragma once
#include "bf16.h"
#include "transpose.h"

constexpr long KEYS = PANEL;

// Where the channels of two rows come from that take turns: the first row's, and from 32 on the second one's.
alignas(64) static constexpr uint16_t INTERLEAVED[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

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

// 64 positions, of which one head after the other is packed as two matrices, which stay in the first cache: keys [64, d] and,
// turned, values [d, 64]. Rows not from `from` to `to` are zero.
struct KeyTile {
  long d;
  std::vector<vf> keys, values;
  std::vector<bf16> nothing;  // the row, of all heads, of a position that is not there
  const bf16 *key[2 * KEYS], *value[2 * KEYS];  // of this tile and of the next
  KeyTile(long d, long heads) : d(d), keys(pairs_of(d) * BLOCKS), values(ceil_div(d, LANES) * KEYS / 2), nothing(heads * d) {}
  Packed key_panel() const { return {(const bf16*)keys.data(), BLOCKS, pairs_of(d)}; }
  Packed turned() const { return {(const bf16*)values.data(), ceil_div(d, LANES), KEYS / 2}; }

  void begin(const Pool& pool, long at, long from, long to) {
    std::fill_n(key, 2 * KEYS, nothing.data());
    std::fill_n(value, 2 * KEYS, nothing.data());
    pool.rows(std::max(at, from), std::min(at + 2 * KEYS, to), [&](long position, long row) {
      key[position - at] = pool.keys + row;
      value[position - at] = pool.values + row;
    });
  }

  void load_keys(long head) {
    Packed packed = key_panel();
    long step = packed.step(0) / (2 * LANES);
    for (long block = 0; block < BLOCKS; block++)
      for (long c = 0; c < d; c += 2 * LANES) {
        __m512i rows[LANES];
        for (int l = 0; l < LANES; l++) rows[l] = channels(key[block * LANES + l] + head * d, c);
        transpose16(rows);
        vf* to = &keys[block * packed.block() / (2 * LANES) + c / 2 * step];
        for (long p = 0; p < LANES; p++) to[p * step] = (vf)rows[p];
      }
  }

  // Two blocks of 16 channels at a time.
  void load_values(long head) {
    const __m512i lower = _mm512_load_si512(INTERLEAVED), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(LANES));
    Packed packed = turned();
    for (long b = 0; b < packed.blocks; b += 2) {
      long step = packed.step(b / BLOCKS) / (2 * LANES), next = packed.block() / (2 * LANES);
      vf* to = &values[b / BLOCKS * BLOCKS * KEYS / 2 + b % BLOCKS * next];
      for (long p = 0; p < KEYS / 2; p++, to += step) {
        __m512i even = channels(value[2 * p] + head * d, b * LANES), odd = channels(value[2 * p + 1] + head * d, b * LANES);
        to[0] = (vf)_mm512_permutex2var_epi16(even, lower, odd);
        if (b + 1 < packed.blocks) to[next] = (vf)_mm512_permutex2var_epi16(even, upper, odd);
      }
    }
  }

  // Asks for the head's rows of the next tile: pages lie anywhere.
  void fetch_next(long head) const {
    for (long i = KEYS; i < 2 * KEYS; i++)
      for (long c = 0; c < d; c += 2 * LANES) {
        _mm_prefetch((const char*)(key[i] + head * d + c), _MM_HINT_T1);
        _mm_prefetch((const char*)(value[i] + head * d + c), _MM_HINT_T1);
      }
  }

 private:
  __m512i channels(const bf16* row, long c) const {
    return d - c >= 2 * LANES ? _mm512_loadu_si512(row + c) : _mm512_maskz_loadu_epi16((1u << (d - c)) - 1, row + c);
  }
};
