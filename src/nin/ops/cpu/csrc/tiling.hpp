// The tiles of an image and their memory layout, and the loop over micro-kernel calls that applies a layer to a tile.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "c_api.hpp"
#include "kernels.hpp"

namespace nin {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t element_size(DataType type) { return type == DataType::bf16 ? 2 : 4; }

// Bytes from pixel to pixel of a tile: whole vectors, whole cache lines, and no multiple of 4096, which would map all
// rows to one set of the L1 cache.
inline int64_t tile_row_bytes(const Kernels& k, int64_t channels) {
  const int64_t bytes = round_up(round_up(channels, k.lanes) * element_size(k.tile_type), 64);
  return bytes % 4096 == 0 ? bytes + 64 : bytes;
}

// Channels with padding: dot products of bfloat16 pairs need an even number, so an odd one gets a zero channel.
inline int64_t padded_channels(const Kernels& k, int64_t channels) {
  return k.tile_type == DataType::bf16 ? round_up(channels, 2) : channels;
}
inline int64_t k_steps_of(const Kernels& k, int64_t channels) {
  return padded_channels(k, channels) * element_size(k.tile_type) / 4;
}

// A batch of images with strides in bytes.
struct ImageView {
  char* data;
  int64_t n_stride, c_stride, h_stride, w_stride;

  bool lines_contiguous(int64_t width) const { return h_stride == width * w_stride; }
  bool images_contiguous(int64_t pixels) const { return n_stride == pixels * w_stride; }
  char* pixel(int64_t image, int64_t line, int64_t column) const {
    return data + image * n_stride + line * h_stride + column * w_stride;
  }
};

inline ImageView image_view(const void* at, const int64_t (&strides)[4], int64_t size) {
  return {static_cast<char*>(const_cast<void*>(at)), strides[0] * size, strides[1] * size, strides[2] * size,
          strides[3] * size};
}

// Clears the padding channel, as the kernels' `load` does.
inline void zero_odd_channel(const Kernels& k, int64_t channels, char* at, int64_t row, int64_t pixels) {
  if (padded_channels(k, channels) == channels) return;
  for (int64_t i = 0; i < pixels; ++i) std::memset(at + i * row + channels * 2, 0, 2);
}

// A rectangle of an image that may reach into the padding around it.
struct Window {
  int64_t image, top, left, lines, columns;
};

// A part of a line.
struct ColumnRange {
  int64_t first, last;
};

// The columns of a window that are inside the image.
inline ColumnRange columns_inside_image(const nin_chain& chain, const Window& w) {
  const int64_t first = std::clamp<int64_t>(-w.left, 0, w.columns);
  return {first, std::clamp<int64_t>(chain.width - w.left, first, w.columns)};
}

// Copies a window, with zeros where it reaches past the image.
inline void copy_padded(const Kernels& k, const nin_chain& chain, const ImageView& x, const Window& w,
                        const PixelGrid& to) {
  const auto [first, last] = columns_inside_image(chain, w);
  for (int64_t i = 0; i < w.lines; ++i) {
    char* line = to.data + i * to.line_stride;
    if (w.top + i < 0 || w.top + i >= chain.height) {
      std::memset(line, 0, w.columns * to.pixel_stride);
      continue;
    }
    std::memset(line, 0, first * to.pixel_stride);
    if (first < last) {
      k.load({x.pixel(w.image, w.top + i, w.left + first), x.c_stride, x.w_stride, DataType(chain.type), chain.channels,
              last - first},
             line + first * to.pixel_stride, to.pixel_stride);
    }
    std::memset(line + last * to.pixel_stride, 0, (w.columns - last) * to.pixel_stride);
  }
}

// Consecutive taps along one dimension of the kernel.
struct TapRange {
  int64_t first, last;

  int64_t count() const { return last - first; }
  bool operator==(const TapRange&) const = default;
};

// For each output line (side 0) or column (side 1), the taps that do not fall into the padding.
inline std::vector<TapRange> taps_inside_image(const nin_chain& chain, int side, int64_t size, int64_t out_size) {
  std::vector<TapRange> ranges;
  ranges.reserve(size_t(out_size));
  const int64_t kernel = chain.kernel[side], dilation = chain.dilation[side];
  for (int64_t i = 0; i < out_size; ++i) {
    const int64_t start = i * chain.stride[side] - chain.padding[side];
    const int64_t first = std::min(kernel, ceil_div(std::max<int64_t>(-start, 0), dilation));
    const int64_t last = std::min(kernel, ceil_div(std::max<int64_t>(size - start, 0), dilation));
    ranges.push_back({first, std::max(first, last)});
  }
  return ranges;
}

// A layer with its bias in float.
struct Layer {
  const void* weight;
  std::vector<float> bias;  // zero-padded to whole panels; empty without one
  int64_t channels;
  Activation activation;
};

inline std::vector<float> read_bias(const Kernels& k, const nin_layer& layer, DataType type) {
  if (!layer.bias) return {};
  std::vector<float> bias(round_up(layer.channels, max_vectors * k.lanes));
  for (int64_t c = 0; c < layer.channels; ++c) {
    if (type == DataType::f32) {
      bias[c] = static_cast<const float*>(layer.bias)[c];
    } else {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(layer.bias)[c]) << 16;
      std::memcpy(&bias[c], &bits, 4);
    }
  }
  return bias;
}

