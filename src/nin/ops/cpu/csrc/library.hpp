// The plain C interface of the compiled CPU library. Sizes are numbers of elements, strides are elements too.
#pragma once

#include <cstdint>

#define NIN_API extern "C" __attribute__((visibility("default")))

enum nin_status : int32_t { nin_ok = 0, nin_out_of_memory = 1, nin_pool_failed = 2 };

// PyTorch's exported torch_parallel_for, or null: then the library starts threads of its own.
typedef int32_t (*nin_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                    void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct nin_pool {
  nin_parallel_for parallel_for;
  int64_t threads;
};

// A k×k convolution followed by 1×1 ones. All fields are of eight bytes, so that Python can pack them as one row.
struct nin_problem {
  int64_t type;  // of every tensor: 0 float32, 1 bfloat16
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4];  // N, C, H, W
  int64_t layers;
  int64_t winograd;  // 0, or the size of square by which the first layer is computed
};

struct nin_layer {
  const void* weight;  // packed by nin_pack
  const void* bias;    // or null
  int64_t channels;    // that come out
  int64_t activation;  // none, relu, gelu, silu
};

// A weight of any strides as the kernels read it; columns are what comes out of the product.
struct nin_weight {
  int64_t type;
  int64_t columns, channels, height, width;
  int64_t column_stride, channel_stride, height_stride, width_stride;  // elements; may be negative
};

// What one instruction set does for one dtype; null where the name is unknown or the machine lacks it.
NIN_API const void* nin_find_kernels(const char* name, int64_t type);
NIN_API const char* nin_version();
NIN_API int64_t nin_packed_bytes(const void* kernels, const nin_weight* weight);
NIN_API void nin_pack(const void* kernels, const nin_weight* weight, const void* data, void* packed);
// A number made of 64 of the values, spread evenly: a weight that was changed behind its version counter differs in it.
NIN_API uint64_t nin_sample(const void* data, int64_t bytes);
// The same of all values, for weights that have no version counter.
NIN_API uint64_t nin_hash(const void* data, int64_t bytes);
// By which size of square (6 or 8 pixels) a problem's first layer, of so many channels that come out, is computed
// fastest with Winograd's transforms; 0: tap by tap.
NIN_API int64_t nin_winograd_size(const void* kernels, const nin_problem* problem, int64_t columns);
// How weights are transformed on each side, size × kernel.
NIN_API void nin_winograd_weights(int64_t size, int64_t kernel, double* matrix);
// Packs weights transformed: as many bytes as size × size taps take, by the kernels of float32.
NIN_API int32_t nin_winograd_pack(const void* kernels, const nin_weight* weight, int64_t size, const void* data,
                                  void* packed, const nin_pool* pool);
// Scratch that one thread takes, at most, to run the problem.
NIN_API int64_t nin_forward_scratch_bytes(const void* kernels, const nin_problem* problem, const nin_layer* layers,
                                          int64_t threads);
NIN_API int32_t nin_forward(const void* kernels, const nin_problem* problem, const nin_layer* layers, const void* x,
                            void* y, const nin_pool* pool);

// The gradients of a chain of 1×1 layers without padding. Null: not wanted.
struct nin_layer_gradient {
  const void* weight;   // packed by nin_pack with columns and channels exchanged; read where a layer before wants more
  void* weight_grad;    // (channels out, channels in), contiguous
  void* bias_grad;
};
struct nin_gradient {
  int64_t grad_stride[4], x_grad_stride[4];
};

NIN_API int64_t nin_backward_scratch_bytes(const void* kernels, const nin_problem* problem, const nin_layer* layers,
                                           const nin_gradient* gradient, const nin_layer_gradient* gradients);
// Equal bits for any number of threads. `x_grad` is written at the pixels that the stride looks at.
NIN_API int32_t nin_backward(const void* kernels, const nin_problem* problem, const nin_layer* layers,
                             const nin_gradient* gradient, const nin_layer_gradient* gradients, const void* grad,
                             const void* x, const void* y, void* x_grad, const nin_pool* pool);
// The gradient of a k×k layer's weight by Winograd's transforms: (columns, channels in, kernel, kernel) floats.
// `y_stride` of the problem are those of `grad`. Equal bits for any number of threads.
NIN_API int32_t nin_winograd_gradient(const void* kernels, const nin_problem* problem, int64_t columns, const void* x,
                                      const void* grad, float* weight_grad, const nin_pool* pool);
// The gradients of a k×k layer's weight and bias, tap by tap: `sums`, (kernel height × kernel width × channels in, and
// one row for the bias) floats of which each row is `sums_row` long, a multiple of 16. `y`, the result of a ReLU, lets
// through where it is above 0; null: all. Without dilation. Equal bits for any number of threads.
NIN_API int32_t nin_tap_gradient(const void* kernels, const nin_problem* problem, const nin_gradient* gradient,
                                 int64_t columns, const void* x, const void* grad, const void* y, float* sums,
                                 int64_t sums_row, const nin_pool* pool);

// The machine's limits, for benchmarks: FLOP/s of multiply-adds on registers, and bytes/s (read and written) of a copy.
NIN_API double nin_peak_flops(const void* kernels, const nin_pool* pool, double seconds);
NIN_API double nin_copy_bytes_per_second(const nin_pool* pool, char* to, const char* from, int64_t bytes);
