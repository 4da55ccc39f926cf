// Threads that share one kernel call's work, and wait without spinning for long.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace tpimpi {

// `threads - 1` threads beside the caller's. A waiting thread spins for some microseconds, and longer where the last wait was
// short, as between the kernels of a layer; then it sleeps in the kernel: an idle rank takes no processor time. Only one thread
// may call `run`.
class Pool {
 public:
  explicit Pool(int threads);  // throws std::system_error where the system has not so many
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return int(others_.size()) + 1; }

  // Call work(part) for every part in [0, parts), parts <= threads(), one on each thread; returns when all are done.
  void run(int parts, const std::function<void(int)>& work);

 private:
  class Waiter {
   public:
    template <class T>
    void wait_for_change(const std::atomic<T>& value, T old);  // returns when `value` is no longer `old`

   private:
    bool soon_ = false;  // whether the last change came soon
  };

  void serve(int index);
  void end();

  std::vector<std::thread> others_;
  const std::function<void(int)>* work_ = nullptr;
  int parts_ = 0;
  std::atomic<uint32_t> turn_{0};  // changes when there is work, or when it is time to end
  std::atomic<uint32_t> left_{0};  // parts that other threads have not finished
  std::atomic<bool> closed_{false};
  Waiter waiter_;  // the caller's, for the others to be done
};

}  // namespace tpimpi