inline std::vector<Layer> read_layers(const Kernels& k, const nin_chain& chain, const nin_layer* layers) {
  std::vector<Layer> read;
  for (int64_t i = 0; i < chain.layers; ++i) {
    read.push_back({layers[i].weight, read_bias(k, layers[i], DataType(chain.type)), layers[i].channels,
                    Activation(layers[i].activation)});
  }
  return read;
}

// The output pixels, divided into rectangular tiles.
struct TileGrid {
  int64_t batch, height, width;
  int64_t lines, columns;            // of the largest tile
  int64_t tiles_down, tiles_across;  // of an image

  int64_t count() const { return batch * tiles_down * tiles_across; }
};

struct Tile {
  int64_t image, line, column, lines, columns;
  int64_t pixels() const { return lines * columns; }
};

// With fewer tiles than this the number is made a multiple of the threads; beyond, the imbalance is small.
constexpr int64_t many_tiles_per_thread = 8;

// Returns the smallest number of parts, at least `parts`, for which parts × others is a multiple of `threads`.
inline int64_t balanced_parts(int64_t parts, int64_t size, int64_t others, int64_t threads) {
  for (int64_t n = parts; n <= std::min(size, parts + threads); ++n) {
    if (n * others % threads == 0 || n * others >= many_tiles_per_thread * threads) return n;
  }
  return parts;
}

// `pixels`: the largest number in a tile; `threads`: to balance, 1 where the grid must not depend on their number.
inline TileGrid make_tile_grid(int64_t batch, int64_t height, int64_t width, int64_t pixels, int64_t threads) {
  threads = std::max<int64_t>(1, threads);
  pixels = std::max<int64_t>(1, std::min(pixels, ceil_div(batch * height * width, threads)));
  int64_t across = ceil_div(width, pixels);
  if (height == 1) across = balanced_parts(across, width, batch, threads);
  const int64_t columns = ceil_div(width, across);
  int64_t down = ceil_div(height, std::max<int64_t>(1, pixels / columns));
  if (height > 1) down = balanced_parts(down, height, batch * across, threads);
  return {batch, height, width, ceil_div(height, down), columns, down, across};
}

inline Tile tile_at(const TileGrid& grid, int64_t task) {
  const int64_t across = task % grid.tiles_across, down = task / grid.tiles_across % grid.tiles_down;
  Tile t{task / grid.tiles_across / grid.tiles_down, grid.height * down / grid.tiles_down,
         grid.width * across / grid.tiles_across, 0, 0};
  t.lines = grid.height * (down + 1) / grid.tiles_down - t.line;
  t.columns = grid.width * (across + 1) / grid.tiles_across - t.column;
  return t;
}

// Lines that are contiguous.
inline PixelGrid dense_grid(char* at, int64_t row, int64_t columns) { return {at, row, row * columns}; }

// The panels of a packed weight, of which a GEMM uses [begin, end). All but the last are max_vectors wide.
struct Panels {
  int64_t columns, width, count, full_bytes;
  int64_t begin = 0, end = count;

  Panels(const Kernels& k, int64_t columns, int64_t steps)
      : columns(columns), width(max_vectors * k.lanes), count(ceil_div(columns, width)), full_bytes(steps * width * 4) {
  }
  int vectors(const Kernels& k, int64_t panel) const {
    return int(std::min<int64_t>(max_vectors, ceil_div(columns - panel * width, k.lanes)));
  }
  int64_t panel_bytes(const Kernels& k, int64_t panel) const { return vectors(k, panel) * full_bytes / max_vectors; }
  int64_t bytes(const Kernels& k) const { return (count - 1) * full_bytes + panel_bytes(k, count - 1); }
};

// Weights of this size or more do not stay in the L2 cache beside a tile: the next panel is prefetched.
constexpr int64_t prefetched_weights_bytes = 512 << 10;

// What a thread reads next.
struct MemoryRange {
  const char* data = nullptr;
  int64_t bytes = 0;
};

