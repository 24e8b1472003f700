// A pass through all layers in one call, where the experts are in this process: for steps of few rows, which take longer to be
// called layer by layer than to be computed. The parts are those of the other files, so the bits are theirs.
#include "layers.h"
#include "team.h"
#include <chrono>

struct Layer {  // one of two mixers; without a router, `shared` is a dense layer behind `norm`
  const DeltaLayer* delta;
  const AttentionLayer* attention;
  const Router* router;
  Norm norm;
  Experts shared, routed;
};
struct Rows {
  const int64_t* tokens;
  const int32_t *positions, *kv_rows, *starts, *lengths, *slots, *pages;
  long max_pages, count, sequences;
};
struct Model {
  Matrix embedding;
  const float* rotations;  // of each position, `rotary` wide
  long rotary;
  const Layer* layers;
  long count;
  Norm last;
  Matrix head;
  const DraftEntry* drafts;
};
struct Draws {  // how each row's token is drawn, see sampling/
  const int64_t* seeds;
  const float* temperature;
  const int64_t* top_k;
  const double* top_p;
  const float* log_min_p;
};
enum Part { MIXER, ROUTER, SHARED, EXPERTS, DRAFT, SAMPLING, OTHER };

// Charges the time since the last lap to a part of the pass.
struct Clock {
  double* seconds;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  void lap(Part part) {
    auto now = std::chrono::steady_clock::now();
    seconds[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

static void mlp(const Experts& e, const float* x, float* y, long t, int threads) {
  long d = e.down.outputs, f = e.down.inputs;
#if defined(__AVX512BF16__)
  if (e.down.format == PACKED)
    return divisi_packed_experts(x, nullptr, nullptr, e.leaves, e.gate_up.values, e.down.values, y, t, 1, d, f, 1, threads);
#endif
  divisi_mlp(x, e.gate_up.values, e.down.values, e.down.format == BF16, y, t, d, f, threads);
}

static void experts(const Experts& e, const float* x, const int32_t* ids, const float* gates, float* y, long t, long k,
                    int threads) {
  long d = e.down.outputs, f = e.down.inputs;
#if defined(__AVX512BF16__)
  if (e.down.format == PACKED)
    return divisi_packed_experts(x, ids, gates, e.leaves, e.gate_up.values, e.down.values, y, t, k, d, f, e.count, threads);
#endif
  float *inner = scratch<0>(t * k * f), *parts = scratch<1>(t * k * d);
  divisi_experts(x, ids, gates, e.leaves, e.gate_up.values, e.down.values, e.down.format == BF16, inner, parts, y, t, k, d, f,
                 e.count, threads);
}

static void mix(const Layer& layer, const Rows& r, const float* cos_sin, float* residual, const float* update, float* mixed,
                int threads) {
  if (layer.delta)
    return divisi_delta_layer(layer.delta, residual, update, r.starts, r.lengths, r.slots, mixed, r.count, r.sequences, threads);
  divisi_attention_layer(layer.attention, residual, update, cos_sin, r.kv_rows, r.starts, r.lengths, r.pages, r.max_pages, mixed,
                         r.count, r.sequences, threads);
}

// Adds the mixer's output to the residual; what the layer adds next goes to update.
static void feed(const Layer& layer, float* residual, const float* mixed, float* update, long t, Clock& clock, int threads) {
  long d = layer.shared.down.outputs;
  float *x = scratch<2>(t * d), *shared = scratch<3>(t * d), *routed = scratch<4>(t * d);
  if (!layer.router) {
    normed(layer.norm, residual, mixed, x, t, d, threads);
    mlp(layer.shared, x, update, t, threads);
    return clock.lap(EXPERTS);
  }
  const Router& router = *layer.router;
#if defined(__AVX512BF16__)
  if (router.in.weight.format == PACKED && layer.shared.down.format == PACKED && layer.routed.down.format == PACKED) {
    normed(router.in.norm, residual, mixed, x, t, d, threads);
    divisi_packed_mixture(layer.router, &layer.shared, &layer.routed, x, update, t, threads);
    return clock.lap(EXPERTS);
  }
#endif
  long width = router.in.weight.outputs, k = router.chosen;
  float *logits = scratch<5>(t * width), *gates = scratch<6>(t * k);
  int32_t* ids = scratch<0, int32_t>(t * k);
  divisi_norm_route(layer.router, residual, mixed, x, logits, ids, gates, t, threads);
  clock.lap(ROUTER);
  mlp(layer.shared, x, shared, t, threads);
  clock.lap(SHARED);
  experts(layer.routed, x, ids, gates, routed, t, k, threads);
  divisi_add_shared(routed, shared, logits + width - 1, width, update, t, d, threads);
  clock.lap(EXPERTS);
}

static const float* rotations_of(const Model& model, const Rows& r) {
  float* found = scratch<11>(r.count * model.rotary);
  for (long i = 0; i < r.count; i++)
    memcpy(found + i * model.rotary, model.rotations + r.positions[i] * model.rotary, model.rotary * sizeof(float));
  return found;
}

// How many threads are worth a crew: one for what is computed before others have taken notice. Other formats' operations make
// teams of their own.
static int crew_of(const Model& model, long t, int threads) {
  const Layer& first = model.layers[0];
  const Matrix& in = first.delta ? first.delta->in.weight : first.attention->in.weight;
  return model.head.format == PACKED && in.format == PACKED && t * in.outputs * in.inputs > ALONE ? threads : 1;
}

// residual [t, d] through all layers; h is the last norm's output.
static void run_layers(const Model& model, const Rows& r, const float* cos_sin, float* residual, float* h, Clock& clock,
                       int threads) {
  long t = r.count, d = model.embedding.inputs;
  float *mixed = scratch<7>(t * d), *update = scratch<8>(t * d);
  for (long i = 0; i < model.count; i++) {
    mix(model.layers[i], r, cos_sin, residual, i ? update : nullptr, mixed, threads);
    clock.lap(MIXER);
    feed(model.layers[i], residual, mixed, update, t, clock, threads);
  }
  normed(model.last, residual, update, h, t, d, threads);
}

// The token after each row.
static void draw(const Rows& r, const float* logits, long vocab, const Draws& draws, int64_t* tokens, int threads) {
  int64_t* positions = scratch<1, int64_t>(r.count);
  for (long row = 0; row < r.count; row++) positions[row] = r.positions[row] + 1;
  divisi_choose(logits, vocab, vocab, positions, draws.seeds, draws.temperature, draws.top_k, draws.top_p, draws.log_min_p, tokens,
                r.count, threads);
}

// Of the full model: logits of all rows, or what is drawn from them. Where it drafts, h and the rows' entries are kept.
static void full_pass(const Model* model, const Rows* rows, float* logits, const Draws* draws, int64_t* tokens, double* seconds,
                      int threads) {
  const Rows& r = *rows;
  long t = r.count, d = model->embedding.inputs, vocab = model->head.outputs;
  if (draws) logits = scratch<14>(t * vocab);
  float *residual = scratch<9>(t * d), *h = scratch<10>(t * d);
  Clock clock{seconds};
  embed(model->embedding, r.tokens, residual, t);
  const float* cos_sin = rotations_of(*model, r);
  clock.lap(OTHER);
  run_layers(*model, r, cos_sin, residual, h, clock, threads);
  if (model->drafts) {
    divisi_draft_record(model->drafts, r.tokens, h, cos_sin, r.kv_rows, r.starts, r.lengths, r.slots, t, r.sequences, threads);
    clock.lap(DRAFT);
  }
  product(h, model->head, logits, t, threads);
  clock.lap(OTHER);
  if (!draws) return;
  draw(r, logits, vocab, *draws, tokens, threads);
  clock.lap(SAMPLING);
}
extern "C" void divisi_full_pass(const Model* model, const Rows* rows, float* logits, const Draws* draws, int64_t* tokens,
                                 double* seconds, int threads) {
  Crew::lead(crew_of(*model, rows->count, threads), [&] { full_pass(model, rows, logits, draws, tokens, seconds, threads); });
}

// Of the layers that draft, from h of the pass before, or null: h is what the next pass goes on from.
extern "C" void divisi_draft_pass(const Model* model, const Rows* rows, float* before, float* h, float* logits, double* seconds,
                                  int threads) {
  const Rows& r = *rows;
  float* residual = scratch<9>(r.count * model->embedding.inputs);
  Clock clock{seconds};
  divisi_draft_input(model->drafts, r.tokens, before, r.starts, r.lengths, r.slots, residual, r.count, r.sequences, threads);
  clock.lap(DRAFT);
  run_layers(*model, r, rotations_of(*model, r), residual, h, clock, threads);
  product(h, model->head, logits, r.count, threads);
  clock.lap(DRAFT);
}

static void draft_passes(const Model* model, const Rows* first, const int64_t* counts, long count, const Draws* draws,
                         int64_t* tokens, double* each, double* seconds, int threads) {
  long t = first->count, d = model->embedding.inputs, vocab = model->head.outputs, page_size = model->drafts->pool.page_size;
  float *turns[] = {scratch<12>(t * d), scratch<13>(t * d)}, *logits = scratch<14>(t * vocab), *before = nullptr;
  int32_t *positions = scratch<1, int32_t>(t), *kv_rows = scratch<2, int32_t>(t);
  Rows r = *first;
  for (long i = 0; i < count; i++) {
    auto begin = std::chrono::steady_clock::now();
    r.count = r.sequences = counts[i];
    for (long row = 0; i && row < r.count; row++) {
      long at = positions[row] = first->positions[row] + i;
      kv_rows[row] = first->pages[row * first->max_pages + at / page_size] * page_size + at % page_size;
    }
    if (i) r.tokens = tokens + (i - 1) * t, r.positions = r.lengths = positions, r.kv_rows = kv_rows;
    float* h = turns[i % 2];
    divisi_draft_pass(model, &r, before, h, logits, seconds, threads);
    Clock clock{seconds};
    draw(r, logits, vocab, *draws, tokens + i * t, threads);
    clock.lap(SAMPLING);
    before = h;
    each[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
}

// All draft passes of a step: the rows of each are the first of those before it, a position further, and go on from what these
// drew. counts: rows of each; tokens: [count, rows of the first pass]; each: seconds that the passes take, one by one.
extern "C" void divisi_draft_passes(const Model* model, const Rows* first, const int64_t* counts, long count, const Draws* draws,
                                    int64_t* tokens, double* each, double* seconds, int threads) {
  Crew::lead(crew_of(*model, first->count, threads),
             [&] { draft_passes(model, first, counts, count, draws, tokens, each, seconds, threads); });
}
