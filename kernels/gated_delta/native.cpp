// Gated delta rule over state slots with a replay ring; see reference.py for the mathematics.
//
// Decode and prefill run the same arithmetic per token, so a prompt cut into chunks anywhere, or decoded token by token,
// gives the same bits.
#include "team.h"
#include <algorithm>
#include <vector>

struct Delta {  // one layer; field order is that of _Delta in native/delta.py
  float *state, *conv, *key, *delta, *decay;
  int32_t* position;
  const float *taps, *rate, *dt_bias, *norm;
  long ring, num_taps, key_heads, key_dim, value_heads, value_dim;
  float eps;
  long channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  long row_width() const { return channels() + value_heads * value_dim + 2 * value_heads; }
  float* slot_state(long slot, long h) const { return state + (slot * value_heads + h) * key_dim * value_dim; }
};

// Causal conv and SiLU of channels `from` to `to` of one row into mixed; input(back) is the conv input `back` tokens ago.
template <class Input>
static void convolve(const Delta& a, Input input, float* mixed, long from, long to) {
  long c = a.channels();
  memset(mixed + from, 0, (to - from) * sizeof(float));
  for (long tap = 0; tap < a.num_taps; tap++) {
    const float* in = input(a.num_taps - 1 - tap);
    if (!in) continue;  // before the sequence's beginning
    const float* w = a.taps + tap * c;
    for (long i = from; i < to; i++) mixed[i] += w[i] * in[i];
  }
  for (long i = from; i < to; i++) mixed[i] = silu(mixed[i]);
}

// Makes q and k of one row unit-length.
static void unit_length(const Delta& a, float* mixed) {
  for (long g = 0; g < 2 * a.key_heads; g++) {
    float* v = mixed + g * a.key_dim;
    float f = 1.0f / sqrtf(dot(v, v, a.key_dim) + 1e-6f);
    if (g < a.key_heads) f /= sqrtf((float)a.key_dim);
    for (long i = 0; i < a.key_dim; i++) v[i] *= f;
  }
}

struct Written { const float *k, *u; float g; };  // what a token makes of the state: g S + k u^T
struct Read { const float *k, *q, *v; float beta, g, kq; };  // what a token asks of the state before it

// Fused alike in every place, so that a state has the same bits whichever of them wrote it.
static inline vf applied(vf s, float k, vf u, float g) { return fma(all(k), u, s * g); }
static inline float applied(float s, float k, float u, float g) { return __builtin_fmaf(k, u, s * g); }

// `count` tokens of one head, one after the other, for some columns of the state at a time. Each passes over them once: what the
// token before it wrote is taken up (at first `last`, which may be null), and then it reads. Its delta goes to u, its output before
// the norm to out. The last token's delta is not taken up.
struct Scan {
  float* s;
  long kd, vd;
  Written last;
  const Read* tokens;
  long count;
  float *u, *out;
  long u_step, out_step;

  // C vectors of columns from j on.
  template <int C>
  void columns(long j) const {
    Written before = last;
    for (long t = 0; t < count; t++) {
      if (before.k) pass<C, true>(before, tokens[t], j, u + t * u_step, out + t * out_step);
      else pass<C, false>(before, tokens[t], j, u + t * u_step, out + t * out_step);
      before = {tokens[t].k, u + t * u_step, tokens[t].g};
    }
  }

