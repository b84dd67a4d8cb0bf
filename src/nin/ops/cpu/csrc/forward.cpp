// The forward pass: each task takes a tile of pixels through all layers; hidden layers never leave the scratch.
#include <cstring>
#include <new>
#include <optional>

#include "parallel.hpp"
#include "tiles.hpp"
#include "winograd.hpp"

namespace nin {
namespace {

// Pixels of a tile. Enough to use each panel of weights several times while it lies in the first cache, few
// enough that the hidden layers stay in the second.
constexpr int64_t tile_pixels = 128;
// Bytes of scratch that a tile may take before it is made smaller: half of the smallest usual second cache. Weights
// that do not fit there are read once for each tile: then a larger tile costs less than reading them more often.
constexpr int64_t tile_bytes = 512 << 10, wide_tile_bytes = 2 << 20;

// Weights that do not fit a second cache. A single tile's layers are then shared out by columns, so that each thread
// reads only its part of them.
constexpr int64_t large_weights_bytes = 1 << 20;
// Fewer panels than threads, and than this, keep too few of them busy: then it is better to read the weights often.
constexpr int64_t enough_panels = 4;

// A result that no cache holds is written past them where few products make a number: with 64 channels in and 256 out
// that takes 5 % off the time, with 192 in and 192 out nothing.
constexpr int64_t streamed_bytes = 16 << 20, streamed_products = 128;

// Lines that a tile must have for its edge columns to be taken one by one: fewer pixels at a time read the weights
// too often.
constexpr int64_t least_edge_lines = 4;

// Consecutive taps along one side of the kernel.
struct Range {
  int64_t first, last;

  int64_t count() const { return last - first; }
  bool operator==(const Range&) const = default;
};

// The taps along one side (0: height, 1: width) that reach into the image; the others would only add zeros.
std::vector<Range> inside(const nin_problem& p, int side, int64_t size, int64_t out_size) {
  std::vector<Range> ranges;
  const int64_t kernel = p.kernel[side], dilation = p.dilation[side];
  for (int64_t i = 0; i < out_size; ++i) {
    const int64_t start = i * p.stride[side] - p.padding[side];
    const int64_t first = std::min(kernel, divide_up(std::max<int64_t>(-start, 0), dilation));
    const int64_t last = std::min(kernel, divide_up(std::max<int64_t>(size - start, 0), dilation));
    ranges.push_back({first, std::max(first, last)});
  }
  return ranges;
}

class Forward {
 public:
  Forward(const Kernels& k, const nin_problem& problem, const nin_layer* layers, const void* x, void* y,
          int64_t threads);
  int64_t scratch_bytes() const { return input_bytes_ + hidden_count_ * hidden_bytes_ + out_bytes_; }
  nin_status run(const nin_pool& pool) const;

 private:
  void flatten();
  void choose_tiles(int64_t threads);
  void reserve_results(int64_t pixels);
  void place_taps();
  Tile tile(int64_t task) const { return winograd_ ? winograd_->tile(task) : tile_of(cut_, task); }
  int64_t tasks() const { return winograd_ ? winograd_->tasks() : cut_.tiles(); }
  bool writes_past_caches() const;
  void run_tile(int64_t task, char* scratch) const;
  Grid apply(size_t layer, const Tile& t, const Grid& a, char* tiles, const Panels& panels,
             const Region& later = {}) const;
  Region input_of(int64_t task) const;
  Panels panels(size_t layer) const;
  Grid hidden(size_t layer, const Tile& t, char* tiles) const {
    return dense(tiles + layer % hidden_count_ * hidden_bytes_, hidden_row_, t.columns);
  }
  Grid input(const Tile& t, char* scratch) const;
  Grid bordered_input(const Tile& t, char* scratch) const;
  void multiply_bordered(const Tile& t, Product p, const Grid& a, const Grid& out, const Panels& panels) const;

