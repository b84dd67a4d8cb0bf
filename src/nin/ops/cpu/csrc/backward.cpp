// The backward pass of a chain of 1×1 layers: each tile computes its hidden layers again, then walks back through
// them. Weights' gradients are sums over pixels. The tiles are cut into slices, each with float sums of its own, and
// the slices are added in order; neither cut knows of the number of threads, so the bits do not depend on it.
#include <cstring>
#include <memory>
#include <new>

#include "parallel.hpp"
#include "tiles.hpp"

namespace nin {
namespace {

// More pixels than forward: the sums of a weight's gradient are read and written once for all pixels of a tile.
constexpr int64_t tile_pixels = 128;
constexpr int64_t tile_bytes = 768 << 10;
// Slices keep the cores busy; each costs the memory of all weights in float, which is cleared and added up at the end:
// as much time as a quarter to a half of a tile. So few tiles make few slices.
constexpr int64_t most_slices = 32, few_slices = 8, tiles_per_slice = 4;
constexpr int64_t slices_bytes = 64 << 20;

struct Memory {
  int64_t bytes = 0;
  int64_t take(int64_t more) {
    const int64_t at = bytes;
    bytes += round_up(more, 64);
    return at;
  }
};

class Backward {
 public:
  Backward(const Kernels& k, const nin_problem& problem, const nin_layer* layers, const nin_gradient& gradient,
           const nin_layer_gradient* gradients, const void* grad, const void* x, const void* y, void* x_grad);
  int64_t scratch_bytes() const { return scratch_bytes_; }
  nin_status run(const nin_pool& pool) const;

 private:
  void flatten();
  void choose_tiles();
  int64_t channels_into(size_t layer) const { return layer == 0 ? p_.channels : layers_[layer - 1].channels; }
  bool derivative_kept(size_t layer) const { return layers_[layer].activation > Activation::relu; }
  void run_tile(const Tile& t, char* scratch, float* sums) const;
  Grid load(const Images& from, const Tile& t, bool strided, int64_t channels, char* to) const;
  void compute_again(const Tile& t, const Grid& x, char* scratch) const;
  Grid last_gradient(const Tile& t, char* scratch) const;
  void add_weight_gradient(size_t layer, const Grid& in, const Grid& g, int64_t pixels, char* scratch,
                           float* sums) const;
  Grid pass_back(size_t layer, const Tile& t, const Grid& g, char* scratch) const;
  void reduce(size_t layer, int64_t channel, const float* sums, int64_t slices) const;
  void put(void* to, int64_t index, float value) const;

