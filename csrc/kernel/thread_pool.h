// A fixed set of threads that run one function at a time: they spin for a short while, then sleep.
#pragma once

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

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lamina
