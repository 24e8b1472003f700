// Messages of one process to another through memory that both have mapped: a ring of slots, with one writer and one reader.
// Who waits spins for a while and then sleeps in the kernel; every few milliseconds it looks whether the other lives.
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

enum Outcome { DONE = 0, LATE = 1, GONE = 2, TOO_LONG = 3 };

// A number that one side counts up, and whether the other sleeps until it does.
struct Count {
  alignas(64) std::atomic<uint32_t> value;
  std::atomic<uint32_t> awaited;
};
struct Ring {
  Count written, taken;
  alignas(64) std::atomic<uint32_t> closed;
};
static_assert(sizeof(Ring) <= 256, "Ring.HEADER in ring.py");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared between processes");

constexpr long LOOK_NS = 5000000;  // how long who waits trusts that the other process lives

static long now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}
static void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
static void futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}
static void advance(Count& count) {
  count.value.fetch_add(1);
  if (count.awaited.load()) futex(&count.value, FUTEX_WAKE, INT_MAX, nullptr);
}
static bool hung_up(int fd) {
  pollfd who{fd, POLLRDHUP, 0};
  return poll(&who, 1, 0) > 0 && (who.revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL));
}

// Until `count` is no more what it was.
static Outcome await(Ring& ring, Count& count, uint32_t old, int fd, long spin_ns, long wait_ns) {
  auto changed = [&] { return count.value.load(std::memory_order_acquire) != old; };
  if (changed()) return DONE;
  if (wait_ns <= 0) return LATE;
  long begin = now_ns(), looked = begin;
  for (long turn = 1; spin_ns > 0; turn++) {
    if (changed()) return DONE;
    if (turn % 64 == 0) {
      long now = now_ns();
      if (ring.closed.load() || now - begin > spin_ns) break;
      if (now - looked > LOOK_NS) {
        if (hung_up(fd)) return changed() ? DONE : GONE;
        looked = now;
      }
    }
    relax();
  }
  while (true) {
    long left = begin + wait_ns - now_ns(), slice = left < LOOK_NS ? left : LOOK_NS;
    if (left <= 0) return changed() ? DONE : LATE;
    timespec timeout{slice / 1000000000L, slice % 1000000000L};
    count.awaited.store(1);
    if (!changed() && !ring.closed.load()) futex(&count.value, FUTEX_WAIT, old, &timeout);
    count.awaited.store(0);
    if (changed()) return DONE;
    if (ring.closed.load() || hung_up(fd)) return changed() ? DONE : GONE;
  }
}

static char* slot_of(void* memory, uint32_t number, long slots, long capacity) {
  return static_cast<char*>(memory) + 256 + number % slots * (64 + capacity);
}

// fd: a connection to the other process, which ends with it; wait_ns: 0 only looks
extern "C" void divisi_ring_put(void* memory, const void* data, long bytes, long slots, long capacity, int fd, long spin_ns,
                                long wait_ns, int* outcome) {
  Ring& ring = *static_cast<Ring*>(memory);
  uint32_t next = ring.written.value.load(std::memory_order_relaxed), taken = ring.taken.value.load(std::memory_order_acquire);
  *outcome = bytes > capacity ? TOO_LONG : ring.closed.load() ? GONE : DONE;
  if (*outcome == DONE && next - taken >= slots) *outcome = await(ring, ring.taken, next - (uint32_t)slots, fd, spin_ns, wait_ns);
  if (*outcome != DONE) return;
  char* slot = slot_of(memory, next, slots, capacity);
  memcpy(slot, &bytes, sizeof(bytes));
  memcpy(slot + 64, data, bytes);
  advance(ring.written);
}

// bytes: of room; a message may be shorter
extern "C" void divisi_ring_take(void* memory, void* data, long bytes, long slots, long capacity, int fd, long spin_ns,
                                 long wait_ns, int* outcome) {
  Ring& ring = *static_cast<Ring*>(memory);
  uint32_t next = ring.taken.value.load(std::memory_order_relaxed);
  *outcome = await(ring, ring.written, next, fd, spin_ns, wait_ns);
  if (*outcome != DONE) return;
  const char* slot = slot_of(memory, next, slots, capacity);
  long length;
  memcpy(&length, slot, sizeof(length));
  if (length > bytes) *outcome = TOO_LONG;
  else memcpy(data, slot + 64, length);
  advance(ring.taken);
}

extern "C" void divisi_ring_close(void* memory) {
  Ring& ring = *static_cast<Ring*>(memory);
  ring.closed.store(1);
  futex(&ring.written.value, FUTEX_WAKE, INT_MAX, nullptr);
  futex(&ring.taken.value, FUTEX_WAKE, INT_MAX, nullptr);
}
