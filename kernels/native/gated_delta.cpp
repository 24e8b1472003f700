// Gated delta rule over state slots with a replay ring; see gated_delta/reference.py for the mathematics.
//
// Decode and prefill run the same arithmetic per token, so a prompt cut into chunks anywhere, or decoded token by token,
// gives the same bits.
#include "simd.h"
#include <vector>

struct Delta {  // one layer; field order is that of _Delta in native/ops.py
  float *state, *conv, *key, *delta, *decay;
  int32_t* position;
  const float *taps, *rate, *dt_bias, *norm;
  long ring, num_taps, key_heads, key_dim, value_heads, value_dim;
  float eps;
  int threads;
  long channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  long row_width() const { return channels() + value_heads * value_dim + 2 * value_heads; }
  float* slot_state(long slot, long h) const { return state + (slot * value_heads + h) * key_dim * value_dim; }
};

// Causal conv, SiLU, unit-length q and k of one row into mixed [channels]; input(back) is the conv input `back` tokens ago.
template <class Input>
static void mix_row(const Delta& a, Input input, float* mixed) {
  long c = a.channels();
  memset(mixed, 0, c * sizeof(float));
  for (long tap = 0; tap < a.num_taps; tap++) {
    const float* in = input(a.num_taps - 1 - tap);
    if (!in) continue;  // before the sequence's beginning
    const float* w = a.taps + tap * c;
    for (long i = 0; i < c; i++) mixed[i] += w[i] * in[i];
  }
  for (long i = 0; i < c; i++) mixed[i] = silu(mixed[i]);
  for (long g = 0; g < 2 * a.key_heads; g++) {
    float* v = mixed + g * a.key_dim;
    float s = 0;
    for (long i = 0; i < a.key_dim; i++) s += v[i] * v[i];
    float f = 1.0f / sqrtf(s + 1e-6f);
    if (g < a.key_heads) f /= sqrtf((float)a.key_dim);
    for (long i = 0; i < a.key_dim; i++) v[i] *= f;
  }
}

static inline void apply(float* s, const float* k, const float* u, float g, long kd, long vd) {
  for (long i = 0; i < kd; i++) {
    float f = k[i];
    for (long j = 0; j < vd; j++) s[i * vd + j] = g * s[i * vd + j] + f * u[j];
  }
}

// One token of one head: delta u and gated, normalised output from the state before it.
static void read_head(const Delta& a, const float* s, const float* row, const float* mixed, long h, float* u, float* decay,
                      float* sq, float* out) {
  long kd = a.key_dim, vd = a.value_dim, x = a.value_heads * vd, group = h / (a.value_heads / a.key_heads);
  const float *q = mixed + group * kd, *k = q + a.key_heads * kd, *v = mixed + 2 * a.key_heads * kd + h * vd;
  const float *z = row + a.channels() + h * vd, *b = row + a.channels() + x;
  float beta = sigmoid(b[h]), dt = b[a.value_heads + h] + a.dt_bias[h];
  float g = expf(a.rate[h] * (dt > 20.0f ? dt : log1pf(expf(dt))));
  memset(u, 0, vd * sizeof(float));
  memset(sq, 0, vd * sizeof(float));
  float kq = 0;
  for (long i = 0; i < kd; i++) {
    float ki = k[i], qi = q[i];
    kq += ki * qi;
    for (long j = 0; j < vd; j++) { u[j] += s[i * vd + j] * ki; sq[j] += s[i * vd + j] * qi; }
  }
  float square = 0;
  for (long j = 0; j < vd; j++) {
    u[j] = beta * (v[j] - g * u[j]);
    sq[j] = g * sq[j] + kq * u[j];
    square += sq[j] * sq[j];
  }
  float f = 1.0f / sqrtf(square / vd + a.eps);
  for (long j = 0; j < vd; j++) out[h * vd + j] = sq[j] * f * a.norm[j] * silu(z[j]);
  *decay = g;
}