  const Kernels& k_;
  nin_problem p_;
  Type type_;
  Images x_, y_;
  std::vector<Layer> layers_;
  std::optional<Winograd> winograd_;  // computes the first layer
  Cut cut_ = {};
  std::vector<int64_t> taps_;
  std::vector<Range> line_ranges_, column_ranges_;  // the taps that reach into the image, for each of the result's
  int64_t threads_;
  int64_t run_channels_ = 0;     // consecutive channels that one tap reads
  bool pointwise_ = false;       // a 1×1 convolution without padding
  bool direct_ = false;          // the products read x where it lies
  bool direct_out_ = false;      // and write y where it lies
  bool streams_ = false;         // past the caches
  bool by_columns_ = false;      // one tile, whose layers are shared out by panels of their weights
  int64_t in_row_ = 0;           // bytes from pixel to pixel of the input's copy
  int64_t border_width_ = 0;     // pixels in a line of the bordered copy
  int64_t hidden_row_ = 0, hidden_count_ = 0, out_row_ = 0;
  int64_t input_bytes_ = 0, hidden_bytes_ = 0, out_bytes_ = 0;
};

Forward::Forward(const Kernels& k, const nin_problem& problem, const nin_layer* layers, const void* x, void* y,
                 int64_t threads)
    : k_(k), p_(problem), type_(Type(problem.type)), threads_(threads) {
  const int64_t size = size_of(type_);
  x_ = images(x, problem.x_stride, size);
  y_ = images(y, problem.y_stride, size);
  layers_ = read_layers(k, problem, layers);
  pointwise_ = p_.kernel[0] == 1 && p_.kernel[1] == 1 && p_.padding[0] == 0 && p_.padding[1] == 0;
  if (pointwise_ && p_.stride[0] == 1 && p_.stride[1] == 1) flatten();
  direct_ = pointwise_ && x_.c == size && type_ == k.type && padded_channels(k, p_.channels) == p_.channels &&
            x_.w * p_.stride[1] % 4096 != 0;
  direct_out_ = y_.c == size;
  choose_tiles(threads);
  if (!winograd_) place_taps();
  streams_ = direct_out_ && !by_columns_ && writes_past_caches();
}

bool Forward::writes_past_caches() const {
  const int64_t channels = layers_.back().channels;
  int64_t products = p_.kernel[0] * p_.kernel[1] * p_.channels * layers_[0].channels;
  for (size_t i = 1; i < layers_.size(); ++i) products += layers_[i - 1].channels * layers_[i].channels;
  const bool aligned = (reinterpret_cast<uintptr_t>(y_.at) | uintptr_t(y_.n | y_.h | y_.w)) % 64 == 0;
  return aligned && p_.batch * p_.out_height * p_.out_width * channels * size_of(type_) >= streamed_bytes &&
         products <= streamed_products * channels;
}

// Pixels of a 1×1 convolution know nothing of their neighbours: lines, and images where they follow each other,
// become one long line.
void Forward::flatten() {
  if (p_.height == 1 || (x_.lines_follow(p_.width) && y_.lines_follow(p_.width))) {
    p_.width *= p_.height;
    p_.height = 1;
  }
  if (p_.height == 1 && (p_.batch == 1 || (x_.images_follow(p_.width) && y_.images_follow(p_.width)))) {
    p_.width *= p_.batch;
    p_.batch = 1;
  }
  p_.out_height = p_.height;
  p_.out_width = p_.width;
}

void Forward::choose_tiles(int64_t threads) {
  in_row_ = pointwise_ ? tile_row(k_, p_.channels) : padded_channels(k_, p_.channels) * size_of(k_.type);
  for (size_t i = 0; i + 1 < layers_.size(); ++i) {
    hidden_row_ = std::max(hidden_row_, tile_row(k_, layers_[i].channels));
  }
  out_row_ = round_up(layers_.back().channels, max_vectors * k_.lanes) * size_of(type_);
  hidden_count_ = std::clamp<int64_t>(int64_t(layers_.size()) - 1, 1, 2);
  if (p_.winograd) {
    const int64_t behind = (layers_.size() > 1 ? hidden_count_ * hidden_row_ : 0) + (direct_out_ ? 0 : out_row_);
    winograd_.emplace(k_, p_, p_.winograd, layers_[0].channels, behind, 1);
    const bool large = winograd_->weight_bytes() >= large_weights_bytes;
    by_columns_ = threads > 1 && winograd_->tasks() == 1 && large && panels(0).count >= std::min(threads, enough_panels);
    if (!by_columns_) winograd_.emplace(k_, p_, p_.winograd, layers_[0].channels, behind, threads);
    input_bytes_ = winograd_->scratch_bytes();
    return reserve_results(winograd_->most_pixels());
  }
  const int64_t per_pixel = (direct_ ? 0 : in_row_) + hidden_count_ * hidden_row_ + (direct_out_ ? 0 : out_row_);
  int64_t weights = 0;
  for (size_t i = 0; i < layers_.size(); ++i) weights += panels(i).count * panels(i).full_bytes;
  const bool large = weights >= large_weights_bytes;
  int64_t pixels = tile_pixels;
  if (per_pixel > 0) {
    pixels = std::max<int64_t>(k_.rows, std::min(pixels, (large ? wide_tile_bytes : tile_bytes) / per_pixel));
  }
  cut_ = cut(p_.batch, p_.out_height, p_.out_width, pixels, 1);
  by_columns_ = threads > 1 && cut_.tiles() == 1 && large;
  if (!by_columns_) cut_ = cut(p_.batch, p_.out_height, p_.out_width, pixels, threads);
  const int64_t most = cut_.lines * cut_.columns;
  if (pointwise_) {
    input_bytes_ = direct_ ? 0 : most * in_row_;
  } else {
    border_width_ = (cut_.columns - 1) * p_.stride[1] + p_.dilation[1] * (p_.kernel[1] - 1) + 1;
    const int64_t lines = (cut_.lines - 1) * p_.stride[0] + p_.dilation[0] * (p_.kernel[0] - 1) + 1;
    input_bytes_ = round_up(lines * border_width_ * in_row_ + 64, 64);
  }
  reserve_results(most);
}

void Forward::reserve_results(int64_t pixels) {
  hidden_bytes_ = round_up(pixels * hidden_row_, 64);
  out_bytes_ = direct_out_ ? 0 : round_up(pixels * out_row_, 64);
}

// Neighbours along a line lie side by side in the bordered copy, so undilated taps of a line are one run.
void Forward::place_taps() {
  const int64_t channels = padded_channels(k_, p_.channels);
  const bool joined = !pointwise_ && p_.dilation[1] == 1;
  run_channels_ = joined ? p_.kernel[1] * channels : channels;
  for (int64_t i = 0; i < p_.kernel[0]; ++i) {
    for (int64_t j = 0; j < (joined ? 1 : p_.kernel[1]); ++j) {
      taps_.push_back((i * p_.dilation[0] * border_width_ + j * p_.dilation[1]) * in_row_);
    }
  }
  if (pointwise_) return;
  line_ranges_ = inside(p_, 0, p_.height, p_.out_height);
  column_ranges_ = inside(p_, 1, p_.width, p_.out_width);
  if (!joined) column_ranges_.assign(size_t(p_.out_width), {0, p_.kernel[1]});
}

// What the first layer reads.
Grid Forward::input(const Tile& t, char* scratch) const {
  if (winograd_) return {scratch, 0, 0};
  if (!pointwise_) return bordered_input(t, scratch);
  const int64_t step = x_.w * p_.stride[1];
  if (direct_) {
    return {x_.pixel(t.image, t.line * p_.stride[0], t.column * p_.stride[1]), step, x_.h * p_.stride[0]};
  }
  const Grid grid = dense(scratch, in_row_, t.columns);
  for (int64_t line = 0; line < t.lines; ++line) {
    char* from = x_.pixel(t.image, (t.line + line) * p_.stride[0], t.column * p_.stride[1]);
    k_.load({from, x_.c, step, type_, p_.channels, t.columns}, grid.at + line * grid.line, in_row_);
  }
  zero_odd_channel(k_, p_.channels, grid.at, in_row_, t.pixels());
  return grid;
}

// A copy of all that the tile's taps reach, with zeros where they reach past the image.
Grid Forward::bordered_input(const Tile& t, char* scratch) const {
  const int64_t top = t.line * p_.stride[0] - p_.padding[0], left = t.column * p_.stride[1] - p_.padding[1];
  const int64_t lines = (t.lines - 1) * p_.stride[0] + p_.dilation[0] * (p_.kernel[0] - 1) + 1;
  const int64_t columns = (t.columns - 1) * p_.stride[1] + p_.dilation[1] * (p_.kernel[1] - 1) + 1;
  const int64_t line_bytes = border_width_ * in_row_;
  copy_bordered(k_, p_, x_, {t.image, top, left, lines, columns}, {scratch, in_row_, line_bytes});
  return {scratch, in_row_ * p_.stride[1], line_bytes * p_.stride[0]};
}

// The first layer where it has a border. Pixels beside each other share the taps of their line, pixels below each
// other those of their column: the inner columns are taken line by line, those at the edges column by column. Blocks of
// 16 pixels would stand half empty then: they take whole lines with the zeros beside them, short ones two at a time.
void Forward::multiply_bordered(const Tile& t, Product p, const Grid& a, const Grid& out, const Panels& panels) const {
  const Range all{0, p_.kernel[1]};
  int64_t inner = t.column, inner_end = t.column + t.columns;
  if (t.lines >= least_edge_lines && !k_.tiles) {
    while (inner < inner_end && column_ranges_[inner] != all) ++inner;
    while (inner < inner_end && column_ranges_[inner_end - 1] != all) --inner_end;
  }
  const bool joined = int64_t(taps_.size()) == p_.kernel[0];
  const int64_t taps_per_line = joined ? 1 : p_.kernel[1], steps_per_tap = steps_of(k_, run_channels_);
  const int64_t out_size = size_of(p.finish.out_type);
  const Product common = p;
  for (int64_t j = panels.begin; j < panels.end; ++j) {
    const int64_t from = j * panels.width, step_bytes = panels.vectors(k_, j) * k_.lanes * 4;
    const int64_t column_bytes = steps_per_tap / (joined ? p_.kernel[1] : 1) * step_bytes;
    p.columns = panels.columns - from;
    if (common.finish.bias) p.finish.bias = common.finish.bias + from;
    const auto strip = [&](int64_t line, int64_t column, int64_t count, int64_t a_row, int64_t out_row, Range lines,
                           Range columns) {
      p.a_row = a_row, p.finish.out_row = out_row;
      p.taps = taps_.data() + lines.first * taps_per_line;
      p.tap_count = lines.count() * taps_per_line;
      p.steps = steps_per_tap - (joined ? (p_.kernel[1] - columns.count()) * column_bytes / step_bytes : 0);
      p.panel_skip = (steps_per_tap - p.steps) * step_bytes;
      p.panel = static_cast<const char*>(common.panel) + j * panels.full_bytes +
                lines.first * taps_per_line * steps_per_tap * step_bytes + columns.first * column_bytes;
      const int64_t groups = divide_up(count, k_.rows);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = count * g / groups, rows = count * (g + 1) / groups - first;
        p.a = a.at + line * a.line + column * a.row + first * a_row + columns.first * in_row_;
        p.finish.out = out.at + line * out.line + column * out.row + first * out_row + from * out_size;
        k_.multiply(p, int(rows), panels.vectors(k_, j));
      }
    };
    const bool short_lines = k_.tiles && 2 * t.columns <= k_.rows;
    for (int64_t line = 0; inner < inner_end && line < t.lines; ++line) {
      const int64_t lines = short_lines && line + 1 < t.lines ? 2 : 1;
      p.two_lines = lines == 2;
      p.a_line = a.line, p.out_line = out.line;
      const Range reached{line_ranges_[t.line + line + lines - 1].first, line_ranges_[t.line + line].last};
      strip(line, inner - t.column, inner_end - inner, a.row, out.row, reached, all);
      line += lines - 1;
    }
    p.two_lines = false;
    // what any of the lines reaches: the lowest reaches furthest up, the topmost furthest down
    const Range lines{line_ranges_[t.line + t.lines - 1].first, line_ranges_[t.line].last};
    for (int64_t column = t.column; column < t.column + t.columns; ++column) {
      if (column == inner) column = inner_end;
      if (column == t.column + t.columns) break;
      strip(0, column - t.column, t.lines, a.line, out.line, lines, column_ranges_[column]);
    }
  }
}

Panels Forward::panels(size_t layer) const {
  const int64_t steps = layer == 0 ? p_.kernel[0] * p_.kernel[1] * steps_of(k_, p_.channels)
                                   : steps_of(k_, layers_[layer - 1].channels);
  return Panels(k_, layers_[layer].channels, steps);
}

// One layer, or some panels of it. `tiles` holds the hidden layers and the result where y cannot be written directly.
Grid Forward::apply(size_t i, const Tile& t, const Grid& a, char* tiles, const Panels& panels,
                    const Region& later) const {
  static constexpr int64_t no_offset = 0;
  const Layer& layer = layers_[i];
  const bool last = i + 1 == layers_.size();
  Product p;
  p.taps = i == 0 ? taps_.data() : &no_offset;
  p.tap_count = i == 0 ? int64_t(taps_.size()) : 1;
  p.steps = steps_of(k_, i == 0 ? run_channels_ : layers_[i - 1].channels);
  p.panel = layer.weight;
  p.finish.bias = layer.bias.empty() ? nullptr : layer.bias.data();
  p.finish.activation = layer.activation;
  p.finish.out_type = last ? type_ : k_.type;
  p.finish.round = type_ == Type::bf16 && p.finish.out_type == Type::f32;
  p.finish.whole = !last;
  p.finish.stream = last && streams_;
  char* out_tile = tiles + hidden_count_ * hidden_bytes_;
  Grid out = hidden(i, t, tiles);
  if (last) {
    out = direct_out_ ? Grid{y_.pixel(t.image, t.line, t.column), y_.w, y_.h} : dense(out_tile, out_row_, t.columns);
  }
  if (i == 0 && winograd_) {
    winograd_->run(t, x_, layer.weight, p.finish, out, panels, a.at);
  } else if (i == 0 && !pointwise_) {
    multiply_bordered(t, p, a, out, panels);
  } else {
    multiply_tile(k_, p, a, out, {}, {}, t.lines, t.columns, panels, later);
  }
  if (!last || direct_out_) return out;
  const int64_t from = panels.begin * panels.width, to = std::min(panels.columns, panels.end * panels.width);
  for (int64_t line = 0; line < t.lines; ++line) {
    k_.store({y_.pixel(t.image, t.line + line, t.column) + from * y_.c, y_.c, y_.w, type_, to - from, t.columns},
             out.at + line * out.line + from * size_of(type_), out_row_);
  }
  return out;
}

// What a tile reads, where it lies in one piece.
Region Forward::input_of(int64_t task) const {
  if (!direct_ || p_.height > 1 || task >= cut_.tiles()) return {};
  const Tile t = tile_of(cut_, task);
  const int64_t step = x_.w * p_.stride[1];
  return {x_.pixel(t.image, 0, t.column * p_.stride[1]), t.columns * step};
}

// A tile through all layers.
void Forward::run_tile(int64_t task, char* scratch) const {
  const Use use(k_);
  const Tile t = tile(task);
  Grid a = input(t, scratch);
  const Region later = input_of(task + threads_);  // the others take those in between
  for (size_t i = 0; i < layers_.size(); ++i) {
    a = apply(i, t, a, scratch + input_bytes_, panels(i), i == 0 ? later : Region{});
  }
#if NIN_X86
  if (streams_) __builtin_ia32_sfence();  // before another thread reads what was written past the caches
#endif
}

nin_status Forward::run(const nin_pool& pool) const {
  if (!by_columns_) {
    return run_tasks(pool, tasks(), size_t(scratch_bytes()),
                     [&](int64_t task, char* scratch) { run_tile(task, scratch); });
  }
  char* shared = shared_scratch.reserve(size_t(hidden_count_ * hidden_bytes_ + out_bytes_ + 64));
  if (!shared) return nin_out_of_memory;
  const Tile t = tile(0);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t parts = std::min(pool.threads, panels(i).count);
    const nin_status status = run_tasks(pool, parts, size_t(input_bytes_), [&](int64_t part, char* scratch) {
      const Use use(k_);
      Panels some = panels(i);
      const int64_t count = some.count;
      some.begin = count * part / parts, some.end = count * (part + 1) / parts;
      apply(i, t, i == 0 ? input(t, scratch) : hidden(i - 1, t, shared), shared, some);
    });
    if (status != nin_ok) return status;
  }
  shared_scratch.trim();
  return nin_ok;
}

}  // namespace
}  // namespace nin

int64_t nin_forward_scratch_bytes(const void* kernels, const nin_problem* problem, const nin_layer* layers,
                                  int64_t threads) {
  const auto& k = *static_cast<const nin::Kernels*>(kernels);
  return nin::Forward(k, *problem, layers, nullptr, nullptr, threads).scratch_bytes();
}

int32_t nin_forward(const void* kernels, const nin_problem* problem, const nin_layer* layers, const void* x, void* y,
                    const nin_pool* pool) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels);
    return nin::Forward(k, *problem, layers, x, y, pool->threads).run(*pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
