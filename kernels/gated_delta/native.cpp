// Gated delta rule over state slots with a replay ring; see reference.py for the mathematics.
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

// Replays a head's ring up to position upto.
static void replay(const Delta& a, long slot, long h, long upto) {
  long kd = a.key_dim, vd = a.value_dim, group = h / (a.value_heads / a.key_heads);
  for (long p = a.position[slot]; p < upto; p++) {
    long entry = slot * a.ring + p % a.ring;
    apply(a.slot_state(slot, h), a.key + (entry * a.key_heads + group) * kd, a.delta + (entry * a.value_heads + h) * vd,
          a.decay[entry * a.value_heads + h], kd, vd);
  }
}

extern "C" void divisi_gated_delta_flush(const Delta* layer, const int32_t* slots, const int32_t* upto, long n) {
  const Delta& a = *layer;
#pragma omp parallel for num_threads(a.threads) schedule(static) collapse(2)
  for (long i = 0; i < n; i++)
    for (long h = 0; h < a.value_heads; h++) replay(a, slots[i], h, upto[i]);
  for (long i = 0; i < n; i++)
    if (a.position[slots[i]] < upto[i]) a.position[slots[i]] = upto[i];
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
        if (starts[s] == starts[s + 1]) continue;
        long group = h / (a.value_heads / a.key_heads), base = slots[s] * a.ring;
        replay(a, slots[s], h, lengths[s]);
        const float *state = a.slot_state(slots[s], h), *now = state;
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
    for (long s = 0; s < sequences; s++)
      if (starts[s] < starts[s + 1]) a.position[slots[s]] = lengths[s];
  }
}

// Runs of rows, each from the state of its source (zero where that is -1), leaving states at positions in other slots. The
// state is carried in the slot that the run leaves next, so that it is stored once for each and never rounded or copied out.
extern "C" void divisi_gated_delta_prefill(const Delta* layer, const float* rows, float* mixed, float* out, const int32_t* starts,
                                           const int32_t* lengths, const int32_t* sources, const int32_t* leaf_starts,
                                           const int32_t* leaf_positions, const int32_t* leaf_slots, long runs) {
  const Delta& a = *layer;
  long kd = a.key_dim, vd = a.value_dim, c = a.channels(), kx = a.key_heads * kd, x = a.value_heads * vd;
  // conv input `back` tokens before position p of run s: of the call's rows, of the source's ring, or none
  auto input = [&](long s, long p, long back) -> const float* {
    long at = p - back, first = lengths[s];
    if (at >= first) return rows + (starts[s] + at - first) * a.row_width();
    return at < 0 ? nullptr : a.conv + (sources[s] * a.ring + at % a.ring) * c;
  };
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> u(vd), sq(vd);
    for (long s = 0; s < runs; s++)
#pragma omp for schedule(static) nowait
      for (long t = starts[s]; t < starts[s + 1]; t++)
        mix_row(a, [&](long back) { return input(s, lengths[s] + t - starts[s], back); }, mixed + t * c);
#pragma omp barrier
#pragma omp for schedule(dynamic) collapse(2)
    for (long s = 0; s < runs; s++)
      for (long h = 0; h < a.value_heads; h++) {
        const float *k = mixed + kx + h / (a.value_heads / a.key_heads) * kd;
        const float *before = sources[s] < 0 ? nullptr : a.slot_state(sources[s], h);
        long t = starts[s];
        for (long i = leaf_starts[s]; i < leaf_starts[s + 1]; i++) {
          float* state = a.slot_state(leaf_slots[i], h);
          if (before) memcpy(state, before, kd * vd * sizeof(float));
          else memset(state, 0, kd * vd * sizeof(float));
          for (long end = starts[s] + leaf_positions[i] - lengths[s]; t < end; t++) {
            float g;
            read_head(a, state, rows + t * a.row_width(), mixed + t * c, h, u.data(), &g, sq.data(), out + t * x);
            apply(state, k + t * c, u.data(), g, kd, vd);
          }
          before = state;
        }
      }
  }
  for (long s = 0; s < runs; s++)
    for (long i = leaf_starts[s]; i < leaf_starts[s + 1]; i++) {
      long p = leaf_positions[i], slot = leaf_slots[i];
      for (long back = 1; back < a.num_taps && back <= p; back++)
        memcpy(a.conv + (slot * a.ring + (p - back) % a.ring) * c, input(s, p, back), c * sizeof(float));
      a.position[slot] = (int32_t)p;
    }
}
