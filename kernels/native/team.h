// Work of several threads, phase by phase: they take the items of a phase one by one, and none begins the next phase before all
// have ended this one. They meet at counters: an OpenMP region takes 1.1 us with two threads on Zen 4, each loop in it 1.3 more.
#pragma once
#include "simd.h"
#include <atomic>
#include <cstdlib>
#include <omp.h>
#include <sched.h>
#include <strings.h>
#include <time.h>

// Whether waiting threads are to sleep, since others have the cores: OpenMP's own ways are taken then.
static inline bool sleeps() {
  static const bool asked = [] { const char* policy = getenv("OMP_WAIT_POLICY"); return policy && !strcasecmp(policy, "PASSIVE"); }();
  return asked;
}

// Spins for as long as passes have serial parts; then somebody else may have the other one's core, and after some 10 ms this one
// too. A nap any sooner costs: threads whose process had the cores 25 ms before were 15 % slower with naps after 0.1 ms.
template <class Reached>
static inline void wait_until(const Reached& reached) {
  constexpr long SPINS = 4096, YIELDS = 1 << 14;
  constexpr timespec NAP{0, 1000000};
  for (long waited = 0; !reached(); waited++) {
    if (waited > SPINS + YIELDS) nanosleep(&NAP, nullptr);
    else if (waited > SPINS) sched_yield();
#if defined(__x86_64__)
    else _mm_pause();
#endif
  }
}

// Threads of one parallel region that wait for their leader's calls, as long as a pass lasts.
class Crew {
  alignas(64) std::atomic<long> calls{0};
  alignas(64) std::atomic<long> ended{0};
  bool over = false;
  const void* work = nullptr;
  void (*run)(const void*, long) = nullptr;

  void announce() { calls.store(calls.load(std::memory_order_relaxed) + 1, std::memory_order_release); }
  void serve() {
    for (long seen = 0;; ended.fetch_add(1, std::memory_order_release)) {
      wait_until([&] { return calls.load(std::memory_order_acquire) != seen; });
      seen++;
      if (over) return;
      run(work, size);
    }
  }

 public:
  long size = 1;
  // Of the calling thread, which leads it; null: none.
  static Crew*& own() {
    static thread_local Crew* crew = nullptr;
    return crew;
  }
  // All of the crew do the work, each told how many they are. What that does in phases each does alone.
  template <class Work>
  void call(const Work& each) {
    work = &each;
    run = [](const void* work, long size) { (*(const Work*)work)(size); };
    announce();
    own() = nullptr;
    each(size);
    own() = this;
    wait_until([&] { return ended.load(std::memory_order_acquire) == calls.load(std::memory_order_relaxed) * (size - 1); });
  }
  // The calling thread does the work, and has a crew for what that does in phases.
  template <class Work>
  static void lead(int threads, const Work& leader) {
    if (threads == 1 || sleeps()) return leader();
    Crew crew;
#pragma omp parallel num_threads(threads)
    {
      if (omp_get_thread_num()) crew.serve();
      else {
        crew.size = omp_get_num_threads();
        own() = &crew;
        leader();
        own() = nullptr;
        crew.over = true;
        crew.announce();
      }
    }
  }
};

// How many threads are worth it for so many multiplications.
static inline int threads_for(long products, int threads) { return products > ALONE ? threads : 1; }

// items() is asked for once the phase before is over.
template <class Items, class Work>
struct Phase { Items items; Work work; };
template <class Items, class Work>
Phase(Items, Work) -> Phase<Items, Work>;

template <class... P>
static void in_phases(int threads, const P&... phases) {
  if (threads == 1) return (for_each(phases.items(), phases.work), ...);
  struct alignas(64) Counter { std::atomic<long> count{0}; } next[sizeof...(P)], arrived;
  auto each = [&](long team) {
    long number = 0;
    auto run = [&](const auto& phase) {
      if (number && sleeps()) {
#pragma omp barrier
      } else if (number) {
        arrived.count.fetch_add(1);
        wait_until([&] { return arrived.count.load(std::memory_order_acquire) >= number * team; });
      }
      std::atomic<long>& item = next[number++].count;
      long items = phase.items();
      for (long i; (i = item.fetch_add(1, std::memory_order_relaxed)) < items;) phase.work(i);
    };
    (run(phases), ...);
  };
  if (Crew* crew = Crew::own()) return crew->call(each);
#pragma omp parallel num_threads(threads)
  each(omp_get_num_threads());
}

template <class Work>
static void share(int threads, long items, const Work& work) {
  in_phases(threads, Phase{[&] { return items; }, work});
}

// work(row) for each, several at a time: taking one costs as much as a short row.
template <class Work>
static void share_rows(int threads, long rows, const Work& work) {
  constexpr long EACH = 8;
  share(rows > EACH ? threads : 1, (rows + EACH - 1) / EACH, [&](long i) {
    for (long row = i * EACH; row < rows && row < (i + 1) * EACH; row++) work(row);
  });
}
