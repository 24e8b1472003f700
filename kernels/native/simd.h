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
constexpr long ALONE = 1 << 18;  // multiplications; fewer are done before other threads have taken notice, and a team of one costs too
constexpr long PREFETCH = 8192;  // bytes ahead; 16 to 29 GB/s on a 33 MB matrix, two Zen 3 cores
typedef float vf __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint16_t vh __attribute__((vector_size(VB / 2)));
typedef uint16_t bf16;

// Told to the compiler by intrinsics where there are any: GCC 12 passes copies through memory, and widens in six steps.
#if defined(__AVX512F__)
static inline vf load(const float* p) { return (vf)_mm512_loadu_ps(p); }
static inline vf load(const bf16* p) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16); }
static inline void store(float* p, vf v) { _mm512_storeu_ps(p, (__m512)v); }
#elif defined(__AVX2__)
static inline vf load(const float* p) { return (vf)_mm256_loadu_ps(p); }
static inline vf load(const bf16* p) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16); }
static inline void store(float* p, vf v) { _mm256_storeu_ps(p, (__m256)v); }
#else
static inline vf load(const float* p) { vf v; memcpy(&v, p, VB); return v; }
static inline vf load(const bf16* p) {
  vh h; memcpy(&h, p, VB / 2);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline void store(float* p, vf v) { memcpy(p, &v, VB); }
#endif
static inline float scalar(const float* p) { return *p; }
static inline float scalar(const bf16* p) { uint32_t u = (uint32_t)*p << 16; float f; memcpy(&f, &u, 4); return f; }
static inline vf all(float x) { return x - vf{}; }  // not x + 0, which would have to be computed: it makes 0 of -0
// Keeps the compiler from loading a vector again for each of its uses.
static inline vf once(vf v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }
// A bit for each lane where a is above b.
static inline uint32_t above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < VL; i++) bits |= (uint32_t)(a[i] > b[i]) << i;
  return bits;
#endif
}
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
static inline __attribute__((always_inline)) void sums(const vf* v, float* out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // The same additions, but lanes stay in their half of a vector until the last step: crossing costs more than adding.
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 8) {
    auto at = [&](int j) { return (__m256)v[i + j < N ? i + j : N - 1]; };
    __m256 half[4], quarter[2];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      half[j] = _mm256_permute2f128_ps(at(2 * j), at(2 * j + 1), 0x20) + _mm256_permute2f128_ps(at(2 * j), at(2 * j + 1), 0x31);
    for (int j = 0; j < 2; j++)
      quarter[j] = _mm256_shuffle_ps(half[2 * j], half[2 * j + 1], 0x44) + _mm256_shuffle_ps(half[2 * j], half[2 * j + 1], 0xee);
    __m256 whole = _mm256_shuffle_ps(quarter[0], quarter[1], 0x88) + _mm256_shuffle_ps(quarter[0], quarter[1], 0xdd);
    _mm256_storeu_ps(out + i, _mm256_permutevar8x32_ps(whole, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
#else
  constexpr int M = (N + 1) / 2;
  vf folded[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
    folded[i] = fold<HALF>(v[2 * i], v[2 * i + 1 < N ? 2 * i + 1 : 2 * i], std::make_integer_sequence<int, VL>());
  if constexpr (HALF > 1) sums<M, HALF / 2>(folded, out);
  else
    for (int i = 0; i < M; i++) store(out + i * VL, folded[i]);
#endif
}
static inline float sum(vf v) { float s[VL]; sums<1>(&v, s); return s[0]; }
static inline float most_of(vf v) {
  float s[VL]; store(s, v);
  for (int half = VL / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
  return s[0];
}
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
// The same for a vector of numbers that are not positive; of those below -87, -inf too, it is 0.
static inline vf exps(vf x) {
  constexpr float rounding = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  vf t = fma(x, all(1.44269504088896341f), all(rounding)), n = t - rounding, r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  vf p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = fma(p, r, all(c));
  p = fma(p * r, r, r) + 1.0f;
  vf scale = (vf)(((vi)t << 23) + 0x3f800000);
  return x < -87.0f ? vf{} : p * scale;
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
      vf a = once(load(x[m] + i));
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) acc[m * NR + n] = fma(a, b[n], acc[m * NR + n]);
    }
  }
  float s[(TM * NR + VL - 1) / VL * VL];
  sums<TM * NR>(acc, s);
  for (; i < k; i++)
    for (int m = 0; m < TM; m++)
      for (int n = 0; n < NR; n++) s[m * NR + n] = __builtin_fmaf(x[m][i], scalar(w + n * ldw + i), s[m * NR + n]);
  for (int m = 0; m < TM; m++) memcpy(out + m * ldo, s + m * NR, NR * sizeof(float));
}

// NR rows of w against m rows of x, in tiles of at most six, of about one size.
template <int NR, class W>
static inline void dot_rows(const float* const* x, long m, const W* w, long ldw, long k, float* out, long ldo) {
  constexpr long MOST = 6;
  auto tile = [&](auto count, auto first) {
    dot_tile<count, NR, first, W>(x, w, ldw, k, out, ldo);
    x += count;
    out += count * ldo;
  };
  auto step = [&](auto first) {
    long tiles = (m + MOST - 1) / MOST, count = (m + tiles - 1) / tiles;
    switch (count) {
      case 6: tile(std::integral_constant<int, 6>(), first); break;
      case 5: tile(std::integral_constant<int, 5>(), first); break;
      case 4: tile(std::integral_constant<int, 4>(), first); break;
      case 3: tile(std::integral_constant<int, 3>(), first); break;
      case 2: tile(std::integral_constant<int, 2>(), first); break;
      case 1: tile(std::integral_constant<int, 1>(), first); break;
    }
    m -= count;
  };
  if (m) step(std::true_type());
  while (m) step(std::false_type());
}

// m rows of x (pointers) with n rows of w. Tile sizes keep eight accumulators or more in flight. Every tile sums a dot product
// in the same order, so a row's result does not depend on the rows beside it.
template <class W>
static inline void dot_block(const float* const* x, long m, const W* w, long ldw, long n, long k, float* out, long ldo) {
  constexpr int WIDE = VB == 64 ? 8 : 6;  // rows of x that stay in cache, with their accumulators in registers
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
  if (m == 3)
    for (; j + 4 <= n; j += 4) dot_tile<3, 4, true, W>(x, w + j * ldw, ldw, k, out + j, ldo);
  for (; j + 2 <= n; j += 2) dot_rows<2, W>(x, m, w + j * ldw, ldw, k, out + j, ldo);
  for (; j < n; j++) dot_rows<1, W>(x, m, w + j * ldw, ldw, k, out + j, ldo);
}