// Spreads the prefetch of a memory range into the L2 cache over the GEMM calls of `pixels`.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const MemoryRange& region, int64_t pixels) : data_(region.data), bytes_per_pixel_(region.bytes / pixels) {}
  // for calls of `rows` pixels from now on
  void set_rate(GemmArguments& args, int64_t rows) const {
    args.prefetch_bytes_per_step =
        bytes_per_pixel_ == 0 ? 0 : bytes_per_pixel_ * rows / std::max<int64_t>(1, args.k_steps * args.tap_count);
  }
  void set_address(GemmArguments& args, int64_t pixel) const { args.prefetch = data_ + bytes_per_pixel_ * pixel; }

 private:
  const char* data_ = nullptr;
  int64_t bytes_per_pixel_ = 0;
};

// What to prefetch while panel j is multiplied: a part of the next tile's input, if it is known and the weights stay in
// the L2 cache, else the next panel.
inline MemoryRange prefetch_during_panel(const Kernels& k, const Panels& panels, const char* weight, int64_t j,
                                         const MemoryRange& next_input) {
  const bool large = panels.count * panels.full_bytes >= prefetched_weights_bytes;
  if (!large && next_input.bytes > 0) {
    const int64_t count = panels.end - panels.begin, bytes = next_input.bytes / count;
    return {next_input.data + (j - panels.begin) * bytes, bytes};
  }
  if (!large && j + 1 == panels.end) return {};
  const int64_t next = j + 1 < panels.end ? j + 1 : panels.begin;  // from the first on for the next tile
  return {weight + next * panels.full_bytes, panels.panel_bytes(k, next)};
}

// Holds the register state that an instruction set needs (AMX's tile configuration) during a thread's GEMMs.
class InstructionSetScope {
 public:
  explicit InstructionSetScope(const Kernels& k) : k_(k) {
    if (k_.enter) k_.enter(state_);
  }
  ~InstructionSetScope() {
    if (k_.leave) k_.leave(state_);
  }
  InstructionSetScope(const InstructionSetScope&) = delete;

 private:
  const Kernels& k_;
  alignas(64) char state_[64];
};

// A GEMM over a whole tile, in micro-kernel calls. `args`: what all calls have in common; `next_input`: what the thread
// reads afterwards. Grids without data are not used.
inline void gemm_tile(const Kernels& k, GemmArguments args, const PixelGrid& a, const PixelGrid& out,
                      const PixelGrid& derivative, const PixelGrid& gate, int64_t lines, int64_t columns,
                      const Panels& panels, const MemoryRange& next_input = {}) {
  const auto contiguous = [columns](const PixelGrid& g) {
    return !g.data || g.line_stride == g.pixel_stride * columns;
  };
  if (contiguous(a) && contiguous(out) && contiguous(derivative) && contiguous(gate)) {
    columns *= lines;
    lines = 1;
  }
  const int64_t groups = ceil_div(columns, k.max_rows);
  const int64_t out_size = element_size(args.epilogue.out_type);
  const int64_t gate_size = args.epilogue.gate_is_relu_output ? element_size(k.tile_type) : 4;
  const char* panel = static_cast<const char*>(args.panel);
  const float* bias = args.epilogue.bias;
  args.a_row_stride = a.pixel_stride, args.epilogue.out_row_stride = out.pixel_stride,
  args.epilogue.derivative_row_stride = derivative.pixel_stride, args.epilogue.gate_row_stride = gate.pixel_stride;
  for (int64_t j = panels.begin; j < panels.end; ++j) {
    const int64_t from = j * panels.width;
    args.panel = panel + j * panels.full_bytes;
    args.columns = panels.columns - from;
    if (bias) args.epilogue.bias = bias + from;
    const Prefetch prefetch(prefetch_during_panel(k, panels, panel, j, next_input), lines * columns);
    prefetch.set_rate(args, ceil_div(columns, groups));
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = columns * g / groups, rows = columns * (g + 1) / groups - first;
        const auto at = [&](const PixelGrid& grid, int64_t size) {
          return grid.data ? grid.data + line * grid.line_stride + first * grid.pixel_stride + from * size : nullptr;
        };
        args.a = a.data + line * a.line_stride + first * a.pixel_stride;
        args.epilogue.out = at(out, out_size);
        args.epilogue.derivative = reinterpret_cast<float*>(at(derivative, 4));
        args.epilogue.gate = at(gate, gate_size);
        prefetch.set_address(args, line * columns + first);
        k.gemm(args, int(rows), panels.vectors(k, j));
      }
    }
  }
}

}  // namespace nin
