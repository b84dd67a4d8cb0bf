// The machine's roofline: peak multiply-adds on registers, and the bandwidth of a copy.
#include <chrono>
#include <cstring>

#include "kernels.hpp"
#include "parallel.hpp"

namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double nin_peak_flops(const void* kernels, const nin_thread_pool* pool, double seconds) {
  const auto& k = *static_cast<const nin::Kernels*>(kernels);
  std::atomic<double> done{0};
  const double start = seconds_now();
  const nin_status status = nin::run_tasks(*pool, pool->threads, 64, [&](int64_t, char*) {
    float sink = 0;
    while (seconds_now() - start < seconds) {
      const double flop = k.peak_flop(100000, &sink);
      double before = done;
      while (!done.compare_exchange_weak(before, before + flop)) {
      }
    }
  });
  return status == nin_ok ? done / (seconds_now() - start) : 0;
}

double nin_copy_bytes_per_second(const nin_thread_pool* pool, char* to, const char* from, int64_t bytes) {
  const int64_t threads = std::max<int64_t>(1, pool->threads);
  const double start = seconds_now();
  const nin_status status = nin::run_tasks(*pool, threads, 64, [&](int64_t thread, char*) {
    const int64_t first = bytes * thread / threads, last = bytes * (thread + 1) / threads;
    std::memcpy(to + first, from + first, size_t(last - first));
  });
  return status == nin_ok ? 2.0 * double(bytes) / (seconds_now() - start) : 0;
}
