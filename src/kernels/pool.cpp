#include "pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tpimpi {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `value` is no longer `old`.
template <class T>
void wait_for_change(const std::atomic<T>& value, T old) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

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
    for (uint32_t left; (left = left_.load(std::memory_order_acquire)) != 0;) wait_for_change(left_, left);
}

void Pool::serve(int index) {
  uint32_t seen = 0;
  while (true) {
    wait_for_change(turn_, seen);
    seen = turn_.load(std::memory_order_acquire);
    if (closed_) return;
    if (index < parts_) (*work_)(index);
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
  }
}

}  // namespace tpimpi
