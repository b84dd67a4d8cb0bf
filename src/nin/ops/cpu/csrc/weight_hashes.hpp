// Whether weights are still what they were when they were packed.
#pragma once

#include <algorithm>
#include <vector>

#include "c_api.hpp"
#include "kernels.hpp"

namespace nin {

inline nin_status verify_weights(const Kernels& k, const nin_bytes* weights, const uint64_t* hashes, int64_t count,
                                 const nin_thread_pool& pool) {
  if (count == 0) return nin_ok;
  std::vector<uint64_t> now(size_t(count), 0);
  const int32_t status = nin_hash(k.float_kernels, weights, count, now.data(), &pool);
  if (status != nin_ok) return nin_status(status);
  return std::equal(now.begin(), now.end(), hashes) ? nin_ok : nin_weights_changed;
}

}  // namespace nin
