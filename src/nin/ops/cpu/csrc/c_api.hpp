// The C interface of the compiled CPU library, loaded with ctypes by library.py. Sizes and strides are in elements.
#pragma once

#include <cstdint>

#define NIN_API extern "C" __attribute__((visibility("default")))

enum nin_status : int32_t { nin_ok = 0, nin_out_of_memory = 1, nin_thread_pool_failed = 2, nin_weights_changed = 3 };

// PyTorch's exported torch_parallel_for, or null: then the library starts threads of its own.
typedef int32_t (*nin_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                    void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct nin_thread_pool {
  nin_parallel_for parallel_for;
  int64_t threads;
};

// A chain: a k×k convolution followed by 1×1 ones. All fields have eight bytes, so that Python packs them with struct.
struct nin_chain {
  int64_t type;  // data type of every tensor: 0 float32, 1 bfloat16
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4];  // N, C, H, W
  int64_t layers;
  double norm_epsilon = -1;    // of an inverted bottleneck's LayerNorm behind its depthwise layer; negative: none
  int64_t winograd_tile_size;  // 6 or 8: size of the first layer's Winograd input tiles; 0: direct convolution
};

struct nin_layer {
  const void* weight;  // packed by nin_pack
  const void* bias;    // or null
  int64_t channels;    // output channels
  int64_t activation;  // none, relu, gelu, silu, relu6, hardswish, sigmoid, hardsigmoid
};

// A weight of any strides, as a GEMM operand: columns are the output channels.
struct nin_weight_view {
  int64_t type;
  int64_t columns, channels, height, width;
  int64_t column_stride, channel_stride, height_stride, width_stride;  // elements; may be negative
};

// Returns the kernels of an instruction set for a data type; null if the name is unknown or the machine lacks the set.
NIN_API const void* nin_find_kernels(const char* name, int64_t type);
NIN_API const char* nin_version();
// Returns the number of this interface. Raised, here and in library.py, when a function or a struct changes: a library
// that was built before would read arguments that are not there, or leave out what is asked of it.
NIN_API int64_t nin_interface();
NIN_API int64_t nin_packed_bytes(const void* kernels, const nin_weight_view* weight);
NIN_API void nin_pack(const void* kernels, const nin_weight_view* weight, const void* data, void* packed);
// Writes a hash of each of `count` blocks of memory, of all their bytes, to tell whether a weight has changed since it
// was packed. It depends on the instruction set.
struct nin_bytes {
  const void* data;
  int64_t bytes;
};
NIN_API int32_t nin_hash(const void* kernels, const nin_bytes* blocks, int64_t count, uint64_t* hashes,
                         const nin_thread_pool* pool);
// Returns the Winograd input tile size (6 or 8) that the cost model chooses for the first layer, which has `columns`
// output channels; 0: direct convolution.
NIN_API int64_t nin_winograd_size(const void* kernels, const nin_chain* chain, int64_t columns);
// Writes G, the matrix of the filter transform G w Gᵀ: size × kernel.
NIN_API void nin_winograd_weights(int64_t size, int64_t kernel, double* matrix);
// The bytes of a weight packed by nin_winograd_pack.
NIN_API int64_t nin_winograd_packed_bytes(const void* kernels, const nin_weight_view* weight, int64_t size);
// Applies the filter transform and packs the result, and beside it the weight itself for the tiles that are computed tap
// by tap. `kernels`: those of float32.
NIN_API int32_t nin_winograd_pack(const void* kernels, const nin_weight_view* weight, int64_t size, const void* data,
                                  void* packed, const nin_thread_pool* pool);
// The scratch memory of one thread, in bytes.
NIN_API int64_t nin_forward_scratch_bytes(const void* kernels, const nin_chain* chain, const nin_layer* layers,
                                          int64_t threads);
// `weights`: `count` of those that the packed weights were made of, and `hashes` what nin_hash wrote then: if one has
// another hash now, nin_weights_changed is returned, and nothing computed.
NIN_API int32_t nin_forward(const void* kernels, const nin_chain* chain, const nin_layer* layers, const void* x,
                            void* y, const nin_thread_pool* pool, const nin_bytes* weights, const uint64_t* hashes,
                            int64_t count);

// An inverted bottleneck: [1×1 layer,] depthwise k×k layer, to which the chain's geometry belongs, [the two layers of
// squeeze-and-excitation,] 1×1 layer: two to five layers. With a LayerNorm three: depthwise layer, LayerNorm, 1×1, 1×1.
// The depthwise layer's weight is packed with the kernels for float32. `residual`: x is added to the result, of the same
// shape. `hashes` as in nin_forward. Equal bits for any number of threads.
NIN_API int32_t nin_inverted_bottleneck(const void* kernels, const nin_chain* chain, const nin_layer* layers,
                                        int64_t residual, const void* x, void* y, const nin_thread_pool* pool,
                                        const nin_bytes* weights, const uint64_t* hashes, int64_t count);

