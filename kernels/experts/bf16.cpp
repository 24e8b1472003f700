// Routed SwiGLU experts on packed weights, see bank.h; without ids a dense layer.
#include "team.h"
#include "bank.h"

extern "C" void divisi_packed_experts(const float* x, const int32_t* ids, const float* gates, const int32_t* leaves,
                                      const void* gate_up, const void* down, float* y, long t, long k, long d, long f,
                                      long experts, int threads) {
  static thread_local Scratch scratch;
  static thread_local RowMemory rounded;
  Bank bank{scratch, leaves, (const bf16*)gate_up, (const bf16*)down, d, f, experts, round_rows(x, rounded, t, d, threads), y, t};
  bank.sort(ids, gates, k);
  in_phases(threads_for(bank.products(), threads),
            Phase{[&] { return bank.up_items(); }, [&](long i) { bank.up_item(i); }},
            Phase{[&] { return bank.down_items(); }, [&](long i) { bank.down_item(i); }});
}
