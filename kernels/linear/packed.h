// y[t, n] = x[t, :] . w[n, :] with w packed and x rounded: in items, which threads take in any order.
#pragma once
#include "bf16.h"

// One panel against rows of x.
struct LinearTile {
  const bf16* x;
  const bf16* w;
  float* y;
  long pairs, n, column;

  template <int M, int NB>
  void run(long row) const {
    const bf16* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x + (row + m) * 2 * pairs;
    vf acc[M][NB]{};
    multiply<M, NB>(rows, w, pairs, acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) {
        long at = column + b * LANES;
        _mm512_mask_storeu_ps(y + (row + m) * n + at, lanes(n - at), (__m512)acc[m][b]);
      }
  }
};

struct Product {
  Packed w;
  const bf16* x;
  float* y;
  long t, n;

  long items() const { return ceil_div(t, ROWS) * w.panels(); }
  void item(long i) const {
    long first = i / w.panels() * ROWS, panel = i % w.panels();
    LinearTile tile{x + first * 2 * w.pairs, w.panel(panel), y + first * n, w.pairs, n, panel * PANEL};
    tiles(std::min(t - first, ROWS), w.blocks_of(panel), tile);
  }
};