// mixed: scratch [rows, channels]; out [rows, value_heads * value_dim]
extern "C" void divisi_gated_delta_decode(const Delta* layer, const float* rows, float* mixed, float* out, const int32_t* starts,
                                          const int32_t* lengths, const int32_t* slots, long sequences) {
  const Delta& a = *layer;
  long kd = a.key_dim, vd = a.value_dim, c = a.channels(), kx = a.key_heads * kd, x = a.value_heads * vd;
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> copy(kd * vd), sq(vd);
#pragma omp for schedule(static)
    for (long s = 0; s < sequences; s++) {
      float* conv = a.conv + slots[s] * a.ring * c;
      for (long t = starts[s], p = lengths[s]; t < starts[s + 1]; t++, p++) {
        memcpy(conv + p % a.ring * c, rows + t * a.row_width(), c * sizeof(float));
        mix_row(a, [&](long back) { return back > p ? nullptr : conv + (p - back) % a.ring * c; }, mixed + t * c);
        memcpy(a.key + (slots[s] * a.ring + p % a.ring) * kx, mixed + t * c + kx, kx * sizeof(float));
      }
    }
#pragma omp for schedule(static) collapse(2)
    for (long s = 0; s < sequences; s++)
      for (long h = 0; h < a.value_heads; h++) {
        long group = h / (a.value_heads / a.key_heads), base = slots[s] * a.ring;
        float* state = a.slot_state(slots[s], h);
        for (long p = a.position[slots[s]]; p < lengths[s]; p++) {
          long entry = base + p % a.ring;
          apply(state, a.key + entry * kx + group * kd, a.delta + entry * x + h * vd, a.decay[entry * a.value_heads + h], kd, vd);
        }
        const float* now = state;
        for (long t = starts[s], p = lengths[s]; t < starts[s + 1]; t++, p++) {
          long entry = base + p % a.ring;
          float* u = a.delta + entry * x + h * vd;
          float* g = a.decay + entry * a.value_heads + h;
          read_head(a, now, rows + t * a.row_width(), mixed + t * c, h, u, g, sq.data(), out + t * x);
          if (t + 1 == starts[s + 1]) break;  // nobody reads the state after the last row
          if (now == state) { memcpy(copy.data(), state, kd * vd * sizeof(float)); now = copy.data(); }
          apply(copy.data(), a.key + entry * kx + group * kd, u, *g, kd, vd);
        }
      }
#pragma omp for schedule(static)
    for (long s = 0; s < sequences; s++) a.position[slots[s]] = lengths[s];
  }
}

// A chunk of `tokens` rows from `slot` (zero state when length is 0) into `spare`; `slot` must stand at `length`.
extern "C" void divisi_gated_delta_prefill(const Delta* layer, const float* rows, float* mixed, float* out, long tokens, long slot,
                                           long spare, long length) {
  const Delta& a = *layer;
  long kd = a.key_dim, vd = a.value_dim, c = a.channels(), kx = a.key_heads * kd, x = a.value_heads * vd;
  const float* before = a.conv + slot * a.ring * c;
  auto input = [&](long t, long back) -> const float* {
    if (t >= back) return rows + (t - back) * a.row_width();
    return length + t < back ? nullptr : before + (length + t - back) % a.ring * c;
  };
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> u(vd), sq(vd);
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++)
      mix_row(a, [&](long back) { return input(t, back); }, mixed + t * c);
#pragma omp for schedule(dynamic)
    for (long h = 0; h < a.value_heads; h++) {
      float* state = a.slot_state(spare, h);
      if (length == 0) memset(state, 0, kd * vd * sizeof(float));
      else memcpy(state, a.slot_state(slot, h), kd * vd * sizeof(float));
      const float* k = mixed + kx + h / (a.value_heads / a.key_heads) * kd;
      for (long t = 0; t < tokens; t++) {
        float g;
        read_head(a, state, rows + t * a.row_width(), mixed + t * c, h, u.data(), &g, sq.data(), out + t * x);
        apply(state, k + t * c, u.data(), g, kd, vd);
      }
    }
  }
  float* after = a.conv + spare * a.ring * c;
  for (long back = 0; back + 1 < a.num_taps && back < length + tokens; back++)
    memcpy(after + (length + tokens - 1 - back) % a.ring * c, input(tokens - 1, back), c * sizeof(float));
  a.position[spare] = (int32_t)(length + tokens);
}
