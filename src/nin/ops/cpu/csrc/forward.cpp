// The forward pass: each task takes a tile of pixels through all layers; hidden layers stay in scratch memory.
#include <cstring>
#include <new>
#include <optional>

#include "parallel.hpp"
#include "tiling.hpp"
#include "weight_hashes.hpp"
#include "winograd.hpp"

namespace nin {
namespace {

// Enough pixels to reuse each panel of weights while it is in the L1 cache, few enough that the hidden layers stay in
// the L2 cache.
constexpr int64_t tile_pixels = 128;
// Scratch of a tile: half of the smallest usual L2 cache. Weights that do not fit there are read once for each tile:
// then a larger tile costs less than reading them more often.
constexpr int64_t max_tile_bytes = 512 << 10, large_weights_max_tile_bytes = 2 << 20;

// Weights that do not fit an L2 cache. If there is a single tile, its layers are then split by columns, so that each
// thread reads only its part of the weights.
constexpr int64_t large_weights_bytes = 1 << 20;
// With fewer panels than threads, and than this, splitting by columns would keep too few threads busy.
constexpr int64_t min_panels = 4;

// An output that no cache holds is written with non-temporal stores if few multiply-adds make a value: that takes 5 %
// off the time of 64 → 256 channels, nothing off that of 192 → 192.
constexpr int64_t min_streamed_bytes = 16 << 20, max_streamed_macs = 128;

// Edge columns are computed column by column only in tiles of this many lines: calls of fewer pixels reread the weights
// too often.
constexpr int64_t min_edge_lines = 4;

class Forward {
 public:
  Forward(const Kernels& k, const nin_chain& chain, const nin_layer* layers, const void* x, void* y, int64_t threads);
  int64_t scratch_bytes() const { return input_bytes_ + hidden_buffers_ * hidden_bytes_ + out_bytes_; }
  nin_status run(const nin_thread_pool& pool) const;

 private:
  void flatten_pixels();
  void choose_tiles(int64_t threads);
  void set_buffer_sizes(int64_t pixels);
  void compute_tap_offsets();
  Tile tile(int64_t task) const { return winograd_ ? winograd_->tile(task) : tile_at(tile_grid_, task); }
  int64_t tasks() const { return winograd_ ? winograd_->tasks() : tile_grid_.count(); }
  bool output_exceeds_caches() const;
  void run_tile(int64_t task, char* scratch) const;
  PixelGrid run_layer(size_t layer, const Tile& t, const PixelGrid& a, char* tiles, const Panels& panels,
                      const MemoryRange& next_input = {}) const;
  MemoryRange input_range(int64_t task) const;
  Panels panels(size_t layer) const;
  PixelGrid hidden(size_t layer, const Tile& t, char* tiles) const {
    return dense_grid(tiles + layer % hidden_buffers_ * hidden_bytes_, hidden_row_bytes_, t.columns);
  }
  PixelGrid input(const Tile& t, char* scratch) const;
  PixelGrid padded_input(const Tile& t, char* scratch) const;
  void convolve_padded(const Tile& t, GemmArguments args, const PixelGrid& a, const PixelGrid& out,
                       const Panels& panels) const;

