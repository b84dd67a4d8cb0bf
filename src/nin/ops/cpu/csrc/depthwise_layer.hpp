// A depthwise convolution by itself.
#pragma once

#include "parallel.hpp"
#include "tiling.hpp"

namespace nin {

// `layer`: its weight is packed with the kernels for float32. Equal bits for any number of threads.
nin_status depthwise_layer(const Kernels& k, const nin_chain& chain, const nin_layer& layer, const void* x, void* y,
                           const nin_thread_pool& pool);

}  // namespace nin