  template <int C, bool LAST>
  void pass(const Written& before, const Read& token, long j, float* delta, float* o) const {
    vf sk[C]{}, sq[C]{}, written[C];
    for (int c = 0; LAST && c < C; c++) written[c] = load(before.u + j + c * VL);
    // Held by this function: what is stored could be the structs, for all that the compiler knows.
    const float *k = token.k, *q = token.q, *last = before.k;
    const float g = before.g;
    float* at = s + j;
    for (long i = 0, rows = kd, step = vd; i < rows; i++, at += step) {
      vf ki = all(k[i]), qi = all(q[i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        vf row = load(at + c * VL);
        if (LAST) store(at + c * VL, row = applied(row, last[i], written[c], g));
        sk[c] = fma(row, ki, sk[c]);
        sq[c] = fma(row, qi, sq[c]);
      }
    }
    for (int c = 0; c < C; c++) {
      vf d = fma(sk[c], all(-token.g), load(token.v + j + c * VL)) * token.beta;
      store(delta + j + c * VL, d);
      store(o + j + c * VL, fma(d, all(token.kq), sq[c] * token.g));
    }
  }

  void column(long j) const {
    Written before = last;
    for (long t = 0; t < count; t++) {
      const Read& token = tokens[t];
      float sk = 0, sq = 0;
      for (long i = 0; i < kd; i++) {
        float row = s[i * vd + j];
        if (before.k) s[i * vd + j] = row = applied(row, before.k[i], before.u[j], before.g);
        sk = __builtin_fmaf(row, token.k[i], sk);
        sq = __builtin_fmaf(row, token.q[i], sq);
      }
      float d = __builtin_fmaf(sk, -token.g, token.v[j]) * token.beta;
      u[t * u_step + j] = d;
      out[t * out_step + j] = __builtin_fmaf(d, token.kq, sq * token.g);
      before = {token.k, u + t * u_step, token.g};
    }
  }

  void run() const {  // two vectors of columns of 128 rows stay in the first cache
    long j = 0;
    for (; j + 2 * VL <= vd; j += 2 * VL) columns<2>(j);
    for (; j + VL <= vd; j += VL) columns<1>(j);
    for (; j < vd; j++) column(j);
  }
};

static void apply(float* s, const Written& token, long kd, long vd) {
  for (long i = 0; i < kd; i++) {
    long j = 0;
    for (; j + VL <= vd; j += VL) store(s + i * vd + j, applied(load(s + i * vd + j), token.k[i], load(token.u + j), token.g));
    for (; j < vd; j++) s[i * vd + j] = applied(s[i * vd + j], token.k[i], token.u[j], token.g);
  }
}

static Read asked(const Delta& a, const float* row, const float* mixed, long h) {
  long kd = a.key_dim, vd = a.value_dim, group = h / (a.value_heads / a.key_heads);
  const float *q = mixed + group * kd, *k = q + a.key_heads * kd, *b = row + a.channels() + a.value_heads * vd;
  float dt = b[a.value_heads + h] + a.dt_bias[h];
  float g = expf(a.rate[h] * (dt > 20.0f ? dt : log1pf(expf(dt))));
  return {k, q, mixed + 2 * a.key_heads * kd + h * vd, sigmoid(b[h]), g, dot(k, q, kd)};
}

// Norm and gate of one head's output.
static void finish(const Delta& a, const float* row, long h, float* out) {
  long vd = a.value_dim;
  const float* z = row + a.channels() + h * vd;
  float f = 1.0f / sqrtf(dot(out, out, vd) / vd + a.eps);
  for (long j = 0; j < vd; j++) out[j] = out[j] * f * a.norm[j] * silu(z[j]);
}

// What the ring holds of position p.
static Written entry_of(const Delta& a, long slot, long h, long p) {
  long kd = a.key_dim, vd = a.value_dim, group = h / (a.value_heads / a.key_heads), entry = slot * a.ring + p % a.ring;
  return {a.key + (entry * a.key_heads + group) * kd, a.delta + (entry * a.value_heads + h) * vd, a.decay[entry * a.value_heads + h]};
}

// Replays a head's ring up to position upto.
static void replay(const Delta& a, long slot, long h, long upto) {
  for (long p = a.position[slot]; p < upto; p++) apply(a.slot_state(slot, h), entry_of(a, slot, h, p), a.key_dim, a.value_dim);
}

extern "C" void divisi_gated_delta_flush(const Delta* layer, const int32_t* slots, const int32_t* upto, long n,
                                         int threads) {
  const Delta& a = *layer;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (n * a.value_heads * a.key_dim * a.value_dim > ALONE / 2)
  for (long i = 0; i < n; i++)
    for (long h = 0; h < a.value_heads; h++) replay(a, slots[i], h, upto[i]);
  for (long i = 0; i < n; i++)
    if (a.position[slots[i]] < upto[i]) a.position[slots[i]] = upto[i];
}

// mixed: scratch [rows, channels]; out [rows, value_heads * value_dim]
extern "C" void divisi_gated_delta_decode(const Delta* layer, const float* rows, float* mixed, float* out, const int32_t* starts,
                                          const int32_t* lengths, const int32_t* slots, long sequences, int threads) {
  const Delta& a = *layer;
  long kd = a.key_dim, vd = a.value_dim, c = a.channels(), kx = a.key_heads * kd, x = a.value_heads * vd;
  auto mix = [&](long i) {  // queries and keys of a sequence, and its values
    long s = i / 2, half = i % 2, from = half ? 2 * kx : 0, to = half ? c : 2 * kx;
    float* conv = a.conv + slots[s] * a.ring * c;
    for (long t = starts[s], p = lengths[s]; t < starts[s + 1]; t++, p++) {
      memcpy(conv + p % a.ring * c + from, rows + t * a.row_width() + from, (to - from) * sizeof(float));
      convolve(a, [&](long back) { return back > p ? nullptr : conv + (p - back) % a.ring * c; }, mixed + t * c, from, to);
      if (half) continue;
      unit_length(a, mixed + t * c);
      memcpy(a.key + (slots[s] * a.ring + p % a.ring) * kx, mixed + t * c + kx, kx * sizeof(float));
    }
  };
  auto advance = [&](long i) {  // one head of a sequence
    static thread_local std::vector<float> copy;
    long s = i / a.value_heads, h = i % a.value_heads, slot = slots[s], first = lengths[s];
    if (starts[s] == starts[s + 1]) return;
    float *state = a.slot_state(slot, h), *now = state;
    bool behind = a.position[slot] < first;
    if (behind) replay(a, slot, h, first - 1);  // the last one is taken up while the first row reads
    for (long t = starts[s], p = first; t < starts[s + 1]; t++, p++) {
      float *o = out + t * x + h * vd, *row = a.delta + (slot * a.ring + p % a.ring) * x + h * vd;
      Read token = asked(a, rows + t * a.row_width(), mixed + t * c, h);
      if (p == first + 1) { copy.assign(state, state + kd * vd); now = copy.data(); }
      bool take = p > first || behind;
      Written last = take ? entry_of(a, slot, h, p - 1) : Written{};
      Scan{now, kd, vd, last, &token, 1, row, o, 0, 0}.run();
      a.decay[(slot * a.ring + p % a.ring) * a.value_heads + h] = token.g;
      finish(a, rows + t * a.row_width(), h, o);
    }
  };
  in_phases(threads_for(8 * starts[sequences] * 2 * x * kd, threads),  // states often lie in no cache
            Phase{[&] { return 2 * sequences; }, mix}, Phase{[&] { return sequences * a.value_heads; }, advance});
  for (long s = 0; s < sequences; s++)
    if (starts[s] < starts[s + 1]) a.position[slots[s]] = lengths[s];
}

// A few rows of a run, which end where a state is left or before.
struct Piece {
  long run, row, count, leaf;
  long mixed;   // the first of its rows among those of its turn
  bool begins;  // and takes over the source's state, or that of the leaf before
};
constexpr long PIECE = 128, SLICE = 8;  // rows, and those whose conv is one thread's

// Pieces by turns: the n-th of every run, then the next ones. A run's piece, after its conv, stays in a cache of 1 MiB.
static void cut_runs(const int32_t* starts, const int32_t* lengths, const int32_t* leaf_starts, const int32_t* leaf_positions,
                     long runs, std::vector<std::vector<Piece>>& turns) {
  turns.clear();
  for (long s = 0; s < runs; s++) {
    size_t turn = 0;
    long row = starts[s];
    for (long leaf = leaf_starts[s]; leaf < leaf_starts[s + 1]; leaf++) {
      long end = starts[s] + leaf_positions[leaf] - lengths[s];
      for (bool begins = true; begins || row < end; begins = false) {
        if (turn == turns.size()) turns.emplace_back();
        std::vector<Piece>& beside = turns[turn++];
        long count = std::min(PIECE, end - row), mixed = beside.empty() ? 0 : beside.back().mixed + beside.back().count;
        beside.push_back({s, row, count, leaf, mixed, begins});
        row += count;
      }
    }
  }
}

// Runs of rows, each from the state of its source (zero where that is -1), leaving states at positions in other slots. The
// state is carried in the slot that the run leaves next, so that it is stored once for each and never rounded or copied out.
// mixed: scratch [rows, channels].
extern "C" void divisi_gated_delta_prefill(const Delta* layer, const float* rows, float* mixed, float* out, const int32_t* starts,
                                           const int32_t* lengths, const int32_t* sources, const int32_t* leaf_starts,
                                           const int32_t* leaf_positions, const int32_t* leaf_slots, long runs, int threads) {
  const Delta& a = *layer;
  long kd = a.key_dim, vd = a.value_dim, c = a.channels(), x = a.value_heads * vd;
  // conv input `back` tokens before position p of run s: of the call's rows, of the source's ring, or none
  auto input = [&](long s, long p, long back) -> const float* {
    long at = p - back, first = lengths[s];
    if (at >= first) return rows + (starts[s] + at - first) * a.row_width();
    return at < 0 ? nullptr : a.conv + (sources[s] * a.ring + at % a.ring) * c;
  };
  auto mix = [&](const Piece& piece, long slice) {
    for (long r = slice * SLICE; r < std::min(piece.count, (slice + 1) * SLICE); r++) {
      float* to = mixed + (piece.mixed + r) * c;
      long p = lengths[piece.run] + piece.row + r - starts[piece.run];
      convolve(a, [&](long back) { return input(piece.run, p, back); }, to, 0, c);
      unit_length(a, to);
    }
  };
  auto scan = [&](const Piece& piece, long h) {
    static thread_local std::vector<float> u;
    static thread_local std::vector<Read> tokens;
    long n = piece.count, before = piece.leaf == leaf_starts[piece.run] ? sources[piece.run] : leaf_slots[piece.leaf - 1];
    float *state = a.slot_state(leaf_slots[piece.leaf], h), *o = out + piece.row * x + h * vd;
    if (piece.begins && before < 0) memset(state, 0, kd * vd * sizeof(float));
    else if (piece.begins) memcpy(state, a.slot_state(before, h), kd * vd * sizeof(float));
    if (!n) return;
    const float *row = rows + piece.row * a.row_width(), *from = mixed + piece.mixed * c;
    u.resize(n * vd);
    tokens.clear();
    for (long r = 0; r < n; r++) tokens.push_back(asked(a, row + r * a.row_width(), from + r * c, h));
    Scan{state, kd, vd, {}, tokens.data(), n, u.data(), o, vd, x}.run();
    for (long r = 0; r < n; r++) finish(a, row + r * a.row_width(), h, o + r * x);
    apply(state, {tokens[n - 1].k, &u[(n - 1) * vd], tokens[n - 1].g}, kd, vd);
  };
  static thread_local std::vector<std::vector<Piece>> cut;
  cut_runs(starts, lengths, leaf_starts, leaf_positions, runs, cut);
  const auto& turns = cut;  // the calling thread's
#pragma omp parallel num_threads(threads) if (starts[runs] * a.value_heads * 2 * kd * vd > ALONE / 2)
  for (const std::vector<Piece>& turn : turns) {
    long pieces = (long)turn.size();
#pragma omp for schedule(dynamic) collapse(2)
    for (long i = 0; i < pieces; i++)
      for (long slice = 0; slice < PIECE / SLICE; slice++) mix(turn[i], slice);
#pragma omp for schedule(dynamic) collapse(2)
    for (long i = 0; i < pieces; i++)
      for (long h = 0; h < a.value_heads; h++) scan(turn[i], h);
  }
  for (long s = 0; s < runs; s++)
    for (long i = leaf_starts[s]; i < leaf_starts[s + 1]; i++) {
      long p = leaf_positions[i], slot = leaf_slots[i];
      for (long back = 1; back < a.num_taps && back <= p; back++)
        memcpy(a.conv + (slot * a.ring + (p - back) % a.ring) * c, input(s, p, back), c * sizeof(float));
      a.position[slot] = (int32_t)p;
    }
}
