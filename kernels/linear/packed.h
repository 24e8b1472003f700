// y[t, n] = x[t, :] . w[n, :] with w packed and x rounded: in items, which threads take in any order.
#pragma once
#include "bf16.h"

// One panel against rows of x.
struct LinearTile {
  Strided rows;
  const bf16* w;
  float* y;
  long pairs, n, column;

  Stored straight(long row, long count, long blocks) const {
    bool whole = count % LANES == 0 && column + blocks * LANES <= n;
    return {whole ? y + row * n + column : nullptr, n};
  }
  template <int NB>
  void take(long row, const vf (&sums)[NB]) const {
#pragma GCC unroll 8
    for (int b = 0; b < NB; b++) {
      long at = column + b * LANES;
      _mm512_mask_storeu_ps(y + row * n + at, lanes(n - at), (__m512)sums[b]);
    }
  }
};

struct Product {
  Packed w;
  const bf16* x;
  float* y;
  long t, n, width;  // width: from one row of x to the next

  long items() const { return ceil_div(t, ROWS) * w.panels(); }
  void item(long i) const {
    long first = i / w.panels() * ROWS, panel = i % w.panels();
    LinearTile tile{{x + first * width, width}, w.panel(panel), y + first * n, w.pairs, n, panel * PANEL};
    tiles(std::min(t - first, ROWS), w.blocks_of(panel), tile);
  }
};
