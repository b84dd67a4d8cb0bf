// The backward pass of a chain of 1×1 layers: each tile recomputes its hidden layers, then goes back through them.
// Weight gradients are sums over pixels: the tiles form slices, each slice has float sums of its own, and these are
// reduced in order. Tiles and slices do not depend on the number of threads, so neither do the bits.
#include <cstring>
#include <memory>
#include <new>

#include "parallel.hpp"
#include "tiling.hpp"

namespace nin {
namespace {

// A larger scratch than forward's: the sums of a weight gradient are read and written once a tile.
constexpr int64_t tile_pixels = 128;
constexpr int64_t max_tile_bytes = 768 << 10;
// Slices are the unit of parallelism. Each costs a float copy of all weights, which is cleared and reduced: as much
// time as a quarter to a half of a tile, so few tiles make few slices.
constexpr int64_t max_slices = 32, min_slices = 8, tiles_per_slice = 4;
constexpr int64_t slices_bytes = 64 << 20;

// Assigns offsets in a buffer, aligned to cache lines.
struct ScratchLayout {
  int64_t bytes = 0;
  int64_t reserve(int64_t more) {
    const int64_t at = bytes;
    bytes += round_up(more, 64);
    return at;
  }
};

class Backward {
 public:
  Backward(const Kernels& k, const nin_chain& chain, const nin_layer* layers, const nin_gradient_strides& gradient,
           const nin_layer_gradient* gradients, const void* grad, const void* x, const void* y, void* x_grad);
  nin_status run(const nin_thread_pool& pool) const;

 private:
  void flatten_pixels();
  void choose_tiles();
  int64_t in_channels(size_t layer) const { return layer == 0 ? chain_.channels : layers_[layer - 1].channels; }
  bool stores_derivative(size_t layer) const { return layers_[layer].activation > Activation::relu; }
  void run_tile(const Tile& t, char* scratch, float* sums) const;
  PixelGrid load(const ImageView& from, const Tile& t, bool strided, int64_t channels, char* to) const;
  void recompute_hidden(const Tile& t, const PixelGrid& x, char* scratch) const;
  PixelGrid output_gradient(const Tile& t, char* scratch) const;
  void add_weight_gradient(size_t layer, const PixelGrid& in, const PixelGrid& g, int64_t pixels, char* scratch,
                           float* sums) const;
  PixelGrid input_gradient(size_t layer, const Tile& t, const PixelGrid& g, char* scratch) const;
  void reduce_slices(size_t layer, int64_t channel, const float* sums, int64_t slices) const;
  void store_element(void* to, int64_t index, float value) const;

