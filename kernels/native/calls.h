// Functions of one file that others call.
#pragma once
#include <cstdint>

struct Delta;
extern "C" {
void divisi_linear(const float* x, const void* w, int w_is_bf16, float* y, long t, long n, long k, int threads);
void divisi_packed_linear(const float* x, const void* w, float* y, long t, long n, long k, int threads);
void divisi_packed_rows(const void* w, const int64_t* rows, float* out, long t, long n, long k);
void divisi_add_rms_norm(float* residual, const float* update, const float* scale, float* out, long t, long d, float eps,
                         int threads);
void divisi_silu_mul(const float* gate_up, float* out, long t, long inner, int threads);
void divisi_mlp(const float* x, const void* gate_up, const void* down, int w_is_bf16, float* y, long t, long d, long f,
                int threads);
void divisi_experts(const float* x, const int32_t* ids, const float* gates, const int32_t* leaves, const void* gate_up,
                    const void* down, int w_is_bf16, float* inner, float* parts, float* y, long t, long k, long d, long f,
                    long num_experts, int threads);
void divisi_packed_experts(const float* x, const int32_t* ids, const float* gates, const int32_t* leaves, const void* gate_up,
                           const void* down, float* y, long t, long k, long d, long f, long experts, int threads);
void divisi_add_shared(const float* routed, const float* shared, const float* logits, long stride, float* y, long t, long d,
                       int threads);
void divisi_route(const float* logits, long stride, int32_t* ids, float* gates, long t, long e, long k, int normalise, int threads);
void divisi_choose(const float* logits, long stride, long vocab, const int64_t* positions, const int64_t* seeds,
                   const float* temperature, const int64_t* top_k, const double* top_p, const float* log_min_p, int64_t* tokens,
                   long rows, int threads);
void divisi_gated_delta_decode(const Delta* layer, const float* rows, float* mixed, float* out, const int32_t* starts,
                               const int32_t* lengths, const int32_t* slots, long sequences, int threads);
void divisi_attention_inputs(const float* rows, const float* cos_sin, const float* q_scale, const float* k_scale, float eps,
                             void* keys, void* values, int kv_is_bf16, const int32_t* kv_rows, float* q, long t, long qh, long kvh,
                             long d, long half, int threads);
void divisi_attention(const float* q, const float* rows, const void* keys, const void* values, int kv_is_bf16, long page_size,
                      const int32_t* starts, const int32_t* lengths, const int32_t* pages, long max_pages, long first, float* out,
                      long runs, long qh, long kvh, long d, int threads);
void divisi_tiled_attention(const float* q, const float* rows, const void* keys, const void* values, long page_size,
                            const int32_t* starts, const int32_t* lengths, const int32_t* pages, long max_pages, long first,
                            float* out, long runs, long qh, long kvh, long d, int threads);
}