// A step of a network, whose tensors lie at offsets, in bytes, in blocks of memory.
enum nin_step_kind : int64_t {
  nin_step_chain = 0,           // nin_forward(chain, layers); option: if not 0, as many groups of channels, for each of
                                // which the chain, of one layer, is computed with a layer of its own
  nin_step_bottleneck = 1,      // nin_inverted_bottleneck(chain, layers, option: residual)
  nin_step_add = 2,             // y = activation(x + other), or activation(x), of `count` values; option: activation
  nin_step_max_pool = 3,        // chain: sizes, window and strides
  nin_step_average_pool = 4,    // the same; option: 1 where the padding does not count; count: the divisor, if not 0
  nin_step_linear = 5,          // a fully connected layer; chain: batch, channels, x_stride[0] and y_stride[0]; layers:
                                // one, whose weight is (channels out, channels), contiguous
  nin_step_depthwise = 6,       // a depthwise convolution; chain: as for nin_forward; layers: one, whose weight is packed
                                // with the kernels for float32
  nin_step_scale_shift = 7,     // y = activation(x · weight + bias) of each channel. chain: batch, channels, height, the
                                // pixels of an image, and the strides of N, C and H, of which y's channels are
                                // contiguous; layers: one, floats to a multiple of 16, or null; other: if there, what
                                // `option` says: nin_other, with `count` values from an image, or a pixel, to the next
  nin_step_layer_norm = 8,      // the same with x normalized over the channels; chain: norm_epsilon too
};
// The other operand of nin_step_scale_shift: factors of an image's channels, besides the weight, or of each of its
// pixels', or what is added to each pixel, besides the bias.
enum nin_other : int64_t { nin_other_scale = 0, nin_other_pixel_scale = 1, nin_other_pixel_shift = 2 };
struct nin_step {
  int64_t kind;
  int64_t type;                  // data type of every tensor
  int64_t x[2], other[2], y[2];  // block and offset; other[0] is -1 where there is none
  const nin_chain* chain;
  const nin_layer* layers;
  int64_t option, count;
};
// Runs steps one after the other. `kernels`: those of an instruction set for each data type. In poolings the channels of
// a pixel are contiguous. Equal bits for any number of threads.
NIN_API int32_t nin_run_steps(const void* const* kernels, const nin_step* steps, int64_t count, char* const* memory,
                              const nin_thread_pool* pool);

// Where the gradients of a chain of 1×1 layers without padding go; null: not needed.
struct nin_layer_gradient {
  const void* weight;  // packed with columns and channels exchanged; unused if no earlier layer needs a gradient
  void* weight_grad;   // (channels out, channels in), contiguous
  void* bias_grad;
};
struct nin_gradient_strides {
  int64_t grad_stride[4], x_grad_stride[4];
};

// Deterministic for any number of threads. Of `x_grad`, only the pixels that the stride visits are written.
NIN_API int32_t nin_backward(const void* kernels, const nin_chain* chain, const nin_layer* layers,
                             const nin_gradient_strides* gradient, const nin_layer_gradient* gradients,
                             const void* grad, const void* x, const void* y, void* x_grad, const nin_thread_pool* pool);
// The weight gradient of a k×k layer in the Winograd domain: (columns, input channels, kernel, kernel) floats.
// `y_stride` of the chain holds the strides of `grad`. Deterministic for any number of threads.
NIN_API int32_t nin_winograd_gradient(const void* kernels, const nin_chain* chain, int64_t columns, const void* x,
                                      const void* grad, float* weight_grad, const nin_thread_pool* pool);
// The weight and bias gradients of a k×k layer without dilation, computed directly: `sums` has a row of `sums_row`
// floats (a multiple of 16) for each tap and input channel, and one for the bias. `y` is the output of a ReLU, whose
// derivative masks `grad`; null: no activation. Deterministic for any number of threads.
NIN_API int32_t nin_tap_gradient(const void* kernels, const nin_chain* chain, const nin_gradient_strides* gradient,
                                 int64_t columns, const void* x, const void* grad, const void* y, float* sums,
                                 int64_t sums_row, const nin_thread_pool* pool);

// The machine's roofline: FLOP/s of multiply-adds on registers, and bytes/s (read and written) of a copy.
NIN_API double nin_peak_flops(const void* kernels, const nin_thread_pool* pool, double seconds);
NIN_API double nin_copy_bytes_per_second(const nin_thread_pool* pool, char* to, const char* from, int64_t bytes);