  const Kernels& k_;
  nin_chain chain_;
  DataType type_;
  ImageView x_, y_;
  std::vector<Layer> layers_;
  std::optional<Winograd> winograd_;  // computes the first layer
  TileGrid tile_grid_ = {};
  std::vector<int64_t> tap_offsets_;
  std::vector<TapRange> line_taps_, column_taps_;  // taps inside the image, by output line and column
  int64_t threads_;
  int64_t tap_channels_ = 0;      // contiguous channels that a tap reads
  bool pointwise_ = false;        // the first layer is 1×1 without padding
  bool reads_in_place_ = false;   // the GEMM reads x directly
  bool writes_in_place_ = false;  // the GEMM writes y directly
  bool activates_rows_ = false;   // of y, behind the GEMM: its epilogue is fast for ReLU alone
  bool non_temporal_ = false;     // stores of y
  bool splits_columns_ = false;   // a single tile, whose layers are split by panels
  int64_t in_row_bytes_ = 0;      // bytes from pixel to pixel of the copied input
  int64_t padded_width_ = 0;      // pixels in a line of the padded copy
  int64_t hidden_row_bytes_ = 0, hidden_buffers_ = 0, out_row_bytes_ = 0;
  int64_t input_bytes_ = 0, hidden_bytes_ = 0, out_bytes_ = 0;
};

Forward::Forward(const Kernels& k, const nin_chain& chain, const nin_layer* layers, const void* x, void* y,
                 int64_t threads)
    : k_(k), chain_(chain), type_(DataType(chain.type)), threads_(threads) {
  const int64_t size = element_size(type_);
  x_ = image_view(x, chain.x_stride, size);
  y_ = image_view(y, chain.y_stride, size);
  layers_ = read_layers(k, chain, layers);
  pointwise_ = chain_.kernel[0] == 1 && chain_.kernel[1] == 1 && chain_.padding[0] == 0 && chain_.padding[1] == 0;
  if (pointwise_ && chain_.stride[0] == 1 && chain_.stride[1] == 1) flatten_pixels();
  reads_in_place_ = pointwise_ && x_.c_stride == size && type_ == k.tile_type &&
                    padded_channels(k, chain_.channels) == chain_.channels &&
                    x_.w_stride * chain_.stride[1] % 4096 != 0;
  writes_in_place_ = y_.c_stride == size;
  choose_tiles(threads);
  if (!winograd_) compute_tap_offsets();
  const Layer& layer = layers_.back();
  activates_rows_ = layer.activation == Activation::hardswish && writes_in_place_ && type_ == DataType::f32 && layer.channels % k_.lanes == 0;
  non_temporal_ = writes_in_place_ && !splits_columns_ && !activates_rows_ && output_exceeds_caches();
}

bool Forward::output_exceeds_caches() const {
  const int64_t channels = layers_.back().channels;
  int64_t macs = chain_.kernel[0] * chain_.kernel[1] * chain_.channels * layers_[0].channels;
  for (size_t i = 1; i < layers_.size(); ++i) macs += layers_[i - 1].channels * layers_[i].channels;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(y_.data) | uintptr_t(y_.n_stride | y_.h_stride | y_.w_stride)) % 64 == 0;
  return aligned &&
         chain_.batch * chain_.out_height * chain_.out_width * channels * element_size(type_) >= min_streamed_bytes &&
         macs <= max_streamed_macs * channels;
}

// The pixels of a 1×1 convolution are independent: contiguous lines, and images, become one long line.
void Forward::flatten_pixels() {
  if (chain_.height == 1 || (x_.lines_contiguous(chain_.width) && y_.lines_contiguous(chain_.width))) {
    chain_.width *= chain_.height;
    chain_.height = 1;
  }
  if (chain_.height == 1 &&
      (chain_.batch == 1 || (x_.images_contiguous(chain_.width) && y_.images_contiguous(chain_.width)))) {
    chain_.width *= chain_.batch;
    chain_.batch = 1;
  }
  chain_.out_height = chain_.height;
  chain_.out_width = chain_.width;
}

void Forward::choose_tiles(int64_t threads) {
  in_row_bytes_ = pointwise_ ? tile_row_bytes(k_, chain_.channels)
                             : padded_channels(k_, chain_.channels) * element_size(k_.tile_type);
  for (size_t i = 0; i + 1 < layers_.size(); ++i) {
    hidden_row_bytes_ = std::max(hidden_row_bytes_, tile_row_bytes(k_, layers_[i].channels));
  }
  out_row_bytes_ = round_up(layers_.back().channels, max_vectors * k_.lanes) * element_size(type_);
  hidden_buffers_ = std::clamp<int64_t>(int64_t(layers_.size()) - 1, 1, 2);
  if (chain_.winograd_tile_size) {
    const int64_t hidden_bytes_per_pixel =
        (layers_.size() > 1 ? hidden_buffers_ * hidden_row_bytes_ : 0) + (writes_in_place_ ? 0 : out_row_bytes_);
    winograd_.emplace(k_, chain_, chain_.winograd_tile_size, layers_[0].channels, hidden_bytes_per_pixel, 1);
    const bool large = winograd_->weight_bytes() >= large_weights_bytes;
    splits_columns_ =
        threads > 1 && winograd_->tasks() == 1 && large && panels(0).count >= std::min(threads, min_panels);
    if (!splits_columns_) {
      winograd_.emplace(k_, chain_, chain_.winograd_tile_size, layers_[0].channels, hidden_bytes_per_pixel, threads);
    }
    input_bytes_ = winograd_->scratch_bytes();
    return set_buffer_sizes(winograd_->max_pixels());
  }
  const int64_t per_pixel = (reads_in_place_ ? 0 : in_row_bytes_) + hidden_buffers_ * hidden_row_bytes_ +
                            (writes_in_place_ ? 0 : out_row_bytes_);
  int64_t weights = 0;
  for (size_t i = 0; i < layers_.size(); ++i) weights += panels(i).count * panels(i).full_bytes;
  const bool large = weights >= large_weights_bytes;
  int64_t pixels = tile_pixels;
  if (per_pixel > 0) {
    pixels = std::max<int64_t>(k_.max_rows,
                               std::min(pixels, (large ? large_weights_max_tile_bytes : max_tile_bytes) / per_pixel));
  }
  tile_grid_ = make_tile_grid(chain_.batch, chain_.out_height, chain_.out_width, pixels, 1);
  splits_columns_ = threads > 1 && tile_grid_.count() == 1 && large;
  if (!splits_columns_) tile_grid_ = make_tile_grid(chain_.batch, chain_.out_height, chain_.out_width, pixels, threads);
  const int64_t max_pixels = tile_grid_.lines * tile_grid_.columns;
  if (pointwise_) {
    input_bytes_ = reads_in_place_ ? 0 : max_pixels * in_row_bytes_;
  } else {
    padded_width_ = (tile_grid_.columns - 1) * chain_.stride[1] + chain_.dilation[1] * (chain_.kernel[1] - 1) + 1;
    const int64_t lines = (tile_grid_.lines - 1) * chain_.stride[0] + chain_.dilation[0] * (chain_.kernel[0] - 1) + 1;
    input_bytes_ = round_up(lines * padded_width_ * in_row_bytes_ + 64, 64);
  }
  set_buffer_sizes(max_pixels);
}

void Forward::set_buffer_sizes(int64_t pixels) {
  hidden_bytes_ = round_up(pixels * hidden_row_bytes_, 64);
  out_bytes_ = writes_in_place_ ? 0 : round_up(pixels * out_row_bytes_, 64);
}

// Pixels of a line are contiguous in the padded copy, so the undilated taps of a kernel line join to one: a k×k
// convolution of C channels is k taps of k·C channels, without im2col.
void Forward::compute_tap_offsets() {
  const int64_t channels = padded_channels(k_, chain_.channels);
  const bool joined = !pointwise_ && chain_.dilation[1] == 1;
  tap_channels_ = joined ? chain_.kernel[1] * channels : channels;
  for (int64_t i = 0; i < chain_.kernel[0]; ++i) {
    for (int64_t j = 0; j < (joined ? 1 : chain_.kernel[1]); ++j) {
      tap_offsets_.push_back((i * chain_.dilation[0] * padded_width_ + j * chain_.dilation[1]) * in_row_bytes_);
    }
  }
  if (pointwise_) return;
  line_taps_ = taps_inside_image(chain_, 0, chain_.height, chain_.out_height);
  column_taps_ = taps_inside_image(chain_, 1, chain_.width, chain_.out_width);
  if (!joined) column_taps_.assign(size_t(chain_.out_width), {0, chain_.kernel[1]});
}

// The input of the first layer: x itself, or a copy in scratch.
PixelGrid Forward::input(const Tile& t, char* scratch) const {
  if (winograd_) return {scratch, 0, 0};
  if (!pointwise_) return padded_input(t, scratch);
  const int64_t step = x_.w_stride * chain_.stride[1];
  if (reads_in_place_) {
    return {x_.pixel(t.image, t.line * chain_.stride[0], t.column * chain_.stride[1]), step,
            x_.h_stride * chain_.stride[0]};
  }
  const PixelGrid grid = dense_grid(scratch, in_row_bytes_, t.columns);
  for (int64_t line = 0; line < t.lines; ++line) {
    char* from = x_.pixel(t.image, (t.line + line) * chain_.stride[0], t.column * chain_.stride[1]);
    k_.load({from, x_.c_stride, step, type_, chain_.channels, t.columns}, grid.data + line * grid.line_stride,
            in_row_bytes_);
  }
  return grid;
}

// Copies what the tile's taps read, with zeros for the padding.
PixelGrid Forward::padded_input(const Tile& t, char* scratch) const {
  const int64_t top = t.line * chain_.stride[0] - chain_.padding[0],
                left = t.column * chain_.stride[1] - chain_.padding[1];
  const int64_t lines = (t.lines - 1) * chain_.stride[0] + chain_.dilation[0] * (chain_.kernel[0] - 1) + 1;
  const int64_t columns = (t.columns - 1) * chain_.stride[1] + chain_.dilation[1] * (chain_.kernel[1] - 1) + 1;
  const int64_t line_bytes = padded_width_ * in_row_bytes_;
  copy_padded(k_, chain_, x_, {t.image, top, left, lines, columns}, {scratch, in_row_bytes_, line_bytes});
  return {scratch, in_row_bytes_ * chain_.stride[1], line_bytes * chain_.stride[0]};
}

// The k×k first layer, without the taps that fall into the padding. Pixels of a line share the taps of the kernel's
// lines, pixels of a column those of its columns: inner columns are computed line by line, edge columns column by
// column. AMX, whose blocks of 16 pixels would be half empty, computes whole lines including the padding's zeros, short
// lines two at a time.
void Forward::convolve_padded(const Tile& t, GemmArguments args, const PixelGrid& a, const PixelGrid& out,
                              const Panels& panels) const {
  const TapRange all{0, chain_.kernel[1]};
  int64_t inner = t.column, inner_end = t.column + t.columns;
  if (t.lines >= min_edge_lines && !k_.uses_amx) {
    while (inner < inner_end && column_taps_[inner] != all) ++inner;
    while (inner < inner_end && column_taps_[inner_end - 1] != all) --inner_end;
  }
  const bool joined = int64_t(tap_offsets_.size()) == chain_.kernel[0];
  const int64_t taps_per_line = joined ? 1 : chain_.kernel[1], steps_per_tap = k_steps_of(k_, tap_channels_);
  const int64_t out_size = element_size(args.epilogue.out_type);
  const GemmArguments common = args;
  for (int64_t j = panels.begin; j < panels.end; ++j) {
    const int64_t from = j * panels.width, step_bytes = panels.vectors(k_, j) * k_.lanes * 4;
    const int64_t column_bytes = steps_per_tap / (joined ? chain_.kernel[1] : 1) * step_bytes;
    args.columns = panels.columns - from;
    if (common.epilogue.bias) args.epilogue.bias = common.epilogue.bias + from;
    const auto strip = [&](int64_t line, int64_t column, int64_t count, int64_t a_row_stride, int64_t out_row_stride,
                           TapRange lines, TapRange columns) {
      args.a_row_stride = a_row_stride, args.epilogue.out_row_stride = out_row_stride;
      args.tap_offsets = tap_offsets_.data() + lines.first * taps_per_line;
      args.tap_count = lines.count() * taps_per_line;
      args.k_steps = steps_per_tap - (joined ? (chain_.kernel[1] - columns.count()) * column_bytes / step_bytes : 0);
      args.panel_skip_bytes = (steps_per_tap - args.k_steps) * step_bytes;
      args.panel = static_cast<const char*>(common.panel) + j * panels.full_bytes +
                   lines.first * taps_per_line * steps_per_tap * step_bytes + columns.first * column_bytes;
      const int64_t groups = ceil_div(count, k_.max_rows);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = count * g / groups, rows = count * (g + 1) / groups - first;
        args.a = a.data + line * a.line_stride + column * a.pixel_stride + first * a_row_stride +
                 columns.first * in_row_bytes_;
        args.epilogue.out =
            out.data + line * out.line_stride + column * out.pixel_stride + first * out_row_stride + from * out_size;
        k_.gemm(args, int(rows), panels.vectors(k_, j));
      }
    };
    const bool short_lines = k_.uses_amx && 2 * t.columns <= k_.max_rows;
    for (int64_t line = 0; inner < inner_end && line < t.lines; ++line) {
      const int64_t lines = short_lines && line + 1 < t.lines ? 2 : 1;
      args.two_lines = lines == 2;
      args.a_line_stride = a.line_stride, args.out_line_stride = out.line_stride;
      const TapRange reached{line_taps_[t.line + line + lines - 1].first, line_taps_[t.line + line].last};
      strip(line, inner - t.column, inner_end - inner, a.pixel_stride, out.pixel_stride, reached, all);
      line += lines - 1;
    }
    args.two_lines = false;
    // taps inside the image for any of the lines: the bottom line sets the first, the top line the last
    const TapRange lines{line_taps_[t.line + t.lines - 1].first, line_taps_[t.line].last};
    for (int64_t column = t.column; column < t.column + t.columns; ++column) {
      if (column == inner) column = inner_end;
      if (column == t.column + t.columns) break;
      strip(0, column - t.column, t.lines, a.line_stride, out.line_stride, lines, column_taps_[column]);
    }
  }
}

