// A model's layers as the operations of steps of few rows see them. Mirrored in native/fused.py and native/passes.py.
#pragma once
#include "calls.h"
#include "simd.h"
#include <vector>

struct Matrix { const void* values; long outputs, inputs, format; };  // fp32, bf16, or bf16 packed
enum Format { FP32, BF16, PACKED };
struct Norm { const float* scale; float eps; };
struct Projection { Norm norm; Matrix weight; };
struct DeltaLayer { Projection in; const Delta* delta; Matrix out; long channels; };
struct QkNorm { const float *query, *key; float eps; };
struct Pool { void *keys, *values; long is_bf16, page_size, heads, dim; };
struct AttentionLayer { Projection in; QkNorm norm; Pool pool; Matrix out; long heads, half, tiled, first; };
struct Router { Projection in; long experts, chosen, normalise; };
struct Experts { Matrix gate_up, down; const int32_t* leaves; long count; };  // matrices of one expert, one after the other
struct DraftInput { Matrix embedding; Norm token, hidden; Matrix fc; };
struct DraftEntry { DraftInput input; Projection in; QkNorm norm; Pool pool; long half; float* hidden; long entries; };

// Memory of the calling thread, which grows to its largest step of few rows.
template <int PLACE, class T = float>
static T* scratch(long count) {
  static thread_local std::vector<T> values;
  if ((long)values.size() < count) values.resize(count);
  return values.data();
}

[[maybe_unused]] static void product(const float* x, const Matrix& w, float* y, long t, int threads) {
#if defined(__AVX512BF16__)
  if (w.format == PACKED) return divisi_packed_linear(x, w.values, y, t, w.outputs, w.inputs, threads);
#endif
  divisi_linear(x, w.values, w.format == BF16, y, t, w.outputs, w.inputs, threads);
}

[[maybe_unused]] static void embed(const Matrix& w, const int64_t* tokens, float* out, long t) {
#if defined(__AVX512BF16__)
  if (w.format == PACKED) return divisi_packed_rows(w.values, tokens, out, t, w.outputs, w.inputs);
#endif
  for (long i = 0; i < t; i++)
    for (long c = 0; c < w.inputs; c++) {
      long at = tokens[i] * w.inputs + c;
      out[i * w.inputs + c] = w.format == BF16 ? scalar((const bf16*)w.values + at) : ((const float*)w.values)[at];
    }
}

[[maybe_unused]] static void normed(const Norm& norm, float* residual, const float* update, float* x, long t, long d, int threads) {
  divisi_add_rms_norm(residual, update, norm.scale, x, t, d, norm.eps, threads);
}

extern "C" {
void divisi_delta_layer(const DeltaLayer* layer, float* residual, const float* update, const int32_t* starts,
                        const int32_t* lengths, const int32_t* slots, float* y, long t, long sequences, int threads);
void divisi_attention_layer(const AttentionLayer* layer, float* residual, const float* update, const float* cos_sin,
                            const int32_t* kv_rows, const int32_t* starts, const int32_t* lengths, const int32_t* pages,
                            long max_pages, float* y, long t, long sequences, int threads);
void divisi_norm_route(const Router* router, float* residual, const float* update, float* x, float* logits, int32_t* ids,
                       float* gates, long t, int threads);
void divisi_packed_mixture(const Router* router, const Experts* shared, const Experts* routed, const float* x, float* y, long t,
                           int threads);
void divisi_draft_input(const DraftEntry* entry, const int64_t* tokens, float* h, const int32_t* starts, const int32_t* lengths,
                        const int32_t* slots, float* y, long t, long sequences, int threads);
void divisi_draft_record(const DraftEntry* entry, const int64_t* tokens, const float* h, const float* cos_sin,
                         const int32_t* kv_rows, const int32_t* starts, const int32_t* lengths, const int32_t* slots, long t,
                         long sequences, int threads);
}
