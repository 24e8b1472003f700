// Vectors of the machine's width through GCC's vector extension: the same source serves AVX2, AVX-512 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VB = 64;
#elif defined(__AVX__)
constexpr int VB = 32;
#else
constexpr int VB = 16;
#endif
constexpr int VL = VB / 4;  // floats per vector
constexpr long MANY = 16;  // from so many rows on, tiles of a product hold more of them
constexpr long ALONE = 1 << 16;  // multiplications; fewer are done before other threads have taken notice, and a team of one costs too
constexpr long PREFETCH = 8192;  // bytes ahead; 16 to 29 GB/s on a 33 MB matrix, two Zen 3 cores
typedef float vf __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint16_t vh __attribute__((vector_size(VB / 2)));
typedef uint16_t bf16;

static inline vf load(const float* p) { vf v; memcpy(&v, p, VB); return v; }
static inline vf load(const bf16* p) {
  vh h; memcpy(&h, p, VB / 2);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline void store(float* p, vf v) { memcpy(p, &v, VB); }
static inline float scalar(const float* p) { return *p; }
static inline float scalar(const bf16* p) { uint32_t u = (uint32_t)*p << 16; float f; memcpy(&f, &u, 4); return f; }
// Fused wherever the machine can, in every tile alike: left to the compiler, two tiles may round differently.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Adds the upper half of each group of 2 * HALF lanes to its lower half: a's groups, then b's, now HALF lanes wide.
template <int HALF, int... I>
static inline vf fold(vf a, vf b, std::integer_sequence<int, I...>) {
  constexpr vi lower{I / HALF * 2 * HALF + I % HALF...};
  return __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, lower + HALF);
}
// The sums of N vectors, by halves, several vectors at a time.
template <int N, int HALF = VL / 2>
static inline void sums(const vf* v, float* out) {
  constexpr int M = (N + 1) / 2;
  vf folded[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
    folded[i] = fold<HALF>(v[2 * i], v[2 * i + 1 < N ? 2 * i + 1 : 2 * i], std::make_integer_sequence<int, VL>());
  if constexpr (HALF > 1) sums<M, HALF / 2>(folded, out);
  else
    for (int i = 0; i < M; i++) store(out + i * VL, folded[i]);
}
static inline float sum(vf v) { float s[VL]; sums<1>(&v, s); return s[0]; }
static inline float dot(const float* a, const float* b, long n) {
  vf acc{};
  long i = 0;
  for (; i + VL <= n; i += VL) acc = fma(load(a + i), load(b + i), acc);
  float s = sum(acc);
  for (; i < n; i++) s = __builtin_fmaf(a[i], b[i], s);
  return s;
}

static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {  // round to nearest even, NaN stays NaN
  uint32_t u; memcpy(&u, &x, 4);
  *p = (u & 0x7fffffff) > 0x7f800000 ? (bf16)((u >> 16) | 0x40) : (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// exp by 2^n * polynomial (Cephes expf), about 1 ulp; branch-free, so that loops over it vectorise.
static inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
  x -= n * 0.693359375f;
  x -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float scale; memcpy(&scale, &bits, 4);
  return p * scale;
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
static inline float silu(float x) { return x * sigmoid(x); }

template <class Each>
static inline void for_each(long n, const Each& each) { for (long i = 0; i < n; i++) each(i); }

// Dot products of TM rows of x with NR rows of w over k entries: out[m * ldo + n]. The first tile to touch rows of w also
// asks for those that lie PREFETCH bytes on: short rows defeat the hardware's prefetcher.
template <int TM, int NR, bool FIRST, class W>
static inline void dot_tile(const float* const* x, const W* w, long ldw, long k, float* out, long ldo) {
  vf acc[TM * NR];
#pragma GCC unroll 16
  for (int a = 0; a < TM * NR; a++) acc[a] = vf{};
  long i = 0;
  for (; i + VL <= k; i += VL) {
    if (FIRST && i % (64 / (long)sizeof(W)) == 0)
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) __builtin_prefetch((const char*)(w + n * ldw + i) + PREFETCH);
    vf b[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) b[n] = load(w + n * ldw + i);
#pragma GCC unroll 8
    for (int m = 0; m < TM; m++) {
      vf a = load(x[m] + i);
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) acc[m * NR + n] = fma(a, b[n], acc[m * NR + n]);
    }
  }
  float s[(TM * NR + VL - 1) / VL * VL];
  sums<TM * NR>(acc, s);
  for (; i < k; i++)
    for (int m = 0; m < TM; m++)
      for (int n = 0; n < NR; n++) s[m * NR + n] = __builtin_fmaf(x[m][i], scalar(w + n * ldw + i), s[m * NR + n]);
  for (int m = 0; m < TM; m++)
    for (int n = 0; n < NR; n++) out[m * ldo + n] = s[m * NR + n];
}

// NR rows of w against m rows of x, in tiles of four and a rest of one to three.
template <int NR, class W>
static inline void dot_rows(const float* const* x, long m, const W* w, long ldw, long k, float* out, long ldo) {
  long i = 0;
  for (; i + 4 <= m; i += 4) {
    if (i == 0) dot_tile<4, NR, true, W>(x, w, ldw, k, out, ldo);
    else dot_tile<4, NR, false, W>(x + i, w, ldw, k, out + i * ldo, ldo);
  }
  if (m - i == 3) dot_tile<3, NR, true, W>(x + i, w, ldw, k, out + i * ldo, ldo);
  if (m - i == 2) dot_tile<2, NR, true, W>(x + i, w, ldw, k, out + i * ldo, ldo);
  if (m - i == 1) dot_tile<1, NR, true, W>(x + i, w, ldw, k, out + i * ldo, ldo);
}

// m rows of x (pointers) with n rows of w. Tile sizes keep eight accumulators or more in flight. Every tile sums a dot product
// in the same order, so a row's result does not depend on the rows beside it.
template <class W>
static inline void dot_block(const float* const* x, long m, const W* w, long ldw, long n, long k, float* out, long ldo) {
  constexpr int WIDE = VB == 64 ? 8 : 4;  // rows of x that stay in cache, with their accumulators in registers
  for (bool first = true; m >= MANY; m -= WIDE, x += WIDE, out += WIDE * ldo, first = false) {
    long j = 0;
    if (first) for (; j + 2 <= n; j += 2) dot_tile<WIDE, 2, true, W>(x, w + j * ldw, ldw, k, out + j, ldo);
    else for (; j + 2 <= n; j += 2) dot_tile<WIDE, 2, false, W>(x, w + j * ldw, ldw, k, out + j, ldo);
    for (; j < n; j++) dot_tile<WIDE, 1, true, W>(x, w + j * ldw, ldw, k, out + j, ldo);
  }
  long j = 0;
  if (m == 1)
    for (; j + 8 <= n; j += 8) dot_tile<1, 8, true, W>(x, w + j * ldw, ldw, k, out + j, ldo);
  if (m == 2)
    for (; j + 4 <= n; j += 4) dot_tile<2, 4, true, W>(x, w + j * ldw, ldw, k, out + j, ldo);
  for (; j + 2 <= n; j += 2) dot_rows<2, W>(x, m, w + j * ldw, ldw, k, out + j, ldo);
  for (; j < n; j++) dot_rows<1, W>(x, m, w + j * ldw, ldw, k, out + j, ldo);
}
