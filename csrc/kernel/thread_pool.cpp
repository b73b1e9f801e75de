// A fixed set of threads that run one function at a time: they spin for a short while, then sleep.
#include "kernel/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "base/cpu_pause.h"

namespace lamina {
namespace {

void pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  if (pthread_setaffinity_np(thread, sizeof(set), &set) != 0)
    throw std::invalid_argument("cannot pin a thread to CPU " + std::to_string(cpu) +
                                ": it does not exist or this process may not use it");
}

// Waits until `word` differs from `seen`: spins, then sleeps on the futex behind std::atomic::wait.
void wait_for_change(const std::atomic<uint32_t>& word, uint32_t seen, std::chrono::microseconds spin) {
  const auto deadline = std::chrono::steady_clock::now() + spin;
  while (word.load(std::memory_order_acquire) == seen) {
    if (std::chrono::steady_clock::now() >= deadline) {
      word.wait(seen, std::memory_order_acquire);
      continue;
    }
    for (int i = 0; i < 16 && word.load(std::memory_order_acquire) == seen; ++i) cpu_pause();
  }
}

}  // namespace

struct ThreadPool::State {
  // On lines of their own: the workers spin on `generation` while others count `pending` down.
  alignas(64) std::atomic<uint32_t> generation{0};  // its change publishes `function` and `stop`
  alignas(64) std::atomic<uint32_t> pending{0};     // started threads that have not finished this generation
  alignas(64) const std::function<void(int)>* function = nullptr;
  bool stop = false;
  std::chrono::microseconds spin{0};
  std::vector<int> cpus;
  std::vector<std::thread> threads;

  void serve(int index) {
    uint32_t seen = 0;
    for (;;) {
      wait_for_change(generation, seen, spin);
      seen = generation.load(std::memory_order_acquire);
      if (stop) return;
      (*function)(index);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) pending.notify_one();
    }
  }

  void shut_down() {
    stop = true;
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
    for (auto& thread : threads) thread.join();
  }
};

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus, int spin_us)
    : state_(std::make_unique<State>()) {
  if (num_threads < 1)
    throw std::invalid_argument("a thread pool needs at least 1 thread, not " + std::to_string(num_threads));
  if (!cpus.empty() && cpus.size() != static_cast<size_t>(num_threads))
    throw std::invalid_argument("name one CPU per thread or none: " + std::to_string(cpus.size()) +
                                " CPUs for " + std::to_string(num_threads) + " threads");
  progress_ = std::make_unique<Progress[]>(num_threads);
  state_->spin = std::chrono::microseconds(spin_us);
  state_->cpus = std::move(cpus);
  State* const state = state_.get();
  try {
    for (int i = 1; i < num_threads; ++i) {
      state->threads.emplace_back([state, i] { state->serve(i); });
      pthread_setname_np(state->threads.back().native_handle(), "lamina-attend");
      if (!state->cpus.empty()) pin(state->threads.back().native_handle(), state->cpus[i]);
    }
  } catch (...) {
    state->shut_down();
    throw;
  }
}

ThreadPool::~ThreadPool() { state_->shut_down(); }

int ThreadPool::size() const { return static_cast<int>(state_->threads.size()) + 1; }

uint64_t ThreadPool::progress() const {
  uint64_t sum = 0;
  for (int i = 0; i < size(); ++i) sum += progress_[i].count.load(std::memory_order_relaxed);
  return sum;
}

void ThreadPool::pin_caller() const {
  if (!state_->cpus.empty()) pin(pthread_self(), state_->cpus[0]);
}

void ThreadPool::run(const std::function<void(int)>& fn) {
  State& state = *state_;
  if (state.threads.empty()) return fn(0);
  state.function = &fn;
  state.pending.store(static_cast<uint32_t>(state.threads.size()), std::memory_order_relaxed);
  state.generation.fetch_add(1, std::memory_order_release);
  state.generation.notify_all();
  fn(0);
  for (uint32_t left; (left = state.pending.load(std::memory_order_acquire)) != 0;)
    wait_for_change(state.pending, left, state.spin);
}

}  // namespace lamina