  const Kernels& k_;
  nin_chain chain_;
  DataType type_;
  ImageView x_, y_, grad_, x_grad_;
  std::vector<Layer> layers_;
  std::vector<nin_layer_gradient> gradients_;
  size_t first_layer_ = 0;  // the first layer that needs a gradient, or whose input does
  TileGrid tile_grid_;
  bool reads_in_place_ = false;
  // offsets in a thread's scratch; vectors by layer
  int64_t x_offset_ = 0, y_offset_ = 0, pairs_offset_[2] = {}, gradient_offset_[2] = {}, x_grad_offset_ = 0,
          scratch_bytes_ = 0;
  std::vector<int64_t> hidden_offset_, derivative_offset_;
  // offsets in a slice's sums, in floats; by layer
  std::vector<int64_t> weight_sums_offset_, bias_sums_offset_;
  int64_t sums_size_ = 0;
};

Backward::Backward(const Kernels& k, const nin_chain& chain, const nin_layer* layers,
                   const nin_gradient_strides& gradient, const nin_layer_gradient* gradients, const void* grad,
                   const void* x, const void* y, void* x_grad)
    : k_(k), chain_(chain), type_(DataType(chain.type)), layers_(read_layers(k, chain, layers)),
      gradients_(gradients, gradients + chain.layers) {
  const int64_t size = element_size(type_);
  x_ = image_view(x, chain.x_stride, size);
  y_ = image_view(y, chain.y_stride, size);
  grad_ = image_view(grad, gradient.grad_stride, size);
  x_grad_ = image_view(x_grad, gradient.x_grad_stride, size);
  if (!x_grad) {
    while (first_layer_ + 1 < layers_.size() && !gradients_[first_layer_].weight_grad &&
           !gradients_[first_layer_].bias_grad) {
      ++first_layer_;
    }
  }
  if (chain_.stride[0] == 1 && chain_.stride[1] == 1) flatten_pixels();
  reads_in_place_ =
      chain_.out_height == 1 && chain_.stride[1] == 1 && x_.c_stride == size && type_ == k.tile_type &&
      (type_ == DataType::f32 || chain_.channels % k.lanes == 0);  // pairs of pixels are read in whole vectors
  choose_tiles();
}

void Backward::flatten_pixels() {
  const ImageView* all[] = {&x_, &y_, &grad_, &x_grad_};
  const int64_t count = x_grad_.data ? 4 : 3;
  if (chain_.height > 1) {
    for (int64_t i = 0; i < count; ++i) {
      if (!all[i]->lines_contiguous(chain_.width)) return;
    }
    chain_.width *= chain_.height;
    chain_.height = 1;
  }
  bool contiguous = true;
  for (int64_t i = 0; i < count; ++i) contiguous = contiguous && all[i]->images_contiguous(chain_.width);
  if (contiguous || chain_.batch == 1) {
    chain_.width *= chain_.batch;
    chain_.batch = 1;
  }
  chain_.out_height = chain_.height;
  chain_.out_width = chain_.width;
}

void Backward::choose_tiles() {
  // the first round lays out one pixel, to see how many fit
  int64_t pixels = 1;
  for (int round = 0; round < 2; ++round) {
    ScratchLayout layout;
    int64_t widest = chain_.channels;
    x_offset_ = layout.reserve(reads_in_place_ ? 0 : pixels * tile_row_bytes(k_, chain_.channels));
    hidden_offset_.clear(), derivative_offset_.clear();
    for (const Layer& layer : layers_) {
      widest = std::max(widest, layer.channels);
      hidden_offset_.push_back(layout.reserve(pixels * tile_row_bytes(k_, layer.channels)));
      const bool kept = layer.activation > Activation::relu;
      derivative_offset_.push_back(layout.reserve(kept ? pixels * round_up(layer.channels, 2 * k_.lanes) * 4 : 0));
    }
    y_offset_ = hidden_offset_.back();  // the last layer is not recomputed: its place holds y
    const int64_t row = tile_row_bytes(k_, widest);
    gradient_offset_[0] = layout.reserve(pixels * row), gradient_offset_[1] = layout.reserve(pixels * row);
    x_grad_offset_ = layout.reserve(pixels * round_up(chain_.channels, 2 * k_.lanes) * 4);
    const int64_t depth = round_up(pixels, k_.uses_amx ? tile_depth : 2);
    const int64_t pairs = k_.tile_type == DataType::bf16 ? depth / 2 * round_up(widest, 2 * k_.lanes) * 4 : 0;
    pairs_offset_[0] = layout.reserve(pairs), pairs_offset_[1] = layout.reserve(pairs);
    scratch_bytes_ = layout.bytes;
    if (round > 0) break;
    pixels =
        std::max<int64_t>(k_.max_rows, std::min(tile_pixels, max_tile_bytes / std::max<int64_t>(1, scratch_bytes_)));
    tile_grid_ = make_tile_grid(chain_.batch, chain_.out_height, chain_.out_width, pixels, 1);
    pixels = tile_grid_.lines * tile_grid_.columns;
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t width = round_up(layers_[i].channels, max_vectors * k_.lanes);
    weight_sums_offset_.push_back(sums_size_);
    if (gradients_[i].weight_grad) sums_size_ += round_up(in_channels(i), k_.uses_amx ? tile_height : 1) * width;
    bias_sums_offset_.push_back(sums_size_);
    if (gradients_[i].bias_grad) sums_size_ += width;
  }
}

// Copies a tile of x, y or the gradient into scratch.
PixelGrid Backward::load(const ImageView& from, const Tile& t, bool strided, int64_t channels, char* to) const {
  const int64_t row = tile_row_bytes(k_, channels), down = strided ? chain_.stride[0] : 1,
                across = strided ? chain_.stride[1] : 1;
  for (int64_t line = 0; line < t.lines; ++line) {
    char* at = from.pixel(t.image, (t.line + line) * down, t.column * across);
    k_.load({at, from.c_stride, from.w_stride * across, type_, channels, t.columns}, to + line * t.columns * row, row);
  }
  return dense_grid(to, row, t.columns);
}

// Recomputes the hidden layers, and the derivatives of activations other than ReLU.
void Backward::recompute_hidden(const Tile& t, const PixelGrid& x, char* scratch) const {
  static constexpr int64_t no_offset = 0;
  PixelGrid a = x;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const bool last = i + 1 == layers_.size();
    if (last && !stores_derivative(i)) return;
    GemmArguments args;
    args.tap_offsets = &no_offset;
    args.tap_count = 1;
    args.k_steps = k_steps_of(k_, in_channels(i));
    args.panel = layer.weight;
    args.epilogue.bias = layer.bias.empty() ? nullptr : layer.bias.data();
    args.epilogue.activation = layer.activation;
    args.epilogue.out_type = k_.tile_type;
    args.epilogue.round_to_bf16 = type_ != k_.tile_type;
    args.epilogue.zero_tail = true;
    const PixelGrid out =
        last ? PixelGrid{} : dense_grid(scratch + hidden_offset_[i], tile_row_bytes(k_, layer.channels), t.pixels());
    const int64_t derivative_row_stride = round_up(layer.channels, 2 * k_.lanes) * 4;
    const PixelGrid derivative = stores_derivative(i)
                                     ? dense_grid(scratch + derivative_offset_[i], derivative_row_stride, t.pixels())
                                     : PixelGrid{};
    gemm_tile(k_, args, a, out, derivative, {}, 1, t.pixels(), Panels(k_, layer.channels, args.k_steps));
    a = out;
  }
}

// The gradient of the last layer's pre-activation.
PixelGrid Backward::output_gradient(const Tile& t, char* scratch) const {
  const size_t last = layers_.size() - 1;
  const int64_t channels = layers_[last].channels;
  const PixelGrid g = load(grad_, t, false, channels, scratch + gradient_offset_[last % 2]);
  if (layers_[last].activation == Activation::none) return g;
  Epilogue gate;
  gate.round_to_bf16 = type_ != k_.tile_type;
  gate.gate_is_relu_output = !stores_derivative(last);
  if (gate.gate_is_relu_output) {
    const PixelGrid y = load(y_, t, false, channels, scratch + y_offset_);
    gate.gate = y.data, gate.gate_row_stride = y.pixel_stride;
  } else {
    gate.gate = scratch + derivative_offset_[last], gate.gate_row_stride = round_up(channels, 2 * k_.lanes) * 4;
  }
  k_.apply_gate(g.data, g.pixel_stride, gate, t.pixels(), channels);
  if (padded_channels(k_, channels) != channels) {
    for (int64_t i = 0; i < t.pixels(); ++i) std::memset(g.data + i * g.pixel_stride + channels * 2, 0, 2);
  }
  return g;
}

// sums[input channel][output channel] += sum over pixels of in * g
void Backward::add_weight_gradient(size_t layer, const PixelGrid& in, const PixelGrid& g, int64_t pixels, char* scratch,
                                   float* sums) const {
  const int64_t channels = in_channels(layer), columns = layers_[layer].channels;
  if (gradients_[layer].bias_grad)
    k_.add_column_sums(g.data, g.pixel_stride, pixels, columns, sums + bias_sums_offset_[layer]);
  if (!gradients_[layer].weight_grad) return;
  static constexpr int64_t no_offset = 0;
  OuterProductArguments args;
  args.segment_offsets = &no_offset;
  args.segment_count = 1;
  args.k_steps = pixels;
  const char *a = in.data, *b = g.data;
  args.a_k_stride = in.pixel_stride, args.b_k_stride = g.pixel_stride;
  if (k_.tile_type == DataType::bf16) {  // pairs of pixels
    char *inputs = scratch + pairs_offset_[0], *pairs = scratch + pairs_offset_[1];
    args.k_steps = ceil_div(pixels, 2);
    args.b_k_stride = round_up(columns, 2 * k_.lanes) * 4;
    k_.interleave_pixel_pairs(g.data, g.pixel_stride, pixels, columns, pairs, args.b_k_stride);
    if (k_.uses_amx) {
      const int64_t whole = round_up(pixels, tile_depth) / 2;
      std::memset(pairs + args.k_steps * args.b_k_stride, 0, (whole - args.k_steps) * args.b_k_stride);
      args.k_steps = whole;
      args.a_k_stride = whole * 4;
      k_.transpose_pixels(in.data, in.pixel_stride, pixels, channels, inputs, args.a_k_stride);
    } else {
      args.a_k_stride = round_up(channels, 2 * k_.lanes) * 4;
      k_.interleave_pixel_pairs(in.data, in.pixel_stride, pixels, channels, inputs, args.a_k_stride);
    }
    a = inputs, b = pairs;
  }
  const Panels panels(k_, columns, 0);
  args.sums_row_stride = panels.count * panels.width;
  const int64_t groups = ceil_div(channels, k_.max_rows);
  for (int64_t j = 0; j < panels.count; ++j) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = k_.uses_amx ? group * k_.max_rows : channels * group / groups;
      const int64_t rows =
          k_.uses_amx ? std::min<int64_t>(k_.max_rows, channels - first) : channels * (group + 1) / groups - first;
      args.a = a + first * (k_.uses_amx ? args.a_k_stride : 4);
      args.b = b + j * panels.width * 4;
      args.sums = sums + weight_sums_offset_[layer] + first * args.sums_row_stride + j * panels.width;
      k_.outer_product(args, int(rows), panels.vectors(k_, j));
    }
  }
}

