// What one instruction set provides to the driver: a table of functions on tiles that lie in the cache.
//
// A tile holds pixels as rows and channels as columns, whatever the layout of the images. Its elements are float,
// or bfloat16 where the instruction set multiplies pairs of bfloat16 (`dot`); four bytes are one step of a sum.
#pragma once

#include <cstdint>

namespace nin {

enum class Type : int64_t { f32 = 0, bf16 = 1 };
enum class Activation : int64_t { none = 0, relu = 1, gelu = 2, silu = 3 };

// How a row of sums becomes a row of a tile or of the result.
struct Finish {
  const float* bias = nullptr;           // one for each column of the panel, or null
  Activation activation = Activation::none;
  void* out = nullptr;                   // null: only the derivative is wanted
  int64_t out_row = 0;                   // bytes from pixel to pixel, as all "row" values here
  Type out_type = Type::f32;
  bool round = false;                    // floats are rounded to bfloat16 values
  bool stream = false;                   // past the caches; `out` and its rows are aligned by 64 bytes
  bool whole = false;                    // `out` is scratch: columns past the last become zero
  float* derivative = nullptr;           // the activation's derivative is written here, or null
  int64_t derivative_row = 0;
  const void* gate = nullptr;            // multiplies the result, for the backward pass, or null
  int64_t gate_row = 0;
  bool gate_is_result = false;           // the gate is a ReLU's result (of the tile's type), else its derivative
};

// rows × columns sums over taps and channels: pixels times a panel of packed weights.
struct Product {
  const void* a = nullptr;               // first pixel
  int64_t a_row = 0;
  const int64_t* taps = nullptr;         // byte offsets from a pixel to where each run of channels starts
  int64_t tap_count = 0;
  int64_t steps = 0;                     // of four bytes in one run
  const void* panel = nullptr;           // (tap_count * steps, vectors * lanes) of four bytes
  int64_t panel_skip = 0;                // bytes of the panel to leave out after each run
  const void* next = nullptr;            // comes into the second cache meanwhile, so many bytes a step
  int64_t next_step = 0;
  int64_t columns = 0;                   // of the panel that exist
  // With Kernels::tiles also two lines of at most 16 pixels: `rows` is then that of one line.
  bool two_lines = false;
  int64_t a_line = 0, out_line = 0;      // bytes from the first line to the second
  Finish finish;
};

// rows × columns sums over pixels, added to `sums`: the gradient of a weight.
struct OuterProduct {
  const void* a = nullptr;               // (pixel, row) of four bytes: inputs, consecutive rows side by side
  int64_t a_step = 0;                    // bytes from a pixel (pair) to the next; with Kernels::tiles from row to row
  const int64_t* segments = nullptr;     // byte offsets from `a` to where each run of pixels starts
  int64_t segment_count = 0;
  int64_t steps = 0;                     // pixels (pairs) in a run
  const void* b = nullptr;               // (pixel, column) of four bytes: gradients
  int64_t b_step = 0;
  float* sums = nullptr;
  int64_t sums_row = 0;                  // floats
};

// channels × count values at any strides (bytes), to or from rows of a tile.
struct Pixels {
  void* at = nullptr;
  int64_t channel_stride = 0;
  int64_t pixel_stride = 0;
  Type type = Type::f32;
  int64_t channels = 0;
  int64_t count = 0;
};

// Where pixels lie: `row` bytes from one to the next of a line, `line` from one line to the next.
struct Grid {
  char* at;
  int64_t row, line;
};

// The points of Winograd's transforms of squares of 6 or 8 pixels a side, besides 0 and infinity: ±each. Of fractions
// of small numbers these give the least error (root mean square, beside sums in float64).
constexpr double winograd_point(int64_t size, int i) {
  constexpr double points[2][3] = {{0.75, 1.5}, {0.5, 1, 2}};
  return points[size == 8][i];
}

struct Kernels {
  const char* name;
  int lanes;                             // floats in a vector
  int rows;                              // pixels that a product takes at most
  Type type;                             // of a tile's elements: bf16 where pairs of bfloat16 are multiplied
  const Kernels* floats;                 // the same lanes, of tiles of floats
  // AMX: a product takes blocks of 16 × 16 instead of rows and vectors. A weight's gradient then reads inputs as
  // (row, pixel), a multiple of 16 rows and of 32 pixels, of which those past the last are zero.
  bool tiles;
  void (*multiply)(const Product&, int rows, int vectors);
  void (*accumulate)(const OuterProduct&, int rows, int vectors);
  void (*load)(const Pixels&, void* tile, int64_t row);
  void (*store)(const Pixels&, const void* tile, int64_t row);
  // tile[p][c] *= gate[p][c], see Finish
  void (*apply_gate)(void* tile, int64_t row, const Finish&, int64_t count, int64_t channels);
  // sums[c] += tile[p][c]
  void (*sum_pixels)(const void* tile, int64_t row, int64_t count, int64_t channels, float* sums);
  // pairs[p][c] = (tile[2p][c], tile[2p + 1][c]), bfloat16; a missing last pixel is zero
  void (*pair_pixels)(const void* tile, int64_t row, int64_t count, int64_t channels, void* pairs, int64_t pairs_row);
  // turned[c][p] = tile[p][c], bfloat16, for `tiles`
  void (*turn_pixels)(const void* tile, int64_t row, int64_t count, int64_t channels, void* turned, int64_t turned_row);
  // The frequencies of a square of size × size pixels of a tile, `step` bytes between two; whole vectors of channels.
  void (*to_frequencies)(int size, const Grid& from, int64_t channels, float* to, int64_t step);
  // Back from those of products: lines × columns of a block of results.
  void (*from_frequencies)(int size, int block, const float* from, int64_t step, const Finish&, const Grid& to,
                           int lines, int columns, int64_t channels);
  // The gradient of the frequencies' products, from that of a block of results.
  void (*spread_block)(int size, int block, const Grid& from, int64_t channels, float* to, int64_t step);
  // M f Mᵀ for `count` squares of in × in numbers f that lie side by side; M, `matrix`, is out × in. Steps in bytes.
  void (*transform_sides)(int out, int in, const float* matrix, const float* from, int64_t from_step, float* to,
                          int64_t to_step, int64_t count);
  // before and after a thread's products; they keep 64 bytes in `state`. Null where there is nothing to do
  void (*begin)(void* state);
  void (*end)(const void* state);
  // multiply-adds without memory, for the machine's limit; returns how many FLOP it did
  double (*peak)(int64_t rounds, float* sink);
};

// Pixels that the gradient of a weight takes at a time with Kernels::tiles, and rows of its sums.
constexpr int64_t tile_depth = 32, tile_height = 16;

// Vectors that a product takes at most: 14 × 2 sums fill 28 of AVX-512's 32 registers.
constexpr int max_vectors = 2;

extern const Kernels portable_kernels;
#if NIN_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, avx512_amx_kernels;
#endif

}  // namespace nin