  const Kernels& k_;
  nin_problem p_;
  Type type_;
  Images x_, y_, grad_, x_grad_;
  std::vector<Layer> layers_;
  std::vector<nin_layer_gradient> gradients_;
  size_t stop_ = 0;  // the first layer whose gradients, or whose input's, are wanted
  Cut cut_;
  bool direct_ = false;
  // places in a thread's scratch; by layer where there are several
  int64_t x_at_ = 0, y_at_ = 0, pairs_at_[2] = {}, gradient_at_[2] = {}, x_grad_at_ = 0, scratch_bytes_ = 0;
  std::vector<int64_t> hidden_at_, derivative_at_;
  // places in a slice's sums, in floats
  std::vector<int64_t> weight_sums_at_, bias_sums_at_;
  int64_t sums_ = 0;
};

Backward::Backward(const Kernels& k, const nin_problem& problem, const nin_layer* layers, const nin_gradient& gradient,
                   const nin_layer_gradient* gradients, const void* grad, const void* x, const void* y, void* x_grad)
    : k_(k), p_(problem), type_(Type(problem.type)), layers_(read_layers(k, problem, layers)),
      gradients_(gradients, gradients + problem.layers) {
  const int64_t size = size_of(type_);
  x_ = images(x, problem.x_stride, size);
  y_ = images(y, problem.y_stride, size);
  grad_ = images(grad, gradient.grad_stride, size);
  x_grad_ = images(x_grad, gradient.x_grad_stride, size);
  if (!x_grad) {
    while (stop_ + 1 < layers_.size() && !gradients_[stop_].weight_grad && !gradients_[stop_].bias_grad) ++stop_;
  }
  if (p_.stride[0] == 1 && p_.stride[1] == 1) flatten();
  direct_ = p_.out_height == 1 && p_.stride[1] == 1 && x_.c == size && type_ == k.type &&
            (type_ == Type::f32 || p_.channels % k.lanes == 0);  // pairs of pixels are read by whole vectors
  choose_tiles();
}

void Backward::flatten() {
  const Images* all[] = {&x_, &y_, &grad_, &x_grad_};
  const int64_t count = x_grad_.at ? 4 : 3;
  if (p_.height > 1) {
    for (int64_t i = 0; i < count; ++i) {
      if (!all[i]->lines_follow(p_.width)) return;
    }
    p_.width *= p_.height;
    p_.height = 1;
  }
  bool follow = true;
  for (int64_t i = 0; i < count; ++i) follow = follow && all[i]->images_follow(p_.width);
  if (follow || p_.batch == 1) {
    p_.width *= p_.batch;
    p_.batch = 1;
  }
  p_.out_height = p_.height;
  p_.out_width = p_.width;
}

void Backward::choose_tiles() {
  // first for one pixel, to see how many fit
  int64_t pixels = 1;
  for (int round = 0; round < 2; ++round) {
    Memory memory;
    int64_t widest = p_.channels;
    x_at_ = memory.take(direct_ ? 0 : pixels * tile_row(k_, p_.channels));
    hidden_at_.clear(), derivative_at_.clear();
    for (const Layer& layer : layers_) {
      widest = std::max(widest, layer.channels);
      hidden_at_.push_back(memory.take(pixels * tile_row(k_, layer.channels)));
      const bool kept = layer.activation > Activation::relu;
      derivative_at_.push_back(memory.take(kept ? pixels * round_up(layer.channels, 2 * k_.lanes) * 4 : 0));
    }
    y_at_ = hidden_at_.back();  // the last hidden layer is not computed again: y stands there
    const int64_t row = tile_row(k_, widest);
    gradient_at_[0] = memory.take(pixels * row), gradient_at_[1] = memory.take(pixels * row);
    x_grad_at_ = memory.take(pixels * round_up(p_.channels, 2 * k_.lanes) * 4);
    const int64_t depth = round_up(pixels, k_.tiles ? tile_depth : 2);
    const int64_t pairs = k_.type == Type::bf16 ? depth / 2 * round_up(widest, 2 * k_.lanes) * 4 : 0;
    pairs_at_[0] = memory.take(pairs), pairs_at_[1] = memory.take(pairs);
    scratch_bytes_ = memory.bytes;
    if (round > 0) break;
    pixels = std::max<int64_t>(k_.rows, std::min(tile_pixels, tile_bytes / std::max<int64_t>(1, scratch_bytes_)));
    cut_ = cut(p_.batch, p_.out_height, p_.out_width, pixels, 1);
    pixels = cut_.lines * cut_.columns;
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t width = round_up(layers_[i].channels, max_vectors * k_.lanes);
    weight_sums_at_.push_back(sums_);
    if (gradients_[i].weight_grad) sums_ += round_up(channels_into(i), k_.tiles ? tile_height : 1) * width;
    bias_sums_at_.push_back(sums_);
    if (gradients_[i].bias_grad) sums_ += width;
  }
}

// A tile of x, of the gradient or of y, as the kernels take it.
Grid Backward::load(const Images& from, const Tile& t, bool strided, int64_t channels, char* to) const {
  const int64_t row = tile_row(k_, channels), down = strided ? p_.stride[0] : 1, across = strided ? p_.stride[1] : 1;
  for (int64_t line = 0; line < t.lines; ++line) {
    char* at = from.pixel(t.image, (t.line + line) * down, t.column * across);
    k_.load({at, from.c, from.w * across, type_, channels, t.columns}, to + line * t.columns * row, row);
  }
  if (padded_channels(k_, channels) != channels) {
    for (int64_t i = 0; i < t.pixels(); ++i) std::memset(to + i * row + channels * 2, 0, 2);
  }
  return dense(to, row, t.columns);
}

// The hidden layers, and the derivatives that cannot be taken from an activation's result.
void Backward::compute_again(const Tile& t, const Grid& x, char* scratch) const {
  static constexpr int64_t no_offset = 0;
  Grid a = x;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const bool last = i + 1 == layers_.size();
    if (last && !derivative_kept(i)) return;
    Product p;
    p.taps = &no_offset;
    p.tap_count = 1;
    p.steps = steps_of(k_, channels_into(i));
    p.panel = layer.weight;
    p.finish.bias = layer.bias.empty() ? nullptr : layer.bias.data();
    p.finish.activation = layer.activation;
    p.finish.out_type = k_.type;
    p.finish.round = type_ != k_.type;
    p.finish.whole = true;
    const Grid out = last ? Grid{} : dense(scratch + hidden_at_[i], tile_row(k_, layer.channels), t.pixels());
    const int64_t derivative_row = round_up(layer.channels, 2 * k_.lanes) * 4;
    const Grid derivative =
        derivative_kept(i) ? dense(scratch + derivative_at_[i], derivative_row, t.pixels()) : Grid{};
    multiply_tile(k_, p, a, out, derivative, {}, 1, t.pixels(), Panels(k_, layer.channels, p.steps));
    a = out;
  }
}

// The gradient before the last activation.
Grid Backward::last_gradient(const Tile& t, char* scratch) const {
  const size_t last = layers_.size() - 1;
  const int64_t channels = layers_[last].channels;
  const Grid g = load(grad_, t, false, channels, scratch + gradient_at_[last % 2]);
  if (layers_[last].activation == Activation::none) return g;
  Finish gate;
  gate.round = type_ != k_.type;
  gate.gate_is_result = !derivative_kept(last);
  if (gate.gate_is_result) {
    const Grid y = load(y_, t, false, channels, scratch + y_at_);
    gate.gate = y.at, gate.gate_row = y.row;
  } else {
    gate.gate = scratch + derivative_at_[last], gate.gate_row = round_up(channels, 2 * k_.lanes) * 4;
  }
  k_.apply_gate(g.at, g.row, gate, t.pixels(), channels);
  if (padded_channels(k_, channels) != channels) {
    for (int64_t i = 0; i < t.pixels(); ++i) std::memset(g.at + i * g.row + channels * 2, 0, 2);
  }
  return g;
}

// sums[channel in][channel out] += over pixels: in * g
void Backward::add_weight_gradient(size_t layer, const Grid& in, const Grid& g, int64_t pixels, char* scratch,
                                   float* sums) const {
  const int64_t channels = channels_into(layer), columns = layers_[layer].channels;
  if (gradients_[layer].bias_grad) k_.sum_pixels(g.at, g.row, pixels, columns, sums + bias_sums_at_[layer]);
  if (!gradients_[layer].weight_grad) return;
  static constexpr int64_t no_offset = 0;
  OuterProduct p;
  p.segments = &no_offset;
  p.segment_count = 1;
  p.steps = pixels;
  const char *a = in.at, *b = g.at;
  p.a_step = in.row, p.b_step = g.row;
  if (k_.type == Type::bf16) {  // pairs of pixels
    char *inputs = scratch + pairs_at_[0], *pairs = scratch + pairs_at_[1];
    p.steps = divide_up(pixels, 2);
    p.b_step = round_up(columns, 2 * k_.lanes) * 4;
    k_.pair_pixels(g.at, g.row, pixels, columns, pairs, p.b_step);
    if (k_.tiles) {
      const int64_t whole = round_up(pixels, tile_depth) / 2;
      std::memset(pairs + p.steps * p.b_step, 0, (whole - p.steps) * p.b_step);
      p.steps = whole;
      p.a_step = whole * 4;
      k_.turn_pixels(in.at, in.row, pixels, channels, inputs, p.a_step);
    } else {
      p.a_step = round_up(channels, 2 * k_.lanes) * 4;
      k_.pair_pixels(in.at, in.row, pixels, channels, inputs, p.a_step);
    }
    a = inputs, b = pairs;
  }
  const Panels panels(k_, columns, 0);
  p.sums_row = panels.count * panels.width;
  const int64_t groups = divide_up(channels, k_.rows);
  for (int64_t j = 0; j < panels.count; ++j) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = k_.tiles ? group * k_.rows : channels * group / groups;
      const int64_t rows = k_.tiles ? std::min<int64_t>(k_.rows, channels - first)
                                    : channels * (group + 1) / groups - first;
      p.a = a + first * (k_.tiles ? p.a_step : 4);
      p.b = b + j * panels.width * 4;
      p.sums = sums + weight_sums_at_[layer] + first * p.sums_row + j * panels.width;
      k_.accumulate(p, int(rows), panels.vectors(k_, j));
    }
  }
}

