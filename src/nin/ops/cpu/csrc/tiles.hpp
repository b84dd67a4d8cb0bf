// The geometry of tiles: which pixels a task works on, where they lie, and one layer applied to them.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "library.hpp"

namespace nin {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t size_of(Type type) { return type == Type::bf16 ? 2 : 4; }

// Bytes from pixel to pixel of a tile: whole vectors, whole cache lines, and no multiple of 4096, at which the
// rows of a product would all fall into one set of the first cache.
inline int64_t tile_row(const Kernels& k, int64_t channels) {
  const int64_t bytes = round_up(round_up(channels, k.lanes) * size_of(k.type), 64);
  return bytes % 4096 == 0 ? bytes + 64 : bytes;
}

// Channels as a sum takes them: pairs of bfloat16 want an even number, the odd one out is a zero.
inline int64_t padded_channels(const Kernels& k, int64_t channels) {
  return k.type == Type::bf16 ? round_up(channels, 2) : channels;
}
inline int64_t steps_of(const Kernels& k, int64_t channels) {
  return padded_channels(k, channels) * size_of(k.type) / 4;
}

// Images as bytes: where they start and how far apart neighbours lie.
struct Images {
  char* at;
  int64_t n, c, h, w;

  // lines, and images, that follow each other at the distance of their pixels
  bool lines_follow(int64_t width) const { return h == width * w; }
  bool images_follow(int64_t pixels) const { return n == pixels * w; }
  char* pixel(int64_t image, int64_t row, int64_t column) const { return at + image * n + row * h + column * w; }
};

inline Images images(const void* at, const int64_t (&strides)[4], int64_t size) {
  return {static_cast<char*>(const_cast<void*>(at)), strides[0] * size, strides[1] * size, strides[2] * size,
          strides[3] * size};
}

// Pairs of bfloat16: what stands beside an odd last channel is multiplied with a zero, and must be a number.
inline void zero_odd_channel(const Kernels& k, int64_t channels, char* at, int64_t row, int64_t pixels) {
  if (padded_channels(k, channels) == channels) return;
  for (int64_t i = 0; i < pixels; ++i) std::memset(at + i * row + channels * 2, 0, 2);
}

// Part of an image, and of the zeros around it.
struct Window {
  int64_t image, top, left, lines, columns;
};

inline void copy_bordered(const Kernels& k, const nin_problem& p, const Images& x, const Window& w, const Grid& to) {
  const int64_t first = std::clamp<int64_t>(-w.left, 0, w.columns);
  const int64_t last = std::clamp<int64_t>(p.width - w.left, first, w.columns);
  for (int64_t i = 0; i < w.lines; ++i) {
    char* line = to.at + i * to.line;
    if (w.top + i < 0 || w.top + i >= p.height) {
      std::memset(line, 0, w.columns * to.row);
      continue;
    }
    std::memset(line, 0, first * to.row);
    if (first < last) {
      k.load({x.pixel(w.image, w.top + i, w.left + first), x.c, x.w, Type(p.type), p.channels, last - first},
             line + first * to.row, to.row);
      zero_odd_channel(k, p.channels, line + first * to.row, to.row, last - first);
    }
    std::memset(line + last * to.row, 0, (w.columns - last) * to.row);
  }
}

// A layer as the kernels take it.
struct Layer {
  const void* weight;
  std::vector<float> bias;  // padded with zeros to whole panels; empty where there is none
  int64_t channels;
  Activation activation;
};

inline std::vector<float> read_bias(const Kernels& k, const nin_layer& layer, Type type) {
  if (!layer.bias) return {};
  std::vector<float> bias(round_up(layer.channels, max_vectors * k.lanes));
  for (int64_t c = 0; c < layer.channels; ++c) {
    if (type == Type::f32) {
      bias[c] = static_cast<const float*>(layer.bias)[c];
    } else {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(layer.bias)[c]) << 16;
      std::memcpy(&bias[c], &bits, 4);
    }
  }
  return bias;
}

inline std::vector<Layer> read_layers(const Kernels& k, const nin_problem& problem, const nin_layer* layers) {
  std::vector<Layer> read;
  for (int64_t i = 0; i < problem.layers; ++i) {
    read.push_back({layers[i].weight, read_bias(k, layers[i], Type(problem.type)), layers[i].channels,
                    Activation(layers[i].activation)});
  }
  return read;
}

// The pixels of a result, cut into rectangles of lines × columns.
struct Cut {
  int64_t batch, height, width;
  int64_t lines, columns;            // of a tile, at most
  int64_t down, across;              // tiles in an image

  int64_t tiles() const { return batch * down * across; }
};

struct Tile {
  int64_t image, line, column, lines, columns;
  int64_t pixels() const { return lines * columns; }
};

// Few tiles are shared out evenly among the threads; among many it does not matter.
constexpr int64_t many_tiles_per_thread = 8;

// The least number of parts, at least `parts`, of which all images' tiles are a multiple of `threads`.
inline int64_t even_parts(int64_t parts, int64_t size, int64_t others, int64_t threads) {
  for (int64_t n = parts; n <= std::min(size, parts + threads); ++n) {
    if (n * others % threads == 0 || n * others >= many_tiles_per_thread * threads) return n;
  }
  return parts;
}