// The gradient of the previous layer's pre-activation; for the first layer that of x, written to x_grad.
PixelGrid Backward::input_gradient(size_t layer, const Tile& t, const PixelGrid& g, char* scratch) const {
  static constexpr int64_t no_offset = 0;
  const int64_t channels = in_channels(layer);
  const bool to_x = layer == 0;
  const bool direct = to_x && x_grad_.c_stride == element_size(type_);
  GemmArguments args;
  args.tap_offsets = &no_offset;
  args.tap_count = 1;
  args.k_steps = k_steps_of(k_, layers_[layer].channels);
  args.panel = gradients_[layer].weight;
  args.epilogue.out_type = to_x ? type_ : k_.tile_type;
  args.epilogue.round_to_bf16 = type_ == DataType::bf16 && args.epilogue.out_type == DataType::f32;
  args.epilogue.zero_tail = !to_x;
  const Panels panels(k_, channels, args.k_steps);
  if (!to_x) {
    const PixelGrid out =
        dense_grid(scratch + gradient_offset_[(layer - 1) % 2], tile_row_bytes(k_, channels), t.columns);
    PixelGrid gate{};
    if (stores_derivative(layer - 1)) {
      gate = dense_grid(scratch + derivative_offset_[layer - 1], round_up(channels, 2 * k_.lanes) * 4, t.columns);
    } else if (layers_[layer - 1].activation == Activation::relu) {
      gate = dense_grid(scratch + hidden_offset_[layer - 1], tile_row_bytes(k_, channels), t.columns);
      args.epilogue.gate_is_relu_output = true;
    }
    gemm_tile(k_, args, g, out, {}, gate, t.lines, t.columns, panels);
    return out;
  }
  const int64_t step = x_grad_.w_stride * chain_.stride[1];
  const auto at = [&](int64_t line) {
    return x_grad_.pixel(t.image, (t.line + line) * chain_.stride[0], t.column * chain_.stride[1]);
  };
  const int64_t out_row_stride = round_up(channels, 2 * k_.lanes) * element_size(type_);
  const PixelGrid out = direct ? PixelGrid{at(0), step, x_grad_.h_stride * chain_.stride[0]}
                               : dense_grid(scratch + x_grad_offset_, out_row_stride, t.columns);
  gemm_tile(k_, args, g, out, {}, {}, t.lines, t.columns, panels);
  for (int64_t line = 0; !direct && line < t.lines; ++line) {
    k_.store({at(line), x_grad_.c_stride, step, type_, channels, t.columns}, out.data + line * out.line_stride,
             out_row_stride);
  }
  return out;
}

