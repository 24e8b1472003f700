// What stands around a layer's mixer and its experts, in one call each, for steps of few rows: these take longer to be
// called than to be computed. The parts are those of the other files, so the bits are theirs.
#include "layers.h"

// residual += update (unless null); x = its norm, y = x . w
static void project(const Projection& in, float* residual, const float* update, float* x, float* y, long t, int threads) {
  normed(in.norm, residual, update, x, t, in.weight.inputs, threads);
  product(x, in.weight, y, t, threads);
}

static float* projected(const Projection& in, float* residual, const float* update, long t, int threads) {
  float *x = scratch<0>(t * in.weight.inputs), *rows = scratch<1>(t * in.weight.outputs);
  project(in, residual, update, x, rows, t, threads);
  return rows;
}

extern "C" void divisi_delta_layer(const DeltaLayer* layer, float* residual, const float* update, const int32_t* starts,
                                   const int32_t* lengths, const int32_t* slots, float* y, long t, long sequences, int threads) {
  float* rows = projected(layer->in, residual, update, t, threads);
  float *mixed = scratch<2>(t * layer->channels), *out = scratch<3>(t * layer->out.inputs);
  divisi_gated_delta_decode(layer->delta, rows, mixed, out, starts, lengths, slots, sequences, threads);
  product(out, layer->out, y, t, threads);
}

extern "C" void divisi_attention_layer(const AttentionLayer* layer, float* residual, const float* update, const float* cos_sin,
                                       const int32_t* kv_rows, const int32_t* starts, const int32_t* lengths,
                                       const int32_t* pages, long max_pages, float* y, long t, long sequences, int threads) {
  const Pool& pool = layer->pool;
  const QkNorm& norm = layer->norm;
  long heads = layer->heads;
  float* rows = projected(layer->in, residual, update, t, threads);
  float *q = scratch<2>(t * layer->out.inputs), *out = scratch<3>(t * layer->out.inputs);
  divisi_attention_inputs(rows, cos_sin, norm.query, norm.key, norm.eps, pool.keys, pool.values, pool.is_bf16, kv_rows, q, t, heads,
                          pool.heads, pool.dim, layer->half, threads);
#if defined(__AVX512BF16__)
  if (layer->tiled)
    divisi_tiled_attention(q, rows, pool.keys, pool.values, pool.page_size, starts, lengths, pages, max_pages, layer->first, out,
                           sequences, heads, pool.heads, pool.dim, threads);
  else
#endif
    divisi_attention(q, rows, pool.keys, pool.values, pool.is_bf16, pool.page_size, starts, lengths, pages, max_pages, layer->first,
                     out, sequences, heads, pool.heads, pool.dim, threads);
  product(out, layer->out, y, t, threads);
}

// The logits have one column more: that of the shared expert's gate.
extern "C" void divisi_norm_route(const Router* router, float* residual, const float* update, float* x, float* logits, int32_t* ids,
                                  float* gates, long t, int threads) {
  project(router->in, residual, update, x, logits, t, threads);
  divisi_route(logits, router->in.weight.outputs, ids, gates, t, router->experts, router->chosen, router->normalise, threads);
}

// y = fc . [norm of each row's embedding | norm of h]
static void draft_input(const DraftInput& in, const int64_t* tokens, float* h, float* y, long t, int threads) {
  long d = in.embedding.inputs;
  float *embedded = scratch<0>(t * d), *both = scratch<1>(t * 2 * d);
  embed(in.embedding, tokens, embedded, t);
  for (long i = 0; i < t; i++) {
    normed(in.token, embedded + i * d, nullptr, both + i * 2 * d, 1, d, 1);
    normed(in.hidden, h + i * d, nullptr, both + i * 2 * d + d, 1, d, 1);
  }
  product(both, in.fc, y, t, threads);
}

// Keeps h of each row, unless null, and reads that of the position before it.
static void exchange(const DraftEntry& entry, const int32_t* starts, const int32_t* lengths, const int32_t* slots, const float* h,
                     float* before, long sequences, long d) {
  for (long s = 0; s < sequences; s++) {
    float* own = entry.hidden + slots[s] * entry.entries * d;
    for (long t = starts[s]; h && t < starts[s + 1]; t++)
      memcpy(own + (lengths[s] + t - starts[s]) % entry.entries * d, h + t * d, d * sizeof(float));
    for (long t = starts[s]; t < starts[s + 1]; t++)
      memcpy(before + t * d, own + (lengths[s] + t - starts[s] + entry.entries - 1) % entry.entries * d, d * sizeof(float));
  }
}

// A draft pass begins: from h of the pass before it, or null.
extern "C" void divisi_draft_input(const DraftEntry* entry, const int64_t* tokens, float* h, const int32_t* starts,
                                   const int32_t* lengths, const int32_t* slots, float* y, long t, long sequences, int threads) {
  long d = entry->input.embedding.inputs;
  if (!h) exchange(*entry, starts, lengths, slots, nullptr, h = scratch<2>(t * d), sequences, d);
  draft_input(entry->input, tokens, h, y, t, threads);
}

// A step's rows leave h and their entries.
extern "C" void divisi_draft_record(const DraftEntry* entry, const int64_t* tokens, const float* h, const float* cos_sin,
                                    const int32_t* kv_rows, const int32_t* starts, const int32_t* lengths, const int32_t* slots,
                                    long t, long sequences, int threads) {
  long d = entry->input.embedding.inputs;
  float *before = scratch<2>(t * d), *x = scratch<3>(t * d);
  exchange(*entry, starts, lengths, slots, h, before, sequences, d);
  draft_input(entry->input, tokens, before, x, t, threads);
  float* rows = projected(entry->in, x, nullptr, t, threads);
  const Pool& pool = entry->pool;
  divisi_attention_inputs(rows, cos_sin, entry->norm.query, entry->norm.key, entry->norm.eps, pool.keys, pool.values, pool.is_bf16,
                          kv_rows, nullptr, t, 0, pool.heads, pool.dim, entry->half, threads);
}
