// A layer's mixture on packed weights, for steps of few rows: one team of threads for router, shared and routed experts. The parts
// are those of the other files, so the bits are theirs.
#include "experts/bank.h"
#include "linear/packed.h"
#include "layers.h"
#include "team.h"

static Bank bank(const Experts& e, Scratch& s, const bf16* x, float* y, long t) {
  return {s, e.leaves, (const bf16*)e.gate_up.values, (const bf16*)e.down.values, e.down.outputs, e.down.inputs, e.count, x, y, t};
}

// x: the normed rows; y: what the layer adds to the residual. Whoever ends the last panel of the router chooses the experts, while
// others are with the shared one.
extern "C" void divisi_packed_mixture(const Router* router, const Experts* shared, const Experts* routed, const float* x, float* y,
                                      long t, int threads) {
  static thread_local Scratch memory[2];
  static thread_local RowMemory rounded;
  const Matrix& w = router->in.weight;
  long d = w.inputs, n = w.outputs, k = router->chosen;
  float *logits = scratch<0>(t * n), *gates = scratch<1>(t * k), *one = scratch<2>(t * d), *many = scratch<3>(t * d);
  int32_t* ids = scratch<0, int32_t>(t * k);
  const bf16* rows = round_rows(x, rounded, t, d, threads);
  Product product{{(const bf16*)w.values, ceil_div(n, LANES), pairs_of(d)}, rows, logits, t, n, width_of(d)};
  Bank own = bank(*shared, memory[0], rows, one, t), all = bank(*routed, memory[1], rows, many, t);
  own.sort(nullptr, nullptr, 1);
  long panels = product.items();
  std::atomic<long> left{panels};
  auto choose = [&](long i) {
    if (i >= panels) return own.up_item(i - panels);
    product.item(i);
    if (--left) return;
    divisi_route(logits, n, ids, gates, t, router->experts, k, router->normalise, 1);
    all.sort(ids, gates, k);
  };
  auto widen = [&](long i) { i < all.up_items() ? all.up_item(i) : own.down_item(i - all.up_items()); };
  long products = t * n * d + own.products() + t * k * 3 * d * all.f;
  in_phases(threads_for(products, threads),
            Phase{[&] { return panels + own.up_items(); }, choose},
            Phase{[&] { return all.up_items() + own.down_items(); }, widen},
            Phase{[&] { return all.down_items(); }, [&](long i) { all.down_item(i); }});
  divisi_add_shared(many, one, logits + n - 1, n, y, t, d, threads);
}