// The gradient before the activation of the layer before; for the first layer, the gradient of x, written where it
// belongs.
Grid Backward::pass_back(size_t layer, const Tile& t, const Grid& g, char* scratch) const {
  static constexpr int64_t no_offset = 0;
  const int64_t channels = channels_into(layer);
  const bool to_x = layer == 0;
  const bool direct = to_x && x_grad_.c == size_of(type_);
  Product p;
  p.taps = &no_offset;
  p.tap_count = 1;
  p.steps = steps_of(k_, layers_[layer].channels);
  p.panel = gradients_[layer].weight;
  p.finish.out_type = to_x ? type_ : k_.type;
  p.finish.round = type_ == Type::bf16 && p.finish.out_type == Type::f32;
  p.finish.whole = !to_x;
  const Panels panels(k_, channels, p.steps);
  if (!to_x) {
    const Grid out = dense(scratch + gradient_at_[(layer - 1) % 2], tile_row(k_, channels), t.columns);
    Grid gate{};
    if (derivative_kept(layer - 1)) {
      gate = dense(scratch + derivative_at_[layer - 1], round_up(channels, 2 * k_.lanes) * 4, t.columns);
    } else if (layers_[layer - 1].activation == Activation::relu) {
      gate = dense(scratch + hidden_at_[layer - 1], tile_row(k_, channels), t.columns);
      p.finish.gate_is_result = true;
    }
    multiply_tile(k_, p, g, out, {}, gate, t.lines, t.columns, panels);
    return out;
  }
  const int64_t step = x_grad_.w * p_.stride[1];
  const auto at = [&](int64_t line) {
    return x_grad_.pixel(t.image, (t.line + line) * p_.stride[0], t.column * p_.stride[1]);
  };
  const int64_t out_row = round_up(channels, 2 * k_.lanes) * size_of(type_);
  const Grid out =
      direct ? Grid{at(0), step, x_grad_.h * p_.stride[0]} : dense(scratch + x_grad_at_, out_row, t.columns);
  multiply_tile(k_, p, g, out, {}, {}, t.lines, t.columns, panels);
  for (int64_t line = 0; !direct && line < t.lines; ++line) {
    k_.store({at(line), x_grad_.c, step, type_, channels, t.columns}, out.at + line * out.line, out_row);
  }
  return out;
}