Panels Forward::panels(size_t layer) const {
  const int64_t steps = layer == 0 ? chain_.kernel[0] * chain_.kernel[1] * k_steps_of(k_, chain_.channels)
                                   : k_steps_of(k_, layers_[layer - 1].channels);
  return Panels(k_, layers_[layer].channels, steps);
}

// Runs a layer, or some panels of it. `tiles`: the hidden layers, and the output unless y is written directly.
PixelGrid Forward::run_layer(size_t i, const Tile& t, const PixelGrid& a, char* tiles, const Panels& panels,
                             const MemoryRange& next_input) const {
  static constexpr int64_t no_offset = 0;
  const Layer& layer = layers_[i];
  const bool last = i + 1 == layers_.size();
  GemmArguments args;
  args.tap_offsets = i == 0 ? tap_offsets_.data() : &no_offset;
  args.tap_count = i == 0 ? int64_t(tap_offsets_.size()) : 1;
  args.k_steps = k_steps_of(k_, i == 0 ? tap_channels_ : layers_[i - 1].channels);
  args.panel = layer.weight;
  args.epilogue.bias = layer.bias.empty() ? nullptr : layer.bias.data();
  const bool activates_rows = last && activates_rows_;
  args.epilogue.activation = activates_rows ? Activation::none : layer.activation;
  args.epilogue.out_type = last ? type_ : k_.tile_type;
  args.epilogue.round_to_bf16 = type_ == DataType::bf16 && args.epilogue.out_type == DataType::f32;
  args.epilogue.zero_tail = !last;
  args.epilogue.non_temporal = last && non_temporal_;
  char* out_tile = tiles + hidden_buffers_ * hidden_bytes_;
  PixelGrid out = hidden(i, t, tiles);
  if (last) {
    out = writes_in_place_ ? PixelGrid{y_.pixel(t.image, t.line, t.column), y_.w_stride, y_.h_stride}
                           : dense_grid(out_tile, out_row_bytes_, t.columns);
  }
  if (i == 0 && winograd_) {
    winograd_->run(t, x_, layer.weight, args.epilogue, out, panels, a.data);
  } else if (i == 0 && !pointwise_) {
    convolve_padded(t, args, a, out, panels);
  } else {
    gemm_tile(k_, args, a, out, {}, {}, t.lines, t.columns, panels, next_input);
  }
  const int64_t from = panels.begin * panels.width, to = std::min(panels.columns, panels.end * panels.width);
  for (int64_t line = 0; activates_rows && line < t.lines; ++line) {
    k_.activate_rows(out.data + line * out.line_stride + from * 4, out.pixel_stride, t.columns,
                     int((to - from) / k_.lanes), layer.activation);
  }
  if (!last || writes_in_place_) return out;
  for (int64_t line = 0; line < t.lines; ++line) {
    k_.store({y_.pixel(t.image, t.line + line, t.column) + from * y_.c_stride, y_.c_stride, y_.w_stride, type_,
              to - from, t.columns},
             out.data + line * out.line_stride + from * element_size(type_), out_row_bytes_);
  }
  return out;
}