void Backward::run_tile(const Tile& t, char* scratch, float* sums) const {
  const InstructionSetScope scope(k_);
  const PixelGrid x = reads_in_place_
                          ? PixelGrid{x_.pixel(t.image, t.line, t.column), x_.w_stride, x_.w_stride * t.columns}
                          : load(x_, t, true, chain_.channels, scratch + x_offset_);
  recompute_hidden(t, x, scratch);
  PixelGrid g = output_gradient(t, scratch);
  for (size_t i = layers_.size(); i-- > first_layer_;) {
    const PixelGrid in =
        i == 0 ? x : dense_grid(scratch + hidden_offset_[i - 1], tile_row_bytes(k_, in_channels(i)), t.columns);
    add_weight_gradient(i, in, g, t.pixels(), scratch, sums);
    if (i > first_layer_ || (i == 0 && x_grad_.data)) g = input_gradient(i, t, g, scratch);
  }
}

void Backward::store_element(void* to, int64_t index, float value) const {
  if (type_ == DataType::f32) {
    static_cast<float*>(to)[index] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  static_cast<uint16_t*>(to)[index] = uint16_t(rounded >> 16);
}

// Adds the slices in order, for one input channel of a weight or, with the channel past the last, for the bias.
void Backward::reduce_slices(size_t layer, int64_t channel, const float* sums, int64_t slices) const {
  const int64_t channels = in_channels(layer), columns = layers_[layer].channels;
  const int64_t width = round_up(columns, max_vectors * k_.lanes);
  const bool bias = channel == channels;
  void* to = bias ? gradients_[layer].bias_grad : gradients_[layer].weight_grad;
  if (!to) return;
  const float* from = sums + (bias ? bias_sums_offset_[layer] : weight_sums_offset_[layer] + channel * width);
  constexpr int64_t block = 64;
  for (int64_t first = 0; first < columns; first += block) {
    float total[block] = {};
    const int64_t count = std::min(block, columns - first);
    for (int64_t slice = 0; slice < slices; ++slice) {
      const float* part = from + slice * sums_size_ + first;
      for (int64_t c = 0; c < count; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < count; ++c)
      store_element(to, bias ? first + c : (first + c) * channels + channel, total[c]);
  }
}

nin_status Backward::run(const nin_thread_pool& pool) const {
  const int64_t tiles = tile_grid_.count();
  const int64_t wanted = std::clamp<int64_t>(tiles / tiles_per_slice, min_slices, max_slices);
  const int64_t allowed = sums_size_ == 0 ? tiles : std::clamp<int64_t>(slices_bytes / (sums_size_ * 4), 1, wanted);
  const int64_t slices = std::min(tiles, allowed);
  const std::unique_ptr<float, decltype(&std::free)> sums(
      static_cast<float*>(std::aligned_alloc(64, size_t(std::max<int64_t>(64, round_up(slices * sums_size_ * 4, 64))))),
      std::free);
  if (!sums) return nin_out_of_memory;
  const nin_status status = run_tasks(pool, slices, size_t(scratch_bytes_), [&](int64_t slice, char* scratch) {
    float* own = sums.get() + slice * sums_size_;
    std::memset(own, 0, size_t(sums_size_ * 4));
    const int64_t last = tiles * (slice + 1) / slices;
    for (int64_t tile = tiles * slice / slices; tile < last; ++tile) run_tile(tile_at(tile_grid_, tile), scratch, own);
  });
  if (status != nin_ok || sums_size_ == 0) return status;
  for (size_t i = first_layer_; i < layers_.size(); ++i) {
    const nin_status reduced = run_tasks(
        pool, in_channels(i) + 1, 64, [&](int64_t channel, char*) { reduce_slices(i, channel, sums.get(), slices); });
    if (reduced != nin_ok) return reduced;
  }
  return nin_ok;
}

}  // namespace
}  // namespace nin

int32_t nin_backward(const void* kernels, const nin_chain* chain, const nin_layer* layers,
                     const nin_gradient_strides* gradient, const nin_layer_gradient* gradients, const void* grad,
                     const void* x, const void* y, void* x_grad, const nin_thread_pool* pool) {
  try {
    return nin::Backward(*static_cast<const nin::Kernels*>(kernels), *chain, layers, *gradient, gradients, grad, x, y,
                         x_grad)
        .run(*pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
