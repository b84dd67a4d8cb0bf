// Parallel loops over tasks, and scratch memory that each thread keeps for the next call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#include "c_api.hpp"

namespace nin {

// A thread's buffer. It grows to the largest tile so far and is freed with the thread; more than `kept_bytes` is freed
// at the end of the call.
class Scratch {
 public:
  static constexpr size_t kept_bytes = 8 << 20;

  ~Scratch() { std::free(memory_); }

  char* reserve(size_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(4096, bytes_));
      if (!memory_) bytes_ = 0;
    }
    return memory_;
  }

  void trim(size_t kept = kept_bytes) {
    if (bytes_ <= kept) return;
    std::free(memory_);
    memory_ = nullptr;
    bytes_ = 0;
  }

 private:
  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

inline thread_local Scratch thread_scratch;
// A buffer that all threads of one call share; it belongs to the calling thread.
inline thread_local Scratch shared_scratch;

// Calls run(task, scratch) for every task in [0, count), scheduled dynamically.
template <typename Run>
nin_status run_tasks(const nin_thread_pool& pool, int64_t count, size_t scratch_bytes, const Run& run) {
  struct Job {
    const Run& run;
    int64_t count;
    size_t scratch_bytes;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    void work() {
      char* memory = thread_scratch.reserve(std::max<size_t>(scratch_bytes, 1));
      if (!memory) failed = true;
      for (int64_t task; !failed && (task = next++) < count;) run(task, memory);
      thread_scratch.trim();
    }
  } job{run, count, scratch_bytes};

  const int64_t workers = std::max<int64_t>(1, std::min(pool.threads, count));
  if (workers == 1) {
    job.work();
  } else if (pool.parallel_for) {
    const auto body = [](int64_t, int64_t, void* context) { static_cast<Job*>(context)->work(); };
    if (pool.parallel_for(0, workers, 1, body, &job) != 0) return nin_thread_pool_failed;
  } else {
    std::vector<std::thread> threads;
    try {
      threads.reserve(size_t(workers - 1));
      for (int64_t i = 1; i < workers; ++i) threads.emplace_back([&job] { job.work(); });
    } catch (const std::exception&) {  // out of memory or threads: the existing threads do all tasks
    }
    job.work();
    for (std::thread& thread : threads) thread.join();
  }
  return job.failed ? nin_out_of_memory : nin_ok;
}

}  // namespace nin
