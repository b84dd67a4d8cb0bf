// Convolution by Winograd's minimal filtering F(m × m, k × k): the input transform turns a tile of size × size pixels
// into as many components, size = m + k - 1; each component is one GEMM over channels; the output transform turns their
// products into m × m pixels. A tile takes size² products instead of m²k²: 64 instead of 400 for F(4 × 4, 5 × 5).
// S. Winograd, "Arithmetic Complexity of Computations" (1980); for convolutions A. Lavin and S. Gray, "Fast Algorithms
// for Convolutional Neural Networks" (2016), whose names Aᵀ, Bᵀ and G of the transforms are used here.
#pragma once

#include "tiling.hpp"

namespace nin {

// Rounds up to an odd number of cache lines, so that components this far apart map to different sets of the caches.
inline int64_t odd_cache_lines(int64_t bytes) { return round_up(bytes, 64) | 64; }

// A rectangle of Winograd tiles of one image; `line` and `column` are the first output pixel.
struct WinogradTiles {
  int64_t image, line, column;
  int64_t tiles_down, tiles_across;

  int64_t count() const { return tiles_down * tiles_across; }
};

// The components of tiles in memory; strides in bytes.
struct TransformedTiles {
  char* data;
  int64_t tile_stride, component_stride;
};

// How a tile is computed: 0 in the Winograd domain, all of it; else `by_taps`, or the set of the outputs whose taps read
// zeros only, so that they are the bias.
using TileMark = uint64_t;
constexpr TileMark by_taps = TileMark(1) << 63;
constexpr TileMark output_bit(int line, int column) { return TileMark(1) << (8 * line + column); }

// A range of magnitudes (dynamic_range.hpp); zero is in all but `no_inputs`.
struct InputRange {
  int32_t smallest, largest;
};
constexpr InputRange all_inputs{0, 243 << 23}, no_inputs{0, -1};

// A layer's packed weights in memory: those of the components, then the weights themselves, then the range of inputs.
struct WinogradWeights {
  Panels components, taps;
  int64_t taps_offset, range_offset;

  WinogradWeights(const Kernels& float_kernels, int64_t size, int64_t kernel, int64_t channels, int64_t columns)
      : components(float_kernels, columns, size * size * channels),
        taps(float_kernels, columns, kernel * kernel * channels), taps_offset(components.bytes(float_kernels)),
        range_offset(taps_offset + taps.bytes(float_kernels)) {}
  int64_t bytes() const { return range_offset + int64_t(sizeof(InputRange)); }
};

// What the tiles read: a window of the input, with padding.
Window input_window(const nin_chain& chain, int64_t size, const WinogradTiles& tiles);
// Applies the input transform to the tiles of a copied window, but to those that are marked `by_taps`: of these the
// components are the pixels, as floats.
void transform_input_tiles(const Kernels& k, const nin_chain& chain, int64_t size, const WinogradTiles& tiles,
                           const PixelGrid& copy, const TileMark* marks, const TransformedTiles& to);

class Winograd {
 public:
  // Returns the input tile size that the cost model estimates to be fastest, or 0 for direct convolution.
  static int64_t choose_tile_size(const Kernels& k, const nin_chain& p, int64_t columns);
  // G, size × kernel: the powers of 0, the interpolation points and infinity, over the denominators of the Lagrange
  // polynomials. The filter transform is G w Gᵀ, applied before packing.
  static void filter_transform_matrix(int64_t size, int64_t kernel, double* matrix);
  static std::vector<float> filter_transform_matrix(int64_t size, int64_t kernel);

  // `pixel_bytes`: scratch of a pixel in the layers that follow.
  Winograd(const Kernels& k, const nin_chain& p, int64_t size, int64_t columns, int64_t pixel_bytes, int64_t threads);

  int64_t tasks() const { return tile_grid_.count(); }
  // The output pixels of a task; if they are of several images, `lines` counts those of all of them.
  Tile tile(int64_t task) const;
  int64_t max_pixels() const { return max_tiles_ * output_tile_ * output_tile_; }
  int64_t weight_bytes() const { return tile_size_ * tile_size_ * chain_.channels * columns_ * 4; }
  int64_t scratch_bytes() const {
    return copy_bytes_ + magnitudes_bytes_ + marks_bytes_ + transformed_bytes_ + products_bytes_;
  }
  // `out`: where the output pixels go; `epilogue`: of all columns; `part`: the panels to compute.
  void run(const Tile& t, const ImageView& x, const void* weight, const Epilogue& epilogue, const PixelGrid& out,
           const Panels& part, char* scratch) const;

 private:
  double cost() const;
  void mark_tiles(const WinogradTiles& tiles, const Tile& t, const PixelGrid& copy, const InputRange& range,
                  int32_t* memory, TileMark* marks) const;
  void convolve(const char* pixels, const char* panel, int vectors, const Epilogue& epilogue, const PixelGrid& out,
                int lines, int columns, int64_t channels) const;
  void set_zero_outputs(TileMark zeros, int vectors, const Epilogue& epilogue, const PixelGrid& out,
                        int64_t channels) const;
  int64_t images(const Tile& t) const { return whole_images_ ? t.lines / chain_.out_height : 1; }

  const Kernels& k_;              // for the copy and the transforms
  const Kernels& float_kernels_;  // for the GEMMs
  nin_chain chain_;
  int64_t tile_size_, output_tile_, columns_;
  int64_t tiles_down_, tiles_across_;                       // of an image
  bool whole_images_ = false;                               // a task takes whole images, else tiles of one image
  TileGrid tile_grid_;                                      // of images or of Winograd tiles
  int64_t across_ = 0, max_tiles_ = 0;                      // scratch of a task is for as many: in a line, in all
  int64_t copy_row_bytes_, copy_line_stride_ = 0;           // of the copied input
  int64_t input_tile_stride_, input_component_stride_ = 0;  // bytes between tiles and between components
  int64_t product_tile_stride_, product_component_stride_ = 0;
  std::vector<int64_t> tap_offsets_;  // in a tile whose components are its pixels
  int64_t copy_bytes_ = 0, magnitudes_bytes_ = 0, marks_bytes_ = 0, transformed_bytes_ = 0, products_bytes_ = 0;
};

}  // namespace nin