// The input of a tile, if it is contiguous: to prefetch.
MemoryRange Forward::input_range(int64_t task) const {
  if (!reads_in_place_ || chain_.height > 1 || task >= tile_grid_.count()) return {};
  const Tile t = tile_at(tile_grid_, task);
  const int64_t step = x_.w_stride * chain_.stride[1];
  return {x_.pixel(t.image, 0, t.column * chain_.stride[1]), t.columns * step};
}

void Forward::run_tile(int64_t task, char* scratch) const {
  const InstructionSetScope scope(k_);
  const Tile t = tile(task);
  PixelGrid a = input(t, scratch);
  const MemoryRange next_input = input_range(task + threads_);  // the other threads take the tasks between
  for (size_t i = 0; i < layers_.size(); ++i) {
    a = run_layer(i, t, a, scratch + input_bytes_, panels(i), i == 0 ? next_input : MemoryRange{});
  }
#if NIN_X86
  if (non_temporal_) __builtin_ia32_sfence();  // orders the non-temporal stores before other threads' reads
#endif
}

nin_status Forward::run(const nin_thread_pool& pool) const {
  if (!splits_columns_) {
    return run_tasks(pool, tasks(), size_t(scratch_bytes()),
                     [&](int64_t task, char* scratch) { run_tile(task, scratch); });
  }
  char* shared = shared_scratch.reserve(size_t(hidden_buffers_ * hidden_bytes_ + out_bytes_ + 64));
  if (!shared) return nin_out_of_memory;
  const Tile t = tile(0);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t task_count = std::min(pool.threads, panels(i).count);
    const nin_status status = run_tasks(pool, task_count, size_t(input_bytes_), [&](int64_t task, char* scratch) {
      const InstructionSetScope scope(k_);
      Panels part = panels(i);
      const int64_t count = part.count;
      part.begin = count * task / task_count, part.end = count * (task + 1) / task_count;
      run_layer(i, t, i == 0 ? input(t, scratch) : hidden(i - 1, t, shared), shared, part);
    });
    if (status != nin_ok) return status;
  }
  shared_scratch.trim();
  return nin_ok;
}

}  // namespace
}  // namespace nin

int64_t nin_forward_scratch_bytes(const void* kernels, const nin_chain* chain, const nin_layer* layers,
                                  int64_t threads) {
  const auto& k = *static_cast<const nin::Kernels*>(kernels);
  return nin::Forward(k, *chain, layers, nullptr, nullptr, threads).scratch_bytes();
}

int32_t nin_forward(const void* kernels, const nin_chain* chain, const nin_layer* layers, const void* x, void* y,
                    const nin_thread_pool* pool, const nin_bytes* weights, const uint64_t* hashes, int64_t count) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels);
    const nin_status status = nin::verify_weights(k, weights, hashes, count, *pool);
    if (status != nin_ok) return status;
    return nin::Forward(k, *chain, layers, x, y, pool->threads).run(*pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
