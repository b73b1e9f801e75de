// A fixed set of threads that run one function at a time: they spin for a short while, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace lamina {

class ThreadPool {
 public:
  // The calling thread is thread 0; `num_threads - 1` more are started. cpus[i], where given, is the CPU that thread i
  // is pinned to (the caller pins itself with pin_caller()). Spins at most `spin_us` before it sleeps; use 0 where
  // threads outnumber CPUs.
  explicit ThreadPool(int num_threads, std::vector<int> cpus = {}, int spin_us = 100);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;
  void pin_caller() const;

  // Runs fn(thread_index) on every thread and returns when all are done.
  void run(const std::function<void(int)>& fn);

  // Called by the thread of that index, within run() or as its caller (thread 0), whenever it has finished a piece of
  // work, so that a long run() can be told from one that is stuck. A store to a line of its own.
  void advance(int thread) {
    std::atomic<uint64_t>& count = progress_[thread].count;
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  // Asks, from any thread and for good, that kernels leave off: attend() then returns soon, with a part of its output.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  // Calls of advance() so far, by all threads; may be read by any thread.
  uint64_t progress() const;

 private:
  struct alignas(64) Progress {
    std::atomic<uint64_t> count{0};  // written by one thread only
  };
  struct State;
  std::unique_ptr<Progress[]> progress_;
  std::atomic<bool> cancelled_{false};
  std::unique_ptr<State> state_;
};

}  // namespace lamina