// `pixels`: how many a tile has at most; `threads`: to keep busy, 1 where the cut must not depend on them.
inline Cut cut(int64_t batch, int64_t height, int64_t width, int64_t pixels, int64_t threads) {
  threads = std::max<int64_t>(1, threads);
  pixels = std::max<int64_t>(1, std::min(pixels, divide_up(batch * height * width, threads)));
  int64_t across = divide_up(width, pixels);
  if (height == 1) across = even_parts(across, width, batch, threads);
  const int64_t columns = divide_up(width, across);
  int64_t down = divide_up(height, std::max<int64_t>(1, pixels / columns));
  if (height > 1) down = even_parts(down, height, batch * across, threads);
  return {batch, height, width, divide_up(height, down), columns, down, across};
}

inline Tile tile_of(const Cut& cut, int64_t task) {
  const int64_t across = task % cut.across, down = task / cut.across % cut.down;
  Tile t{task / cut.across / cut.down, cut.height * down / cut.down, cut.width * across / cut.across, 0, 0};
  t.lines = cut.height * (down + 1) / cut.down - t.line;
  t.columns = cut.width * (across + 1) / cut.across - t.column;
  return t;
}

// Lines that follow each other.
inline Grid dense(char* at, int64_t row, int64_t columns) { return {at, row, row * columns}; }

// The panels of a packed weight, of which a product takes those in [begin, end). All but the last are max_vectors wide.
struct Panels {
  int64_t columns, width, count, full_bytes;
  int64_t begin = 0, end = count;

  Panels(const Kernels& k, int64_t columns, int64_t steps)
      : columns(columns), width(max_vectors * k.lanes), count(divide_up(columns, width)),
        full_bytes(steps * width * 4) {}
  int vectors(const Kernels& k, int64_t panel) const {
    return int(std::min<int64_t>(max_vectors, divide_up(columns - panel * width, k.lanes)));
  }
};

// Weights from which on a panel is fetched ahead: they do not stay in the second cache beside a tile.
constexpr int64_t fetched_weights_bytes = 512 << 10;

// Bytes that a thread reads next.
struct Region {
  const char* at = nullptr;
  int64_t bytes = 0;
};

// Shares out the fetching of a region into the second cache among the products over `pixels`.
class Fetch {
 public:
  Fetch(const Region& region, int64_t pixels) : at_(region.at), per_pixel_(region.bytes / pixels) {}
  // products of `rows` pixels from now on; a step fetches that many bytes
  void share(Product& p, int64_t rows) const {
    p.next_step = per_pixel_ == 0 ? 0 : per_pixel_ * rows / std::max<int64_t>(1, p.steps * p.tap_count);
  }
  void place(Product& p, int64_t pixel) const { p.next = at_ + per_pixel_ * pixel; }

 private:
  const char* at_;
  int64_t per_pixel_;
};

// What comes in while panel j is multiplied: the next panel, where the weights do not stay in the second cache beside a
// tile, else a part of what the next tile reads.
inline Region beside_panel(const Panels& panels, const char* weight, int64_t j, const Region& later) {
  if (panels.count * panels.full_bytes >= fetched_weights_bytes) {
    return {weight + (j + 1 < panels.end ? j + 1 : panels.begin) * panels.full_bytes, panels.full_bytes};
  }
  const int64_t count = panels.end - panels.begin, bytes = later.bytes / count;
  return {later.at + (j - panels.begin) * bytes, bytes};
}

// Around a thread's products.
class Use {
 public:
  explicit Use(const Kernels& k) : k_(k) {
    if (k_.begin) k_.begin(state_);
  }
  ~Use() {
    if (k_.end) k_.end(state_);
  }
  Use(const Use&) = delete;

 private:
  const Kernels& k_;
  alignas(64) char state_[64];
};

// A product over a tile: `p` says what is common to all its parts, `later` what the thread reads after it.
inline void multiply_tile(const Kernels& k, Product p, const Grid& a, const Grid& out, const Grid& derivative,
                          const Grid& gate, int64_t lines, int64_t columns, const Panels& panels,
                          const Region& later = {}) {
  const auto follows = [columns](const Grid& g) { return !g.at || g.line == g.row * columns; };
  if (follows(a) && follows(out) && follows(derivative) && follows(gate)) {
    columns *= lines;
    lines = 1;
  }
  const int64_t groups = divide_up(columns, k.rows);
  const int64_t out_size = size_of(p.finish.out_type);
  const int64_t gate_size = p.finish.gate_is_result ? size_of(k.type) : 4;
  const char* panel = static_cast<const char*>(p.panel);
  const float* bias = p.finish.bias;
  p.a_row = a.row, p.finish.out_row = out.row, p.finish.derivative_row = derivative.row, p.finish.gate_row = gate.row;
  for (int64_t j = panels.begin; j < panels.end; ++j) {
    const int64_t from = j * panels.width;
    p.panel = panel + j * panels.full_bytes;
    p.columns = panels.columns - from;
    if (bias) p.finish.bias = bias + from;
    const Fetch next(beside_panel(panels, panel, j, later), lines * columns);
    next.share(p, divide_up(columns, groups));
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = columns * g / groups, rows = columns * (g + 1) / groups - first;
        const auto at = [&](const Grid& grid, int64_t size) {
          return grid.at ? grid.at + line * grid.line + first * grid.row + from * size : nullptr;
        };
        p.a = a.at + line * a.line + first * a.row;
        p.finish.out = at(out, out_size);
        p.finish.derivative = reinterpret_cast<float*>(at(derivative, 4));
        p.finish.gate = at(gate, gate_size);
        next.place(p, line * columns + first);
        k.multiply(p, int(rows), panels.vectors(k, j));
      }
    }
  }
}

}  // namespace nin
