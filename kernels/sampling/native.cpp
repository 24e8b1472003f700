// Draws a token from each row of logits, as reference.py tells: temperature, min_p, top_k, top_p, then the Gumbel-max.
#include "team.h"
#include <algorithm>
#include <vector>

static inline uint64_t splitmix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
static inline uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct Key { uint32_t low, high; };
static inline Key key_of(uint64_t seed, int64_t position) {
  uint64_t counter = ((uint64_t)position + 1) * 0xD1B54A32D192ED03ull;
  uint64_t hashed = splitmix64(splitmix64(seed + 0x9E3779B97F4A7C15ull) ^ counter);
  return {(uint32_t)hashed, (uint32_t)(hashed >> 32)};
}

// The natural logarithm of a positive, normal number, to 1e-10 of itself; branch-free, in 64-bit lanes only.
static inline double log_of(double x) {
  uint64_t u; memcpy(&u, &x, 8);
  uint64_t shifted = u - 0x3FE6A09E00000000ull;  // sqrt(1/2), so that the mantissa lies around 1
  uint64_t biased = (shifted + 0x3FF0000000000000ull) >> 52 | 0x4330000000000000ull;  // 2^52 + 1023 + exponent
  double exponent; memcpy(&exponent, &biased, 8);
  exponent -= 4503599627370496.0 + 1023.0;
  uint64_t mantissa = (u - (shifted & 0xFFF0000000000000ull));
  double m; memcpy(&m, &mantissa, 8);
  double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 13;
  p = p * z + 1.0 / 11; p = p * z + 1.0 / 9; p = p * z + 1.0 / 7; p = p * z + 1.0 / 5; p = p * z + 1.0 / 3; p = p * z + 1.0;
  return exponent * 0.69314718055994530942 + 2.0 * s * p;
}

static inline float gumbel(Key key, uint32_t token) {
  uint32_t bits = lowbias32(lowbias32(token ^ key.low) ^ key.high) & 0x7FFFFFFFu;
  float v = ((float)(int32_t)bits + 0.5f) * 0x1p-31f;
  v = v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
  float e = (float)-log_of(1.0 - (double)v);
  return (float)-log_of((double)e);
}

extern "C" void divisi_noise(const int64_t* seeds, const int64_t* positions, float* out, long rows, long vocab) {
  for (long r = 0; r < rows; r++) {
    Key key = key_of((uint64_t)seeds[r], positions[r]);
    for (long i = 0; i < vocab; i++) out[r * vocab + i] = gumbel(key, (uint32_t)i);
  }
}

constexpr long BLOCK = 512;       // tokens whose noise is made at once
constexpr float MOST = 22.25f;    // noise is never more
constexpr long BINS = 2048;       // of 1/64 below the best; the last one holds the rest

// One row under its parameters.
struct Row {
  const float* logits;
  long vocab;
  Key key;
  float best, temperature, log_min_p;

  float scaled(long i) const {
    float x = (logits[i] - best) / temperature;
    return x < log_min_p ? -INFINITY : x;
  }

  // Over the whole vocabulary. A block in which no token could still win has its noise left out.
  long plain() const {
    float top = -INFINITY, x[BLOCK], noise[BLOCK];
    long chosen = 0;
    for (long at = 0; at < vocab; at += BLOCK) {
      long n = vocab - at < BLOCK ? vocab - at : BLOCK;
      float most = -INFINITY;
      for (long i = 0; i < n; i++) { x[i] = scaled(at + i); most = x[i] > most ? x[i] : most; }
      if (!(most + MOST > top)) continue;
      for (long i = 0; i < n; i++) noise[i] = gumbel(key, (uint32_t)(at + i));
      for (long i = 0; i < n; i++) x[i] += noise[i];
      for (long i = 0; i < n; i++) if (x[i] > top) { top = x[i]; chosen = at + i; }
    }
    return chosen;
  }

  static long bin_of(float x) { return x > -(float)(BINS - 1) / 64 ? (long)(-64.0f * x) : BINS - 1; }

  // Among what the filters keep. Tokens are ranked from the best bin on, until they hold all that is kept.
  long filtered(long top_k, double top_p) const {
    static thread_local std::vector<float> x;
    static thread_local std::vector<std::pair<float, int32_t>> ranked;
    x.resize(vocab);
    long count[BINS] = {};
    double mass[BINS] = {}, total = 0;
    for (long i = 0; i < vocab; i++) x[i] = scaled(i);
    for (long i = 0; i < vocab; i++) {
      long bin = bin_of(x[i]);
      count[bin]++;
      mass[bin] += fast_exp(x[i]) * (x[i] > -87.0f);
    }
    for (long b = 0; b < BINS; b++) total += mass[b];
    long k = top_k > 0 && top_k < vocab ? top_k : vocab, taken = 0, last = 0;
    double held = 0;
    bool ranks = top_k > 0 && top_k <= vocab;
    for (; last < BINS; last++) {
      taken += count[last], held += mass[last];
      if (taken >= k || (!ranks && top_p < 1 && held > top_p * total * (1 + 1e-6))) break;
    }
    ranked.clear();
    for (long i = 0; i < vocab; i++)
      if (bin_of(x[i]) <= last) ranked.push_back({x[i], (int32_t)i});
    std::sort(ranked.begin(), ranked.end(), [](auto a, auto b) { return a.first > b.first || (a.first == b.first && a.second < b.second); });
    if ((long)ranked.size() > k) ranked.resize(k);
    if (ranks) {
      total = 0;
      for (auto [value, token] : ranked) total += std::exp((double)value);
    }
    double wanted = top_p < 1 ? top_p * total : INFINITY, before = 0;
    float top = -INFINITY;
    long chosen = ranked.front().second;
    for (size_t rank = 0; rank < ranked.size(); rank++) {
      auto [value, token] = ranked[rank];
      if (rank && !(before < wanted)) break;
      before += std::exp((double)value);
      float score = value + gumbel(key, (uint32_t)token);
      if (score > top) { top = score; chosen = token; }
    }
    return chosen;
  }
};

static long best_of(const float* logits, long vocab) {
  long best = 0;
  for (long at = 0; at < vocab; at += BLOCK) {  // most blocks hold no better one
    long end = vocab - at < BLOCK ? vocab : at + BLOCK;
    float most = -INFINITY;
    for (long i = at; i < end; i++) most = logits[i] > most ? logits[i] : most;
    if (most > logits[best]) best = std::find(logits + at, logits + end, most) - logits;
  }
  return best;
}

// temperature 0: the best token, the lowest id among equals
extern "C" void divisi_choose(const float* logits, long stride, long vocab, const int64_t* positions, const int64_t* seeds,
                              const float* temperature, const int64_t* top_k, const double* top_p, const float* log_min_p,
                              int64_t* tokens, long rows, int threads) {
  share(rows > 1 ? threads_for(4 * rows * vocab, threads) : 1, rows, [&](long r) {
    const float* own = logits + r * stride;
    long best = best_of(own, vocab);
    tokens[r] = best;
    if (!(temperature[r] > 0) || !(own[best] > -INFINITY)) return;
    Row row{own, vocab, key_of((uint64_t)seeds[r], positions[r]), own[best], temperature[r], log_min_p[r]};
    tokens[r] = top_k[r] > 0 || top_p[r] < 1 ? row.filtered(top_k[r], top_p[r]) : row.plain();
  });
}
