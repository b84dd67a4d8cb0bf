// The forward pass of an inverted bottleneck: [1×1 up,] depthwise k×k, [squeeze-and-excitation,] 1×1 down, [+ x]; or, in
// ConvNeXt's order, depthwise k×k, LayerNorm over the channels, 1×1 up, 1×1 down, [+ x]. The hidden tensors stay in
// scratch memory that fits the L2 cache.
//
// A task takes a strip of output lines through the layers, some lines (a chunk) at a time. For each panel of hidden
// channels, and again some lines (a group) at a time, the GEMM writes the lines of the hidden tensor that the group needs
// and that the group before has not left, and the depthwise kernel reads them while they are in the L1 cache; its
// results, for all panels, are the operand of the last GEMM. So no line is computed twice within a strip, and no sum is
// divided. With a LayerNorm the panels are those of x, and each chunk's pixels go through the norm and two GEMMs.
//
// The hidden tensor is of floats. In bfloat16 its GEMMs' operands, x and the depthwise layer's result, are in the type of
// the instruction set's tiles, and sums, activations, means and the norm are of floats.
//
// Squeeze-and-excitation scales each channel of the depthwise layer's result by a function of all channels' means, so
// that result is kept for whole images: an image's last GEMM follows when all its lines are there. Each line is summed
// alone and the sums are added in the order of the lines, whichever thread computed them.
#include <cstring>
#include <new>

#include "parallel.hpp"
#include "tiling.hpp"
#include "weight_hashes.hpp"

namespace nin {
namespace {

// Scratch of a chunk of lines: what stays in the L2 cache beside the weights. Where a whole strip is one chunk its lines
// need not be kept for the next, and reading the hidden tensor once from the cache behind costs less than to cut it.
constexpr int64_t max_chunk_bytes = 256 << 10, max_strip_bytes = 768 << 10;
// Hidden lines of a panel that output lines of a group read: what stays in the L1 cache beside the weights.
constexpr int64_t max_group_bytes = 16 << 10;
// The two GEMMs behind a LayerNorm have large weights: those that no L2 cache holds are read once for each chunk.
constexpr int64_t large_weights_bytes = 1 << 20, large_weights_max_chunk_bytes = 2 << 20;

// A batch of fewer images than threads, with no more pixels than this: the threads share each image's hidden channels,
// then its output channels, as strips would compute too many lines twice.
constexpr int64_t max_split_pixels = 512;

// Images whose means go through the layers of squeeze-and-excitation together, so that their weights are read once: as
// many as the depthwise layer's results of this size hold.
constexpr int64_t max_round_bytes = 512 << 10;

struct LineRange {
  int64_t first, last;

  int64_t count() const { return last - first; }
};

class InvertedBottleneck {
 public:
  InvertedBottleneck(const Kernels& k, const nin_chain& chain, const nin_layer* layers, bool residual, const void* x,
                     void* y, int64_t threads);
  nin_status run(const nin_thread_pool& pool) const;

 private:
  // Scratch of a task.
  struct Buffers {
    char *input, *hidden, *product, *wide, *out, *residual;
  };

  // A chunk's way through a panel of hidden channels.
  struct PanelPass {
    int64_t panel;
    int vectors;
    char* hidden;                // the panel's lines
    const char** taps = nullptr; // room for the lines that a line of the result reads
    GemmArguments up = {};
    DepthwiseArguments filter = {};
    Prefetch prefetch = {};  // of the weights that are read behind the panel's: the next panel's, or the last layer's
    int64_t pixels = 0;      // that the first layer has computed
  };

