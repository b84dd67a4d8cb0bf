// The micro-kernels of one instruction set, as a table of functions on tiles in the cache.
//
// A tile is a matrix of pixels × channels, whatever the layout of the images. Its elements are float, or bfloat16
// where the instruction set has dot products of bfloat16 pairs. One step along k, the summed dimension, is four bytes:
// a float or a pair. Strides are in bytes unless noted.
#pragma once

#include <cstdint>

namespace nin {

enum class DataType : int64_t { f32 = 0, bf16 = 1 };
enum class Activation : int64_t { none = 0, relu = 1, gelu = 2, silu = 3, relu6 = 4, hardswish = 5, sigmoid = 6, hardsigmoid = 7 };

// Whether a GEMM applies an activation to its sums in registers: the others go through memory.
inline __attribute__((always_inline)) bool is_fast_in_epilogue(Activation a) { return a <= Activation::relu || a == Activation::relu6; }

// What a GEMM applies to its sums before it stores them.
struct Epilogue {
  const float* bias = nullptr;  // one for each column of the panel, or null
  Activation activation = Activation::none;
  void* out = nullptr;  // null: only the derivative is needed
  int64_t out_row_stride = 0;
  DataType out_type = DataType::f32;
  bool round_to_bf16 = false;   // `out` holds floats, rounded to bfloat16 values
  bool non_temporal = false;    // stores that bypass the caches; `out` and its rows are aligned to 64 bytes
  bool zero_tail = false;       // `out` is scratch: columns past the last are set to zero
  float* derivative = nullptr;  // where the activation's derivative goes, or null
  int64_t derivative_row_stride = 0;
  const void* gate = nullptr;  // backward pass: the activation's derivative, which multiplies the sums, or null
  int64_t gate_row_stride = 0;
  bool gate_is_relu_output = false;  // `gate` holds a ReLU's output (in the tile's type) instead of a derivative
};

// out[rows × columns] = epilogue(sum over taps of A_tap · panel_tap): pixels times a panel of packed weights. The taps
// of a k×k convolution are addressed by offsets, so no im2col copy is needed.
struct GemmArguments {
  const void* a = nullptr;  // first pixel
  int64_t a_row_stride = 0;
  const int64_t* tap_offsets = nullptr;  // bytes from a pixel to the first channel that each tap reads
  int64_t tap_count = 0;
  int64_t k_steps = 0;             // of each tap
  const void* panel = nullptr;     // (tap_count * k_steps, vectors * lanes) of four bytes
  int64_t panel_skip_bytes = 0;    // bytes of the panel to skip after each tap
  const void* prefetch = nullptr;  // fetched into the L2 cache meanwhile
  int64_t prefetch_bytes_per_step = 0;
  int64_t columns = 0;  // of the panel, without its padding
  // AMX only: two lines of at most 16 pixels in one call, with `rows` pixels each, so that both register blocks are
  // used.
  bool two_lines = false;
  int64_t a_line_stride = 0, out_line_stride = 0;  // bytes from the first line to the second
  Epilogue epilogue;
};

// sums[rows × columns] += Aᵀ · B, summed over pixels: the gradient of a weight.
struct OuterProductArguments {
  const void* a = nullptr;                   // inputs: (pixel, row) of four bytes, rows contiguous
  int64_t a_k_stride = 0;                    // from a pixel (pair) to the next; with AMX from row to row
  const int64_t* segment_offsets = nullptr;  // bytes from `a` to each segment of consecutive pixels
  int64_t segment_count = 0;
  int64_t k_steps = 0;      // pixels (pairs) in a segment
  const void* b = nullptr;  // gradients: (pixel, column) of four bytes
  int64_t b_k_stride = 0;
  float* sums = nullptr;
  int64_t sums_row_stride = 0;  // floats
};

// `count` pixels of an image at any strides, to be copied to or from the rows of a tile.
struct StridedPixels {
  void* data = nullptr;
  int64_t channel_stride = 0;
  int64_t pixel_stride = 0;
  DataType type = DataType::f32;
  int64_t channels = 0;
  int64_t count = 0;
};

// A rectangle of pixels in memory. A line is a row of an image; rows are those of matrices.
struct PixelGrid {
  char* data;
  int64_t pixel_stride, line_stride;
};

// One line of a depthwise convolution's output, for a panel of channels. The pixels of the input's lines, which hold the
// padding's zeros at their sides, lie max_vectors vectors apart.
struct DepthwiseArguments {
  const char* const* lines = nullptr;  // of the input, one for each line of taps inside the image
  int64_t line_count = 0;
  const float* weights = nullptr;  // (line, tap, vectors * lanes), from the first of these lines on
  const float* bias = nullptr;     // one for each channel, or null
  Activation activation = Activation::none;
  int64_t taps = 0, stride = 1, dilation = 1;  // of a line
  int64_t columns = 0;                         // output pixels
  char* out = nullptr;
  int64_t out_row_stride = 0;
  DataType out_type = DataType::f32;
};

// A fully connected layer: y[r][o] = x[r] · weight[o] + bias[o]. The weight is read where it lies.
struct LinearArguments {
  DataType type = DataType::f32;  // of all four
  const char* x = nullptr;
  int64_t x_row_stride = 0, rows = 0, channels = 0;
  const char* weight = nullptr;
  int64_t weight_row_stride = 0;
  const char* bias = nullptr;  // or null
  char* y = nullptr;
  int64_t y_row_stride = 0;
};

// y[r][c] = activation(x[r][c] · factors[r][c] · scale[c] + shift[c] + addends[r][c]), whose channels are contiguous; x
// may be normalized over the channels before: its mean subtracted, divided by the root of its variance plus epsilon.
struct RowArguments {
  DataType type = DataType::f32;  // of x, factors, addends and y
  const char* x = nullptr;
  int64_t x_row_stride = 0, rows = 0, channels = 0;
  const char* factors = nullptr;  // or null, as the next three
  const char* addends = nullptr;
  int64_t factors_row_stride = 0, addends_row_stride = 0;
  const float* scale = nullptr;  // whole vectors
  const float* shift = nullptr;
  Activation activation = Activation::none;
  bool normalizes = false;
  float epsilon = 0;
  char* y = nullptr;
  int64_t y_row_stride = 0;
};

// The interpolation points of Winograd's transforms with input tiles of 6 × 6 or 8 × 8, besides 0 and infinity: ± each.
// Of twelve sets of small fractions these have the lowest root-mean-square error against float64.
constexpr double winograd_point(int64_t size, int i) {
  constexpr double points[2][3] = {{0.75, 1.5}, {0.5, 1, 2}};
  return points[size == 8][i];
}

// The register tile is at most two vectors wide: 14 × 2 sums fill 28 of AVX-512's 32 registers.
constexpr int max_vectors = 2;

// Of a panel's columns: the bits of the largest magnitude, the values that are not zero, the sum of the magnitudes'
// square roots (to 7 %).
struct ColumnMagnitudes {
  static constexpr int max_columns = 16 * max_vectors;
  int32_t largest[max_columns];
  int32_t counts[max_columns];
  float root_sums[max_columns];
};

struct Kernels {
  const char* name;
  int lanes;                     // floats in a vector
  int max_rows;                  // largest number of pixels of a GEMM call
  DataType tile_type;            // bf16 where the set has dot products of bfloat16 pairs
  const Kernels* float_kernels;  // the same set for tiles of floats
  // AMX works on blocks of 16 × 16. Its outer product reads inputs as (row, pixel), zero-padded to multiples of 16 rows
  // and 32 pixels.
  bool uses_amx;
  void (*gemm)(const GemmArguments&, int rows, int vectors);
  void (*outer_product)(const OuterProductArguments&, int rows, int vectors);
  // where tiles are of bfloat16, with a zero behind an odd channel, if a row has room for it
  void (*load)(const StridedPixels&, void* tile, int64_t row_stride);
  void (*store)(const StridedPixels&, const void* tile, int64_t row_stride);
  // tile[p][c] *= gate[p][c], see Epilogue
  void (*apply_gate)(void* tile, int64_t row_stride, const Epilogue&, int64_t count, int64_t channels);
  // sums[c] += tile[p][c]
  void (*add_column_sums)(const void* tile, int64_t row_stride, int64_t count, int64_t channels, float* sums);
  // pairs[p][c] = (tile[2p][c], tile[2p + 1][c]), bfloat16; an odd last pixel is paired with zero
  void (*interleave_pixel_pairs)(const void* tile, int64_t row_stride, int64_t count, int64_t channels, void* pairs,
                                 int64_t pairs_row_stride);
  // transposed[c][p] = tile[p][c], bfloat16, for AMX
  void (*transpose_pixels)(const void* tile, int64_t row_stride, int64_t count, int64_t channels, void* transposed,
                           int64_t transposed_row_stride);
  // The largest magnitude of each pixel's channels, as the bits of a float, of which a NaN's are larger than infinity's.
  // `to` has room for `count` rounded up to a multiple of `lanes`.
  void (*pixel_magnitudes)(const void* tile, int64_t row_stride, int64_t count, int64_t channels, int32_t* to);
  // The same of each column of a panel of weights.
  void (*column_magnitudes)(const float* panel, int64_t rows, int vectors, ColumnMagnitudes& to);
  // Winograd's input transform Bᵀ x B of a tile of size × size pixels: as many components, `component_stride` bytes
  // apart.
  void (*input_transform)(int size, const PixelGrid& from, int64_t channels, float* to, int64_t component_stride);
  // The output transform Aᵀ m A and the epilogue: the first lines × columns pixels of an output tile.
  void (*output_transform)(int size, int output_tile, const float* from, int64_t component_stride, const Epilogue&,
                           const PixelGrid& to, int lines, int columns, int64_t channels);
  // A g Aᵀ, the transpose of the output transform: from the gradient of an output tile to that of its components.
  void (*gradient_transform)(int size, int output_tile, const PixelGrid& from, int64_t channels, float* to,
                             int64_t component_stride);
  // M f Mᵀ for `count` contiguous filters f of in × in values; M is out × in. G w Gᵀ of weights, Gᵀ s G of gradients.
  void (*filter_transform)(int out, int in, const float* matrix, const float* from, int64_t from_step, float* to,
                           int64_t to_step, int64_t count);
  // A line of a depthwise convolution of floats, of whole vectors.
  void (*depthwise)(const DepthwiseArguments&, int vectors);
  // Applies an activation to `count` rows of whole vectors of floats.
  void (*activate_rows)(char* rows, int64_t row_stride, int64_t count, int vectors, Activation activation);
  // to[p][c] += from[p][c]
  void (*add_rows)(char* to, int64_t to_row_stride, DataType to_type, const char* from, int64_t from_row_stride,
                   DataType from_type, int64_t count, int64_t channels);
  // sums[c] = the sum of tile[p][c] over p, of whole vectors; tile[p][c] *= factors[c], to whole vectors
  void (*sum_rows)(const char* tile, int64_t row_stride, int64_t count, int vectors, float* sums);
  void (*scale_rows)(char* tile, int64_t row_stride, int64_t count, int64_t channels, const float* factors);
  // Subtracts from each row of floats its mean and divides by the root of its variance plus epsilon. The results, with
  // zeros to whole vectors, are a tile's elements from the row's beginning on.
  void (*normalize_rows)(char* rows, int64_t row_stride, int64_t count, int64_t channels, float epsilon);
  // to[i] = panel[i] * factors[i], for the rows of a panel of packed weights: floats
  void (*scale_panel)(const char* panel, int64_t rows, int vectors, const float* factors, char* to);
  // y = activation(x + other) of `count` values, y = activation(x) where `other` is null; y may be one of them.
  void (*add_and_activate)(char* y, const char* x, const char* other, int64_t count, Activation, DataType);
  // The largest value of each of `channels` over `count` pixels, or their sum over `divisor`.
  void (*pool)(char* y, const char* const* pixels, int64_t count, int64_t channels, bool largest, float divisor,
               DataType);
  // The outputs from `first` to `last` of a fully connected layer.
  void (*linear)(const LinearArguments&, int64_t first, int64_t last);
  void (*scale_and_shift)(const RowArguments&);
  // Called before and after a thread's GEMMs to save 64 bytes of register state (AMX); null where there is none.
  void (*enter)(void* state);
  void (*leave)(const void* state);
  // A hash of bytes in their order, as fast as the memory gives them.
  uint64_t (*hash)(const char* data, int64_t bytes);
  // Multiply-adds on registers, to measure the peak; returns their FLOP.
  double (*peak_flop)(int64_t rounds, float* sink);
};

// AMX's outer product: pixels that it sums at a time, and rows of its result.
constexpr int64_t tile_depth = 32, tile_height = 16;

extern const Kernels portable_kernels;
#if NIN_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, avx512_amx_kernels;
#endif

}  // namespace nin
