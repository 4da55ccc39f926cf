#include "pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tpimpi {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20), kLongSpin = std::chrono::microseconds(200);
// To wake a thread takes some tens of microseconds, on a virtual machine a hundred: what came within this time, that included,
// would about have been seen within kLongSpin.
constexpr auto kSoon = std::chrono::microseconds(300);

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Spins long where the last wait was a short one; not while a rank waits for others.
template <class T>
void Pool::Waiter::wait_for_change(const std::atomic<T>& value, T old) {
  const auto began = std::chrono::steady_clock::now();
  for (auto now = began; now < began + (soon_ ? kLongSpin : kSpin); now = std::chrono::steady_clock::now()) {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) {
        soon_ = true;
        return;
      }
      relax();
    }
    if (now > began + kSpin) std::this_thread::yield();  // whoever else wants the core has it
  }
  value.wait(old, std::memory_order_acquire);
  soon_ = std::chrono::steady_clock::now() - began < kSoon;
}

Pool::Pool(int threads) {
  try {
    for (int index = 1; index < threads; ++index) others_.emplace_back([this, index] { serve(index); });
  } catch (...) {
    end();
    throw;
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  closed_ = true;
  turn_.fetch_add(1, std::memory_order_release);
  turn_.notify_all();
  for (auto& thread : others_) thread.join();
}

void Pool::run(int parts, const std::function<void(int)>& work) {
  if (parts > 1) {
    work_ = &work;
    parts_ = parts;
    left_.store(uint32_t(others_.size()), std::memory_order_relaxed);
    turn_.fetch_add(1, std::memory_order_release);
    turn_.notify_all();
  }
  work(0);
  if (parts > 1)
    for (uint32_t left; (left = left_.load(std::memory_order_acquire)) != 0;) waiter_.wait_for_change(left_, left);
}

void Pool::serve(int index) {
  uint32_t seen = 0;
  Waiter waiter;
  while (true) {
    waiter.wait_for_change(turn_, seen);
    seen = turn_.load(std::memory_order_acquire);
    if (closed_) return;
    if (index < parts_) (*work_)(index);
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
  }
}

}  // namespace tpimpi
