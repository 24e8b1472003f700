// y[t, n] = x[t, :] . w[n, :] with w packed, x rounded to bf16, see packed.h; and the packing.
#include "team.h"
#include "packed.h"

extern "C" void divisi_packed_linear(const float* x, const void* w, float* y, long t, long n, long k, int threads) {
  static thread_local RowMemory rounded;
  Product product{{(const bf16*)w, ceil_div(n, LANES), pairs_of(k)}, round_rows(x, rounded, t, k, threads), y, t, n, width_of(k)};
  share(threads_for(t * n * k, threads), product.items(), [&](long i) { product.item(i); });
}

// Packs `count` matrices [n, k]. With `halves` a matrix is two of n / 2 rows, gate and up, whose blocks take turns.
extern "C" void divisi_pack(const void* from, void* to, long count, long n, long k, int halves, int threads) {
  long part = halves ? n / 2 : n, blocks = ceil_div(part, LANES) * (halves ? 2 : 1), pairs = pairs_of(k);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (long e = 0; e < count; e++)
    for (long b = 0; b < blocks; b++) {
      const bf16* in = (const bf16*)from + e * n * k;
      Packed packed{(bf16*)to + e * blocks * LANES * 2 * pairs, blocks, pairs};
      long panel = b / BLOCKS, step = packed.step(panel);
      bf16* out = (bf16*)packed.panel(panel) + b % BLOCKS * packed.block();
      for (long l = 0; l < LANES; l++) {
        long row = (halves ? b / 2 : b) * LANES + l;
        const bf16* values = row < part ? in + (halves ? b % 2 * part + row : row) * k : nullptr;
        for (long p = 0; p < pairs; p++) {
          out[p * step + 2 * l] = values && 2 * p < k ? values[2 * p] : 0;
          out[p * step + 2 * l + 1] = values && 2 * p + 1 < k ? values[2 * p + 1] : 0;
        }
      }
    }
}

// Rows of a packed matrix [n, k] as floats.
extern "C" void divisi_packed_rows(const void* w, const int64_t* rows, float* out, long t, long n, long k) {
  Packed packed{(const bf16*)w, ceil_div(n, LANES), pairs_of(k)};
  for (long i = 0; i < t; i++) {
    long block = rows[i] / LANES, panel = block / BLOCKS, step = packed.step(panel);
    const bf16* in = packed.panel(panel) + block % BLOCKS * packed.block() + rows[i] % LANES * 2;
    for (long c = 0; c < k; c++) out[i * k + c] = scalar(in + c / 2 * step + c % 2);
  }
}