  bool normalizes() const { return chain_.norm_epsilon >= 0; }
  bool expands() const { return layers_.size() % 2 == 1 && !normalizes(); }
  bool squeezes() const { return layers_.size() >= 4; }
  const Layer& depthwise() const { return layers_[expands() ? 1 : 0]; }
  int64_t hidden_channels() const { return depthwise().channels; }
  int64_t out_channels() const { return layers_.back().channels; }
  // of the last layer's input
  int64_t wide_channels() const { return normalizes() ? layers_[1].channels : hidden_channels(); }
  int64_t window(int64_t lines) const {
    return (lines - 1) * chain_.stride[0] + chain_.dilation[0] * (chain_.kernel[0] - 1) + 1;
  }
  void choose_chunks(int64_t strip);
  int64_t chunk_bytes(int64_t lines, bool shares_panels) const;
  int64_t input_bytes(int64_t lines) const {
    return round_up(window(lines) * used_columns_ * in_row_bytes_, 64);
  }
  Buffers buffers(char* scratch) const;
  int64_t scratch_bytes() const { return chunk_bytes(chunk_lines_, shares_panels_); }
  LineRange strip(int64_t index) const {
    return {chain_.out_height * index / strips_, chain_.out_height * (index + 1) / strips_};
  }
  LineRange hidden_lines(const LineRange& out) const;
  // The most that a chunk, or a strip that is one, may take.
  int64_t limit(int64_t bytes) const {
    const bool large = normalizes() && wide_panels_.bytes(k_) + out_panels_.bytes(k_) >= large_weights_bytes;
    return large ? large_weights_max_chunk_bytes : bytes;
  }
  void clear_borders(const Buffers& to) const;
  void load_input(const Buffers& to, int64_t image, const LineRange& lines) const;
  void set_arguments();
  PanelPass panel_pass(const Buffers& to, int64_t panel, int64_t pixels, const char** taps) const;
  void expand(PanelPass& p, const PixelGrid& from, const LineRange& lines) const;
  void load_hidden(const PanelPass& p, int64_t image, const LineRange& lines) const;
  void convolve(PanelPass& p, int64_t line, char* product) const;
  void run_panel(PanelPass p, const Buffers& to, int64_t image, const LineRange& out, const LineRange& missing,
                 char* product, float* line_sums) const;
  PixelGrid normalize_and_expand(const Buffers& to, int64_t lines, const PixelGrid& product) const;
  void project(const Buffers& to, int64_t image, const LineRange& out, PixelGrid product, const Panels& panels,
               const void* weight) const;
  void run_strip(int64_t image, const LineRange& lines, int64_t first_panel, int64_t last_panel, char* kept,
                 char* scratch) const;
  float* line_sums(char* kept) const { return reinterpret_cast<float*>(kept + product_bytes_); }
  int64_t round_bytes(int64_t images) const {
    const int64_t weight_bytes = scales_weights_ ? round_up(out_panels_.bytes(k_), 64) : 0;
    return images * (image_bytes_ + (squeezes() ? product_row_bytes_ + squeezed_row_bytes_ + sums_row_bytes_ + weight_bytes : 0));
  }
  char* excite(char* memory, int64_t images) const;
  void scale_weights(const float* factors, char* to) const;
  nin_status run_round(const nin_thread_pool* pool, int64_t first, int64_t images, char* memory, char* scratch) const;