void Backward::run_tile(const Tile& t, char* scratch, float* sums) const {
  const Use use(k_);
  const Grid x = direct_ ? Grid{x_.pixel(t.image, t.line, t.column), x_.w, x_.w * t.columns}
                         : load(x_, t, true, p_.channels, scratch + x_at_);
  compute_again(t, x, scratch);
  Grid g = last_gradient(t, scratch);
  for (size_t i = layers_.size(); i-- > stop_;) {
    const Grid in = i == 0 ? x : dense(scratch + hidden_at_[i - 1], tile_row(k_, channels_into(i)), t.columns);
    add_weight_gradient(i, in, g, t.pixels(), scratch, sums);
    if (i > stop_ || (i == 0 && x_grad_.at)) g = pass_back(i, t, g, scratch);
  }
}

void Backward::put(void* to, int64_t index, float value) const {
  if (type_ == Type::f32) {
    static_cast<float*>(to)[index] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  static_cast<uint16_t*>(to)[index] = uint16_t(rounded >> 16);
}

// Adds the slices in order, for one input channel of a weight, or (the channel past the last) for the bias.
void Backward::reduce(size_t layer, int64_t channel, const float* sums, int64_t slices) const {
  const int64_t channels = channels_into(layer), columns = layers_[layer].channels;
  const int64_t width = round_up(columns, max_vectors * k_.lanes);
  const bool bias = channel == channels;
  void* to = bias ? gradients_[layer].bias_grad : gradients_[layer].weight_grad;
  if (!to) return;
  const float* from = sums + (bias ? bias_sums_at_[layer] : weight_sums_at_[layer] + channel * width);
  constexpr int64_t block = 64;
  for (int64_t first = 0; first < columns; first += block) {
    float total[block] = {};
    const int64_t count = std::min(block, columns - first);
    for (int64_t slice = 0; slice < slices; ++slice) {
      const float* part = from + slice * sums_ + first;
      for (int64_t c = 0; c < count; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < count; ++c) put(to, bias ? first + c : (first + c) * channels + channel, total[c]);
  }
}

nin_status Backward::run(const nin_pool& pool) const {
  const int64_t tiles = cut_.tiles();
  const int64_t wanted = std::clamp<int64_t>(tiles / tiles_per_slice, few_slices, most_slices);
  const int64_t allowed = sums_ == 0 ? tiles : std::clamp<int64_t>(slices_bytes / (sums_ * 4), 1, wanted);
  const int64_t slices = std::min(tiles, allowed);
  const std::unique_ptr<float, decltype(&std::free)> sums(
      static_cast<float*>(std::aligned_alloc(64, size_t(std::max<int64_t>(64, round_up(slices * sums_ * 4, 64))))),
      std::free);
  if (!sums) return nin_out_of_memory;
  const nin_status status = run_tasks(pool, slices, size_t(scratch_bytes_), [&](int64_t slice, char* scratch) {
    float* own = sums.get() + slice * sums_;
    std::memset(own, 0, size_t(sums_ * 4));
    const int64_t last = tiles * (slice + 1) / slices;
    for (int64_t tile = tiles * slice / slices; tile < last; ++tile) run_tile(tile_of(cut_, tile), scratch, own);
  });
  if (status != nin_ok || sums_ == 0) return status;
  for (size_t i = stop_; i < layers_.size(); ++i) {
    const nin_status reduced = run_tasks(pool, channels_into(i) + 1, 64, [&](int64_t channel, char*) {
      reduce(i, channel, sums.get(), slices);
    });
    if (reduced != nin_ok) return reduced;
  }
  return nin_ok;
}

}  // namespace
}  // namespace nin

int64_t nin_backward_scratch_bytes(const void* kernels, const nin_problem* problem, const nin_layer* layers,
                                   const nin_gradient* gradient, const nin_layer_gradient* gradients) {
  const auto& k = *static_cast<const nin::Kernels*>(kernels);
  return nin::Backward(k, *problem, layers, *gradient, gradients, nullptr, nullptr, nullptr, nullptr).scratch_bytes();
}

int32_t nin_backward(const void* kernels, const nin_problem* problem, const nin_layer* layers,
                     const nin_gradient* gradient, const nin_layer_gradient* gradients, const void* grad,
                     const void* x, const void* y, void* x_grad, const nin_pool* pool) {
  try {
    return nin::Backward(*static_cast<const nin::Kernels*>(kernels), *problem, layers, *gradient, gradients, grad, x,
                         y, x_grad)
        .run(*pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