  const Kernels& k_;
  nin_chain chain_;
  DataType type_;  // of x and y
  ImageView x_, y_;
  std::vector<Layer> layers_;
  Panels hidden_panels_, wide_panels_, out_panels_;
  std::vector<TapRange> line_taps_;  // lines of taps inside the image, by output line
  bool residual_;
  bool reads_in_place_, writes_in_place_;
  bool splits_panels_ = false;  // threads share an image's channels
  bool keeps_product_;          // the depthwise layer's results of whole images
  bool scales_weights_;         // the factors multiply the last layer's weights, not the results: whichever are fewer
  bool shares_panels_ = false;  // the panels' hidden lines lie in the same memory, one after the other
  int64_t strips_ = 1;          // of an image
  int64_t chunk_lines_ = 0;     // output lines of the largest chunk
  int64_t group_lines_ = 0;     // output lines that go through a panel together
  int64_t window_lines_ = 0;    // hidden lines that they need
  std::vector<int64_t> hidden_offsets_;  // of each hidden line, in the memory of window_lines_, one after the other
  std::vector<int64_t> call_columns_;    // of a hidden line, where the GEMM's calls begin, and the end
  GemmArguments up_arguments_;
  DepthwiseArguments depthwise_arguments_;
  bool activates_hidden_rows_ = false;  // behind the first GEMM
  int64_t line_pixels_, border_, used_columns_;  // of a hidden line: all, before the image's first, of the image
  int64_t pixel_bytes_, line_bytes_, panel_bytes_ = 0;  // of a panel's hidden pixel, line and lines
  int64_t in_row_bytes_, product_row_bytes_, wide_row_bytes_ = 0, sums_row_bytes_, squeezed_row_bytes_;
  int64_t out_row_bytes_, residual_row_bytes_;
  int64_t product_bytes_, image_bytes_;  // of an image: the depthwise layer's result, and with the sums of its lines
};

InvertedBottleneck::InvertedBottleneck(const Kernels& k, const nin_chain& chain, const nin_layer* layers, bool residual,
                                       const void* x, void* y, int64_t threads)
    : k_(k),
      chain_(chain),
      type_(DataType(chain.type)),
      x_(image_view(x, chain.x_stride, element_size(type_))),
      y_(image_view(y, chain.y_stride, element_size(type_))),
      layers_(read_layers(k, chain, layers)),
      hidden_panels_(k, hidden_channels(), k_steps_of(k, chain.channels)),
      wide_panels_(k, wide_channels(), k_steps_of(k, hidden_channels())),
      out_panels_(k, out_channels(), k_steps_of(k, wide_channels())),
      line_taps_(taps_inside_image(chain, 0, chain.height, chain.out_height)),
      residual_(residual),
      reads_in_place_(!expands() ||
                      (x_.c_stride == element_size(type_) && type_ == k.tile_type &&
                       padded_channels(k, chain.channels) == chain.channels && x_.w_stride % 4096 != 0)),
      writes_in_place_(y_.c_stride == element_size(type_)) {
  line_pixels_ = (chain_.out_width - 1) * chain_.stride[1] + chain_.dilation[1] * (chain_.kernel[1] - 1) + 1;
  border_ = std::min(chain_.padding[1], line_pixels_);
  used_columns_ = std::min(chain_.width, line_pixels_ - border_);
  pixel_bytes_ = max_vectors * k_.lanes * 4;
  line_bytes_ = line_pixels_ * pixel_bytes_;
  in_row_bytes_ = reads_in_place_ ? 0 : tile_row_bytes(k_, chain_.channels);
  // sums, factors and what is normalized are floats
  sums_row_bytes_ = tile_row_bytes(*k_.float_kernels, hidden_channels());
  product_row_bytes_ = normalizes() ? sums_row_bytes_ : tile_row_bytes(k_, hidden_channels());
  if (normalizes()) wide_row_bytes_ = tile_row_bytes(k_, wide_channels());
  out_row_bytes_ = writes_in_place_ ? 0 : tile_row_bytes(k_, out_channels());
  squeezed_row_bytes_ = squeezes() ? tile_row_bytes(k_, layers_[layers_.size() - 3].channels) : 0;
  product_bytes_ = chain_.out_height * chain_.out_width * product_row_bytes_;
  image_bytes_ = product_bytes_ + (squeezes() ? chain_.out_height * sums_row_bytes_ : 0);
  const bool adds_in_place = writes_in_place_ && x_.c_stride == element_size(type_);
  residual_row_bytes_ = residual_ && !adds_in_place ? tile_row_bytes(*k_.float_kernels, out_channels()) : 0;
  if (threads > 1 && chain_.batch < threads) {
    splits_panels_ = chain_.out_height * chain_.out_width <= max_split_pixels;
    if (!splits_panels_) strips_ = std::min(chain_.out_height, ceil_div(threads, chain_.batch));
  } else if (!squeezes() && chain_.batch < many_tiles_per_thread * threads) {
    strips_ = balanced_parts(1, std::min<int64_t>(chain_.out_height, 4), chain_.batch, threads);
  }
  scales_weights_ = squeezes() && k_.scale_panel && chain_.out_height * chain_.out_width > out_channels();
  keeps_product_ = splits_panels_ || squeezes();
  choose_chunks(splits_panels_ ? chain_.out_height : ceil_div(chain_.out_height, strips_));
  set_arguments();
}

int64_t InvertedBottleneck::chunk_bytes(int64_t lines, bool shares_panels) const {
  const int64_t panels = shares_panels ? 1 : hidden_panels_.count, pixels = lines * chain_.out_width;
  return input_bytes(lines) + panels * panel_bytes_ +
         pixels * (product_row_bytes_ + wide_row_bytes_ + out_row_bytes_ + residual_row_bytes_);
}

void InvertedBottleneck::choose_chunks(int64_t strip) {
  group_lines_ = 1;
  while (group_lines_ < strip && window(group_lines_ + 1) * line_bytes_ <= max_group_bytes) ++group_lines_;
  window_lines_ = window(group_lines_);
  panel_bytes_ = window_lines_ * line_bytes_;
  shares_panels_ = splits_panels_ || chunk_bytes(strip, true) <= limit(max_strip_bytes);
  chunk_lines_ = strip;
  if (!shares_panels_) {
    while (chunk_lines_ > 1 && chunk_bytes(chunk_lines_, false) > limit(max_chunk_bytes)) --chunk_lines_;
    chunk_lines_ = ceil_div(strip, ceil_div(strip, chunk_lines_));
  }
}

InvertedBottleneck::Buffers InvertedBottleneck::buffers(char* scratch) const {
  const int64_t pixels = chunk_lines_ * chain_.out_width;
  Buffers b;
  b.input = scratch;
  b.hidden = b.input + input_bytes(chunk_lines_);
  b.product = b.hidden + (shares_panels_ ? 1 : hidden_panels_.count) * panel_bytes_;
  b.wide = b.product + (keeps_product_ ? 0 : pixels * product_row_bytes_);
  b.out = b.wide + pixels * wide_row_bytes_;
  b.residual = b.out + pixels * out_row_bytes_;
  return b;
}

// The lines of the hidden tensor that output lines read.
LineRange InvertedBottleneck::hidden_lines(const LineRange& out) const {
  const int64_t first = out.first * chain_.stride[0] - chain_.padding[0];
  const int64_t top = std::clamp<int64_t>(first, 0, chain_.height);
  return {top, std::clamp<int64_t>(first + window(out.count()), top, chain_.height)};
}

// The padding at the sides of the hidden lines: nothing else writes there.
void InvertedBottleneck::clear_borders(const Buffers& to) const {
  const int64_t pixel = pixel_bytes_, right = border_ + used_columns_;
  for (int64_t i = 0; i < (shares_panels_ ? 1 : hidden_panels_.count) * window_lines_; ++i) {
    std::memset(to.hidden + i * line_bytes_, 0, border_ * pixel);
    std::memset(to.hidden + i * line_bytes_ + right * pixel, 0, (line_pixels_ - right) * pixel);
  }
}

// Copies the lines that the first GEMM cannot read in place, to rows of channels.
void InvertedBottleneck::load_input(const Buffers& to, int64_t image, const LineRange& lines) const {
  if (reads_in_place_) return;
  for (int64_t line = lines.first; line < lines.last; ++line) {
    char* const rows = to.input + (line - lines.first) * used_columns_ * in_row_bytes_;
    k_.load({x_.pixel(image, line, 0), x_.c_stride, x_.w_stride, type_, chain_.channels, used_columns_}, rows,
            in_row_bytes_);
  }
}

// What all calls of the first layer's and of the depthwise layer's kernels have in common.
void InvertedBottleneck::set_arguments() {
  static constexpr int64_t no_offset = 0;
  GemmArguments& up = up_arguments_;
  const Layer& first = layers_[0];
  up.tap_offsets = &no_offset, up.tap_count = 1, up.k_steps = k_steps_of(k_, chain_.channels);
  up.a_row_stride = reads_in_place_ ? x_.w_stride : in_row_bytes_;
  up.epilogue.out_row_stride = pixel_bytes_;
  up.epilogue.out_type = DataType::f32;
  up.epilogue.zero_tail = true;
  activates_hidden_rows_ = !is_fast_in_epilogue(first.activation);
  up.epilogue.activation = activates_hidden_rows_ ? Activation::none : first.activation;
  const int64_t calls = ceil_div(used_columns_, k_.max_rows);
  call_columns_.push_back(0);
  for (int64_t i = 1; i <= calls; ++i) call_columns_.push_back(used_columns_ * i / calls);
  DepthwiseArguments& filter = depthwise_arguments_;
  filter.activation = depthwise().activation;
  filter.taps = chain_.kernel[1], filter.stride = chain_.stride[1], filter.dilation = chain_.dilation[1];
  filter.columns = chain_.out_width;
  filter.out_row_stride = product_row_bytes_;
  filter.out_type = normalizes() ? DataType::f32 : k_.tile_type;
  for (int64_t line = 0, slot = 0; line < chain_.height; ++line) {
    hidden_offsets_.push_back(slot * line_bytes_);
    if (++slot == window_lines_) slot = 0;
  }
}

InvertedBottleneck::PanelPass InvertedBottleneck::panel_pass(const Buffers& to, int64_t panel, int64_t pixels,
                                                             const char** taps) const {
  const int64_t channel = panel * hidden_panels_.width;
  PanelPass p{panel, hidden_panels_.vectors(k_, panel), to.hidden + (shares_panels_ ? 0 : panel) * panel_bytes_};
  p.taps = taps;
  p.filter = depthwise_arguments_;
  p.filter.bias = depthwise().bias.empty() ? nullptr : depthwise().bias.data() + channel;
  p.filter.lines = taps;
  if (!expands()) return p;
  const Layer& first = layers_.front();
  p.up = up_arguments_;
  p.up.columns = hidden_channels() - channel;
  p.up.panel = static_cast<const char*>(first.weight) + panel * hidden_panels_.full_bytes;
  p.up.epilogue.bias = first.bias.empty() ? nullptr : first.bias.data() + channel;
  if (pixels <= 0) return p;
  const bool last = panel + 1 == hidden_panels_.count;
  const Panels& behind = last ? out_panels_ : hidden_panels_;
  const int64_t next = last ? 0 : panel + 1;
  const auto* weight = static_cast<const char*>((last ? layers_.back() : first).weight);
  p.prefetch = Prefetch({weight + next * behind.full_bytes, behind.panel_bytes(k_, next)}, pixels);
  p.prefetch.set_rate(p.up, call_columns_[1]);
  return p;
}

// Writes lines of a panel of the first layer's result. `from`: the first of them.
void InvertedBottleneck::expand(PanelPass& p, const PixelGrid& from, const LineRange& lines) const {
  const size_t calls = call_columns_.size() - 1;
  for (int64_t line = lines.first; line < lines.last; ++line) {
    char* const out = p.hidden + hidden_offsets_[size_t(line)] + border_ * pixel_bytes_;
    const char* const in = from.data + (line - lines.first) * from.line_stride;
    for (size_t i = 0; i < calls; ++i) {
      const int64_t column = call_columns_[i], rows = call_columns_[i + 1] - column;
      p.up.a = in + column * from.pixel_stride;
      p.up.epilogue.out = out + column * pixel_bytes_;
      p.prefetch.set_address(p.up, p.pixels);
      k_.gemm(p.up, int(rows), p.vectors);
      p.pixels += rows;
    }
    if (activates_hidden_rows_) k_.activate_rows(out, pixel_bytes_, used_columns_, p.vectors, layers_[0].activation);
  }
}

// Without a first layer: copies lines of a panel of x.
void InvertedBottleneck::load_hidden(const PanelPass& p, int64_t image, const LineRange& lines) const {
  const int64_t from = p.panel * hidden_panels_.width;
  const int64_t channels = std::min(hidden_panels_.width, hidden_channels() - from);
  for (int64_t line = lines.first; line < lines.last; ++line) {
    k_.float_kernels->load(
        {x_.pixel(image, line, 0) + from * x_.c_stride, x_.c_stride, x_.w_stride, type_, channels, used_columns_},
        p.hidden + hidden_offsets_[size_t(line)] + border_ * pixel_bytes_, pixel_bytes_);
  }
}

// The depthwise layer on a panel, for a line of the output.
void InvertedBottleneck::convolve(PanelPass& p, int64_t line, char* product) const {
  const TapRange inside = line_taps_[size_t(line)];
  const int64_t top = line * chain_.stride[0] - chain_.padding[0];
  for (int64_t tap = inside.first; tap < inside.last; ++tap) {
    p.taps[tap - inside.first] = p.hidden + hidden_offsets_[size_t(top + tap * chain_.dilation[0])];
  }
  const int64_t skipped = p.panel * chain_.kernel[0] * hidden_panels_.width + inside.first * p.vectors * k_.lanes;
  p.filter.line_count = inside.count();
  p.filter.weights = static_cast<const float*>(depthwise().weight) + skipped * chain_.kernel[1];
  p.filter.out = product;
  k_.depthwise(p.filter, p.vectors);
}

// The first layer and the depthwise layer on a panel, some lines at a time, so that these stay in the L1 cache between
// them. `missing`: hidden lines that the chunk before has not left. `line_sums`: where the sums of the result's lines go,
// a row for each, or null.
void InvertedBottleneck::run_panel(PanelPass p, const Buffers& to, int64_t image, const LineRange& out,
                                   const LineRange& missing, char* product, float* line_sums) const {
  const int64_t channel = p.panel * hidden_panels_.width, loaded_line = used_columns_ * in_row_bytes_;
  product += channel * element_size(p.filter.out_type);
  int64_t next = missing.first;
  for (LineRange group{out.first, out.first}; group.first < out.last; group.first = group.last) {
    group.last = std::min(group.first + group_lines_, out.last);
    LineRange lines = hidden_lines(group);
    lines.first = std::min(std::max(lines.first, next), lines.last);
    next = lines.last;
    if (!expands()) {
      load_hidden(p, image, lines);
    } else if (reads_in_place_) {
      expand(p, {x_.pixel(image, lines.first, 0), x_.w_stride, x_.h_stride}, lines);
    } else {
      expand(p, {to.input + (lines.first - missing.first) * loaded_line, in_row_bytes_, loaded_line}, lines);
    }
    for (int64_t line = group.first; line < group.last; ++line) {
      char* const row = product + (line - out.first) * chain_.out_width * product_row_bytes_;
      convolve(p, line, row);
      if (!line_sums) continue;
      float* sums = line_sums + (line - out.first) * sums_row_bytes_ / 4 + channel;
      k_.sum_rows(row, product_row_bytes_, chain_.out_width, p.vectors, sums);
    }
  }
}

// The LayerNorm, in place, and the layer behind it.
PixelGrid InvertedBottleneck::normalize_and_expand(const Buffers& to, int64_t lines, const PixelGrid& product) const {
  static constexpr int64_t no_offset = 0;
  const Layer& layer = layers_[1];
  const int64_t pixels = lines * chain_.out_width;
  k_.normalize_rows(product.data, product.pixel_stride, pixels, hidden_channels(), float(chain_.norm_epsilon));
  GemmArguments args;
  args.tap_offsets = &no_offset, args.tap_count = 1, args.k_steps = k_steps_of(k_, hidden_channels());
  args.panel = layer.weight;
  args.epilogue.bias = layer.bias.empty() ? nullptr : layer.bias.data();
  args.epilogue.activation = layer.activation;
  args.epilogue.out_type = k_.tile_type;
  args.epilogue.zero_tail = true;
  const PixelGrid wide = dense_grid(to.wide, wide_row_bytes_, chain_.out_width);
  gemm_tile(k_, args, product, wide, {}, {}, lines, chain_.out_width, wide_panels_);
  return wide;
}

// The last layer, or some of its panels, and the residual; before them what belongs to a LayerNorm.
void InvertedBottleneck::project(const Buffers& to, int64_t image, const LineRange& out, PixelGrid product,
                                 const Panels& panels, const void* weight) const {
  static constexpr int64_t no_offset = 0;
  if (normalizes()) {
    product = normalize_and_expand(to, out.count(), product);
  } else {
    zero_odd_channel(k_, hidden_channels(), product.data, product_row_bytes_, out.count() * chain_.out_width);
  }
  const Layer& layer = layers_.back();
  const int64_t size = element_size(type_);
  GemmArguments args;
  args.tap_offsets = &no_offset, args.tap_count = 1, args.k_steps = k_steps_of(k_, wide_channels());
  args.panel = weight;
  args.epilogue.bias = layer.bias.empty() ? nullptr : layer.bias.data();
  args.epilogue.activation = layer.activation;
  args.epilogue.out_type = type_;
  const PixelGrid grid = writes_in_place_ ? PixelGrid{y_.pixel(image, out.first, 0), y_.w_stride, y_.h_stride}
                                          : dense_grid(to.out, out_row_bytes_, chain_.out_width);
  gemm_tile(k_, args, product, grid, {}, {}, out.count(), chain_.out_width, panels);
  if (!residual_ && writes_in_place_) return;
  const int64_t from = panels.begin * panels.width;
  const int64_t channels = std::min(panels.columns, panels.end * panels.width) - from;
  for (int64_t line = out.first; line < out.last; ++line) {
    char* const row = grid.data + (line - out.first) * grid.line_stride + from * size;
    if (residual_) {
      char* added = x_.pixel(image, line, 0) + from * x_.c_stride;
      int64_t added_row = x_.w_stride;
      DataType added_type = type_;
      if (residual_row_bytes_) {
        k_.float_kernels->load({added, x_.c_stride, x_.w_stride, type_, channels, chain_.out_width}, to.residual,
                               residual_row_bytes_);
        added = to.residual, added_row = residual_row_bytes_, added_type = DataType::f32;
      }
      k_.add_rows(row, grid.pixel_stride, type_, added, added_row, added_type, chain_.out_width, channels);
    }
    if (!writes_in_place_) {
      k_.store({y_.pixel(image, line, 0) + from * y_.c_stride, y_.c_stride, y_.w_stride, type_, channels,
                chain_.out_width},
               row, out_row_bytes_);
    }
  }
}

// Some hidden panels of a strip of lines. `kept`: where the depthwise layer's results of the image stay; null: the last
// layer follows at once.
void InvertedBottleneck::run_strip(int64_t image, const LineRange& lines, int64_t first_panel, int64_t last_panel,
                                   char* kept, char* scratch) const {
  const InstructionSetScope scope(k_);
  const Buffers to = buffers(scratch);
  std::vector<const char*> taps(size_t(chain_.kernel[0]), nullptr);
  clear_borders(to);
  const int64_t chunks = ceil_div(lines.count(), chunk_lines_);
  int64_t next = 0;  // the first hidden line that is not there
  for (int64_t i = 0; i < chunks; ++i) {
    const LineRange out{lines.first + lines.count() * i / chunks, lines.first + lines.count() * (i + 1) / chunks};
    LineRange missing = hidden_lines(out);
    missing.first = std::min(std::max(missing.first, next), missing.last);
    load_input(to, image, missing);
    char* const product = kept ? kept + out.first * chain_.out_width * product_row_bytes_ : to.product;
    float* const sums = squeezes() ? line_sums(kept) + out.first * sums_row_bytes_ / 4 : nullptr;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      run_panel(panel_pass(to, panel, missing.count() * used_columns_, taps.data()), to, image, out, missing, product,
                sums);
    }
    next = missing.last;
    if (kept) continue;
    project(to, image, out, dense_grid(product, product_row_bytes_, chain_.out_width), out_panels_,
            layers_.back().weight);
  }
}

// The layers of squeeze-and-excitation on the means of some images, which lie one after the other in `memory`. Returns
// a row of factors for each.
char* InvertedBottleneck::excite(char* memory, int64_t images) const {
  static constexpr int64_t no_offset = 0;
  const InstructionSetScope scope(k_);
  char* const means = memory + images * image_bytes_;
  char* const squeezed = means + images * product_row_bytes_;
  char* const factors = squeezed + images * squeezed_row_bytes_;
  const int64_t channels = hidden_channels();
  const float pixels = float(chain_.out_height * chain_.out_width);
  for (int64_t image = 0; image < images; ++image) {
    float* const mean = line_sums(memory + image * image_bytes_);
    for (int64_t line = 1; line < chain_.out_height; ++line) {
      const float* sums = mean + line * sums_row_bytes_ / 4;
      for (int64_t c = 0; c < channels; ++c) mean[c] += sums[c];
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] /= pixels;
    char* const row = means + image * product_row_bytes_;
    std::memset(row, 0, size_t(product_row_bytes_));
    k_.add_rows(row, 0, k_.tile_type, reinterpret_cast<const char*>(mean), 0, DataType::f32, 1, channels);
  }
  PixelGrid from = dense_grid(means, product_row_bytes_, images);
  for (const bool last : {false, true}) {
    const Layer& layer = layers_[layers_.size() - (last ? 2 : 3)];
    GemmArguments args;
    args.tap_offsets = &no_offset, args.tap_count = 1;
    args.k_steps = k_steps_of(k_, last ? layers_[layers_.size() - 3].channels : channels);
    args.panel = layer.weight;
    args.epilogue.bias = layer.bias.empty() ? nullptr : layer.bias.data();
    args.epilogue.activation = layer.activation;
    args.epilogue.zero_tail = true;
    args.epilogue.out_type = last ? DataType::f32 : k_.tile_type;
    const PixelGrid to = last ? dense_grid(factors, sums_row_bytes_, images)
                              : dense_grid(squeezed, squeezed_row_bytes_, images);
    gemm_tile(k_, args, from, to, {}, {}, 1, images, Panels(k_, layer.channels, args.k_steps));
    from = to;
  }
  return factors;
}

// The last layer's packed weights with the row of each hidden channel multiplied by its factor.
void InvertedBottleneck::scale_weights(const float* factors, char* to) const {
  const auto* from = static_cast<const char*>(layers_.back().weight);
  for (int64_t panel = 0; panel < out_panels_.count; ++panel) {
    const int64_t skipped = panel * out_panels_.full_bytes;
    k_.scale_panel(from + skipped, hidden_channels(), out_panels_.vectors(k_, panel), factors, to + skipped);
  }
}

// Some images, whose depthwise layer's results are kept in `memory`. `pool`: its threads share each image's lines, or
// its hidden channels and then its output channels; null: the calling thread computes, with `scratch`.
nin_status InvertedBottleneck::run_round(const nin_thread_pool* pool, int64_t first, int64_t images, char* memory,
                                         char* scratch) const {
  const auto each = [&](int64_t count, const auto& run) {
    if (pool) return run_tasks(*pool, count, size_t(scratch_bytes()), run);
    for (int64_t task = 0; task < count; ++task) run(task, scratch);
    return nin_ok;
  };
  const int64_t threads = pool ? pool->threads : 1;
  const int64_t parts = splits_panels_ ? std::min(hidden_panels_.count, ceil_div(threads, images)) : strips_;
  nin_status status = each(images * parts, [&](int64_t task, char* memory_of_task) {
    const int64_t image = task / parts, part = task % parts, count = hidden_panels_.count;
    char* const kept = memory + image * image_bytes_;
    if (splits_panels_) {
      const LineRange all{0, chain_.out_height};
      run_strip(first + image, all, count * part / parts, count * (part + 1) / parts, kept, memory_of_task);
    } else {
      run_strip(first + image, strip(part), 0, count, kept, memory_of_task);
    }
  });
  if (status != nin_ok) return status;
  char* const factors = squeezes() ? excite(memory, images) : nullptr;
  char* const weights = factors + (squeezes() ? images * sums_row_bytes_ : 0);
  const int64_t weight_bytes = round_up(out_panels_.bytes(k_), 64);
  for (int64_t image = 0; scales_weights_ && image < images; ++image) {
    scale_weights(reinterpret_cast<const float*>(factors + image * sums_row_bytes_), weights + image * weight_bytes);
  }
  const int64_t bands = splits_panels_ ? std::min(threads, chain_.out_height)
                                       : std::max(strips_, ceil_div(chain_.out_height, chunk_lines_));
  const int64_t panels = splits_panels_ && !squeezes() && !normalizes() ? out_panels_.count : 1, tasks = bands * panels;
  return each(images * tasks, [&](int64_t task, char* memory_of_task) {
    const InstructionSetScope scope(k_);
    const int64_t image = task / tasks, panel = task % tasks / bands, band = task % bands;
    const LineRange out{chain_.out_height * band / bands, chain_.out_height * (band + 1) / bands};
    Panels part = out_panels_;
    if (panels > 1) part.begin = panel, part.end = panel + 1;
    const int64_t skipped = out.first * chain_.out_width * product_row_bytes_;
    char* const product = memory + image * image_bytes_ + skipped;
    if (factors && !scales_weights_) {
      k_.scale_rows(product, product_row_bytes_, out.count() * chain_.out_width, hidden_channels(),
                    reinterpret_cast<const float*>(factors + image * sums_row_bytes_));
    }
    project(buffers(memory_of_task), first + image, out, dense_grid(product, product_row_bytes_, chain_.out_width),
            part, scales_weights_ ? weights + image * weight_bytes : layers_.back().weight);
  });
}

nin_status InvertedBottleneck::run(const nin_thread_pool& pool) const {
  const int64_t batch = chain_.batch;
  if (!keeps_product_) {
    return run_tasks(pool, batch * strips_, size_t(scratch_bytes()), [&](int64_t task, char* scratch) {
      run_strip(task / strips_, strip(task % strips_), 0, hidden_panels_.count, nullptr, scratch);
    });
  }
  if (batch < pool.threads) {
    char* const memory = shared_scratch.reserve(size_t(round_bytes(batch)));
    if (!memory) return nin_out_of_memory;
    const nin_status status = run_round(&pool, 0, batch, memory, nullptr);
    shared_scratch.trim();
    return status;
  }
  const int64_t most = std::clamp<int64_t>(max_round_bytes / image_bytes_, 1, ceil_div(batch, pool.threads));
  const int64_t rounds = ceil_div(batch, most), scratch = round_up(scratch_bytes(), 64);
  return run_tasks(pool, rounds, size_t(scratch + round_bytes(most)), [&](int64_t task, char* memory) {
    const int64_t first = batch * task / rounds, last = batch * (task + 1) / rounds;
    run_round(nullptr, first, last - first, memory + scratch, memory);
  });
}

}  // namespace
}  // namespace nin

int32_t nin_inverted_bottleneck(const void* kernels, const nin_chain* chain, const nin_layer* layers, int64_t residual,
                                const void* x, void* y, const nin_thread_pool* pool, const nin_bytes* weights,
                                const uint64_t* hashes, int64_t count) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels);
    const nin_status status = nin::verify_weights(k, weights, hashes, count, *pool);
    if (status != nin_ok) return status;
    return nin::InvertedBottleneck(k, *chain, layers, residual != 0, x, y, pool->threads).run(*pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
