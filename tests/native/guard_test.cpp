// Runs the kernels on buffers that end or start at a guard page, and compares with plain loops in double. Built with
// AddressSanitizer, which watches the library's own memory.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "c_api.hpp"

namespace {

std::mt19937 random_numbers(0);

float bf16_to_float(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Values of a dtype between guard pages.
class Buffer {
 public:
  Buffer(int64_t count, int64_t type, bool at_end) : type_(type) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * size();
    mapped_ = (bytes + page - 1) / page * page + 2 * page;
    memory_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED) std::abort();
    mprotect(memory_, page, PROT_NONE);
    mprotect(memory_ + mapped_ - page, page, PROT_NONE);
    data = at_end ? memory_ + mapped_ - page - bytes : memory_ + page;
  }
  ~Buffer() { munmap(memory_, mapped_); }
  Buffer(const Buffer&) = delete;

  int64_t size() const { return type_ == 1 ? 2 : 4; }
  double get(int64_t i) const {
    return type_ == 1 ? bf16_to_float(reinterpret_cast<uint16_t*>(data)[i]) : reinterpret_cast<float*>(data)[i];
  }
  void set(int64_t i, double value) {
    if (type_ == 1) {
      reinterpret_cast<uint16_t*>(data)[i] = float_to_bf16(float(value));
    } else {
      reinterpret_cast<float*>(data)[i] = float(value);
    }
  }
  void fill(int64_t count, double scale) {
    std::uniform_real_distribution<double> values(-scale, scale);
    for (int64_t i = 0; i < count; ++i) set(i, values(random_numbers));
  }
  char* data;

 private:
  int64_t type_, mapped_;
  char* memory_;
};

struct Shape {
  int64_t batch, channels, height, width, kernel, stride, padding, dilation;
  int64_t out[2];
};

struct Case {
  const char* isa;
  int64_t type;
  Shape shape;
  bool channels_last, at_end;
  int64_t winograd_tile;  // 0: direct convolution
  bool outlier = false;   // one input is a million times the others
};

void set_strides(int64_t (&strides)[4], int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t last[4] = {channels * height * width, 1, width * channels, channels};
  const int64_t first[4] = {channels * height * width, height * width, width, 1};
  std::memcpy(strides, channels_last ? last : first, sizeof strides);
}

bool close(const Case& c, const char* what, double got, double want, double size) {
  const double tolerance = (c.type == 1 ? 0.05 : 1e-4) * (size + 1e-3);
  if (std::abs(got - want) <= tolerance) return true;
  std::printf("%s %s: %g instead of %g: type %ld, channels %ld, kernel %ld, Winograd %ld, channels_last %d, outlier %d\n",
              c.isa, what, got, want, long(c.type), long(c.shape.channels), long(c.shape.kernel), long(c.winograd_tile),
              c.channels_last, c.outlier);
  return false;
}

// The weight gradient of a k×k layer, with Winograd or directly: some values, against plain sums.
bool check_weight_gradient(const Case& c, nin_chain p, const Buffer& x) {
  const Shape& s = c.shape;
  const int64_t columns = s.out[0], pixels = s.batch * p.out_height * p.out_width, k = s.kernel;
  Buffer grad(pixels * columns, c.type, c.at_end);
  grad.fill(pixels * columns, 1);
  p.layers = 1;
  set_strides(p.y_stride, columns, p.out_height, p.out_width, c.channels_last);
  const int64_t row = (columns + 15) / 16 * 16;
  Buffer got(c.winograd_tile ? columns * s.channels * k * k : (k * k * s.channels + 1) * row, 0, c.at_end);
  const nin_thread_pool pool{nullptr, 2};
  const void* kernels = nin_find_kernels(c.isa, c.type);
  float* to = reinterpret_cast<float*>(got.data);
  nin_gradient_strides strides{};
  std::memcpy(strides.grad_stride, p.y_stride, sizeof strides.grad_stride);
  const int32_t status =
      c.winograd_tile ? nin_winograd_gradient(kernels, &p, columns, x.data, grad.data, to, &pool)
                      : nin_tap_gradient(kernels, &p, &strides, columns, x.data, grad.data, nullptr, to, row, &pool);
  if (status != 0) return false;
  bool good = true;
  for (int64_t i = 0; i < columns * s.channels * k * k; i += 1 + columns * s.channels * k * k / 8) {
    const int64_t tap = i % (k * k), channel = i / (k * k) % s.channels, column = i / (k * k) / s.channels;
    double want = 0, size = 0;
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t h = 0; h < p.out_height; ++h) {
        for (int64_t w = 0; w < p.out_width; ++w) {
          const int64_t y = h * s.stride - s.padding + tap / k, z = w * s.stride - s.padding + tap % k;
          if (y < 0 || y >= s.height || z < 0 || z >= s.width) continue;
          const double part =
              x.get(n * p.x_stride[0] + channel * p.x_stride[1] + y * p.x_stride[2] + z * p.x_stride[3]) *
              grad.get(n * p.y_stride[0] + column * p.y_stride[1] + h * p.y_stride[2] + w * p.y_stride[3]);
          want += part, size += std::abs(part);
        }
      }
    }
    const int64_t at = c.winograd_tile ? i : (tap * s.channels + channel) * row + column;
    good = good && close(c, "gradient of the weight", got.get(at), want, size + 1);
  }
  return good;
}

// A sum of products, and of their magnitudes.
struct Sum {
  double value = 0, size = 0;

  void add(double product) { value += product, size += std::abs(product); }
};

// The gradients of two 1×1 layers with ReLU, for the input and the weights, against plain sums.
bool check_chain_gradients(const Case& c, const nin_chain& p, const Buffer& x, const Buffer& y, const Buffer& grad,
                           const Buffer (&weights)[2], const Buffer (&biases)[2], const Buffer& x_grad,
                           const Buffer (&weight_grads)[2]) {
  const Shape& s = c.shape;
  const int64_t pixels = s.batch * p.out_height * p.out_width;
  constexpr int64_t max_products = 3'000'000;  // more would take minutes
  if (pixels * s.out[0] * (s.channels + s.out[1]) > max_products) return true;
  std::vector<Sum> first(size_t(s.out[0] * s.channels)), second(size_t(s.out[1] * s.out[0]));
  bool good = true;
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t n = i / p.out_width / p.out_height, row = i / p.out_width % p.out_height, column = i % p.out_width;
    const auto in = [&](int64_t channel) {
      return n * p.x_stride[0] + channel * p.x_stride[1] + row * s.stride * p.x_stride[2] +
             column * s.stride * p.x_stride[3];
    };
    std::vector<Sum> back(size_t(s.out[0]));
    std::vector<Sum> hidden(size_t(s.out[0]));
    for (int64_t h = 0; h < s.out[0]; ++h) {
      Sum& sum = hidden[size_t(h)];
      sum.add(biases[0].get(h));
      for (int64_t ch = 0; ch < s.channels; ++ch) sum.add(weights[0].get(h * s.channels + ch) * x.get(in(ch)));
      sum.value = std::max(0.0, sum.value);
    }
    for (int64_t o = 0; o < s.out[1]; ++o) {
      const int64_t at = n * p.y_stride[0] + o * p.y_stride[1] + row * p.y_stride[2] + column * p.y_stride[3];
      const double g = y.get(at) > 0 ? grad.get(at) : 0;
      for (int64_t h = 0; h < s.out[0]; ++h) {
        Sum& weight = second[size_t(o * s.out[0] + h)];
        weight.value += g * hidden[size_t(h)].value, weight.size += std::abs(g) * hidden[size_t(h)].size;
        if (hidden[size_t(h)].value > 0) back[size_t(h)].add(g * weights[1].get(o * s.out[0] + h));
      }
    }
    for (int64_t ch = 0; ch < s.channels; ++ch) {
      Sum sum;
      for (int64_t h = 0; h < s.out[0]; ++h) {
        const double w = weights[0].get(h * s.channels + ch), value = x.get(in(ch));
        sum.value += w * back[size_t(h)].value, sum.size += std::abs(w) * back[size_t(h)].size;
        Sum& weight = first[size_t(h * s.channels + ch)];
        weight.value += value * back[size_t(h)].value, weight.size += std::abs(value) * back[size_t(h)].size;
      }
      good = good && close(c, "gradient of the input", x_grad.get(in(ch)), sum.value, sum.size);
    }
  }
  for (size_t i = 0; i < first.size(); ++i) {
    good = good && close(c, "gradient of the first weight", weight_grads[0].get(int64_t(i)), first[i].value, first[i].size);
  }
  for (size_t i = 0; i < second.size(); ++i) {
    good =
        good && close(c, "gradient of the second weight", weight_grads[1].get(int64_t(i)), second[i].value, second[i].size);
  }
  return good;
}

// Two layers; the second's ReLU and bias; forward, and backward where the first is 1×1.
bool run(const Case& c) {
  const Shape& s = c.shape;
  const void* kernels = nin_find_kernels(c.isa, c.type);
  if (!kernels) return true;
  nin_chain p{};
  p.type = c.type, p.batch = s.batch, p.channels = s.channels, p.height = s.height, p.width = s.width, p.layers = 2;
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = s.kernel, p.stride[d] = s.stride, p.padding[d] = s.padding, p.dilation[d] = s.dilation;
  }
  p.out_height = (s.height + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
  p.out_width = (s.width + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
  set_strides(p.x_stride, s.channels, s.height, s.width, c.channels_last);
  set_strides(p.y_stride, s.out[1], p.out_height, p.out_width, c.channels_last);
  const int64_t in_count = s.batch * s.channels * s.height * s.width, pixels = s.batch * p.out_height * p.out_width;
  const int64_t taps = s.kernel * s.kernel, fan[2] = {s.channels * taps, s.out[0]};
  Buffer x(in_count, c.type, c.at_end), y(pixels * s.out[1], c.type, c.at_end);
  Buffer weights[2] = {{s.out[0] * fan[0], c.type, c.at_end}, {s.out[1] * fan[1], c.type, c.at_end}};
  Buffer biases[2] = {{s.out[0], c.type, c.at_end}, {s.out[1], c.type, c.at_end}};
  x.fill(in_count, 1);
  if (c.outlier) x.set(in_count / 2, 1e6);
  std::vector<char> packed[2], exchanged[2];
  nin_layer layers[2];
  for (int i = 0; i < 2; ++i) {
    weights[i].fill(s.out[i] * fan[i], 1 / std::sqrt(double(fan[i])));
    biases[i].fill(s.out[i], 1);
    const int64_t k = i == 0 ? s.kernel : 1, channels = fan[i] / (k * k);
    const nin_weight_view w{c.type, s.out[i], channels, k, k, fan[i], k * k, k, 1};
    packed[i].resize(nin_packed_bytes(kernels, &w));
    nin_pack(kernels, &w, weights[i].data, packed[i].data());
    const nin_weight_view t{c.type, channels, s.out[i], 1, 1, 1, fan[i], 1, 1};
    exchanged[i].resize(nin_packed_bytes(kernels, &t));
    if (k == 1) nin_pack(kernels, &t, weights[i].data, exchanged[i].data());
    layers[i] = {packed[i].data(), biases[i].data, s.out[i], 1};
  }
  const nin_thread_pool pool{nullptr, 2};
  if (c.winograd_tile) {
    const void* floats = nin_find_kernels(c.isa, 0);
    const nin_weight_view w{c.type, s.out[0], s.channels, s.kernel, s.kernel, fan[0], taps, s.kernel, 1};
    packed[0].resize(nin_winograd_packed_bytes(floats, &w, c.winograd_tile));
    if (nin_winograd_pack(floats, &w, c.winograd_tile, weights[0].data, packed[0].data(), &pool) != 0) return false;
    layers[0].weight = packed[0].data();
    p.winograd_tile_size = c.winograd_tile;
  }
  if (nin_forward(kernels, &p, layers, x.data, y.data, &pool, nullptr, nullptr, 0) != 0) return false;

  bool good = true;
  for (int64_t i = 0; i < pixels; i += 1 + pixels / 16) {  // some pixels are enough to see a wrong tail
    const int64_t n = i / p.out_width / p.out_height, row = i / p.out_width % p.out_height, column = i % p.out_width;
    std::vector<double> hidden(s.out[0]);
    for (int64_t o = 0; o < s.out[0]; ++o) {
      double sum = biases[0].get(o);
      for (int64_t ch = 0; ch < s.channels; ++ch) {
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t h = row * s.stride - s.padding + t / s.kernel * s.dilation;
          const int64_t w = column * s.stride - s.padding + t % s.kernel * s.dilation;
          if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
          const int64_t at = n * p.x_stride[0] + ch * p.x_stride[1] + h * p.x_stride[2] + w * p.x_stride[3];
          sum += weights[0].get(o * fan[0] + ch * taps + t) * x.get(at);
        }
      }
      hidden[o] = std::max(0.0, sum);
    }
    for (int64_t o = 0; o < s.out[1]; ++o) {
      double sum = biases[1].get(o), size = std::abs(sum);
      for (int64_t h = 0; h < s.out[0]; ++h) {
        const double part = weights[1].get(o * s.out[0] + h) * hidden[h];
        sum += part, size += std::abs(part);
      }
      const int64_t at = n * p.y_stride[0] + o * p.y_stride[1] + row * p.y_stride[2] + column * p.y_stride[3];
      good = good && close(c, "forward", y.get(at), std::max(0.0, sum), size);
    }
  }
  if (c.winograd_tile || (s.kernel > 1 && s.dilation == 1)) return good && check_weight_gradient(c, p, x);
  if (s.kernel > 1 || s.padding > 0) return good;

  Buffer grad(pixels * s.out[1], c.type, c.at_end), x_grad(in_count, c.type, c.at_end);
  Buffer weight_grads[2] = {{s.out[0] * fan[0], c.type, c.at_end}, {s.out[1] * fan[1], c.type, c.at_end}};
  Buffer bias_grads[2] = {{s.out[0], c.type, c.at_end}, {s.out[1], c.type, c.at_end}};
  grad.fill(pixels * s.out[1], 1);
  nin_gradient_strides g;
  std::memcpy(g.grad_stride, p.y_stride, sizeof g.grad_stride);
  std::memcpy(g.x_grad_stride, p.x_stride, sizeof g.x_grad_stride);
  const nin_layer_gradient gradients[2] = {{exchanged[0].data(), weight_grads[0].data, bias_grads[0].data},
                                           {exchanged[1].data(), weight_grads[1].data, bias_grads[1].data}};
  if (nin_backward(kernels, &p, layers, &g, gradients, grad.data, x.data, y.data, x_grad.data, &pool) != 0) {
    return false;
  }
  for (int64_t o = 0; o < s.out[1]; ++o) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t n = i / p.out_width / p.out_height, row = i / p.out_width % p.out_height, column = i % p.out_width;
      const int64_t at = n * p.y_stride[0] + o * p.y_stride[1] + row * p.y_stride[2] + column * p.y_stride[3];
      if (y.get(at) <= 0) continue;
      sum += grad.get(at), size += std::abs(grad.get(at));
    }
    good = good && close(c, "gradient of the bias", bias_grads[1].get(o), sum, size);
  }
  return good && check_chain_gradients(c, p, x, y, grad, weights, biases, x_grad, weight_grads);
}

struct BlockShape {
  int64_t channels, hidden, out, height, width, kernel, stride, padding, dilation;
  bool expands;  // with the first 1×1 layer; else hidden = channels
  int64_t squeezed = 0;  // channels between the layers of squeeze-and-excitation; 0: without
  double epsilon = -1;   // of a LayerNorm behind the depthwise layer, which comes first; negative: without
};

// An inverted bottleneck, with relu6 and hardswish, in squeeze-and-excitation relu and hardsigmoid, and the residual
// where it fits, against plain loops.
bool run_bottleneck(const char* isa, int64_t type, const BlockShape& s, bool channels_last, bool at_end,
                    int64_t threads) {
  const void* kernels = nin_find_kernels(isa, type);
  if (!kernels) return true;
  const int64_t batch = 2;
  const bool normalizes = s.epsilon >= 0;
  nin_chain p{};
  p.type = type, p.norm_epsilon = s.epsilon;
  p.batch = batch, p.channels = s.channels, p.height = s.height, p.width = s.width;
  p.out_height = (s.height + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
  p.out_width = (s.width + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = s.kernel, p.stride[d] = s.stride, p.padding[d] = s.padding, p.dilation[d] = s.dilation;
  }
  set_strides(p.x_stride, s.channels, s.height, s.width, channels_last);
  set_strides(p.y_stride, s.out, p.out_height, p.out_width, channels_last);
  const bool residual = s.out == s.channels && p.out_height == s.height && p.out_width == s.width;
  const int64_t taps = s.kernel * s.kernel;
  const int64_t squeezed = std::max<int64_t>(s.squeezed, 1);
  // up, depthwise, down, and the two of squeeze-and-excitation
  const int64_t fans[5] = {s.channels, taps, s.hidden, s.hidden, squeezed};
  const int64_t widths[5] = {s.hidden, normalizes ? s.channels : s.hidden, s.out, squeezed, s.hidden};
  constexpr int64_t activations[5] = {4, 5, 0, 1, 7};
  const int64_t in_count = batch * s.channels * s.height * s.width;
  const int64_t out_count = batch * s.out * p.out_height * p.out_width;
  Buffer x(in_count, type, at_end), y(out_count, type, at_end);
  x.fill(in_count, 2);
  Buffer weights[5] = {{widths[0] * fans[0], type, at_end},
                       {widths[1] * fans[1], type, at_end},
                       {widths[2] * fans[2], type, at_end},
                       {widths[3] * fans[3], type, at_end},
                       {widths[4] * fans[4], type, at_end}};
  Buffer biases[5] = {{widths[0], type, at_end},
                      {widths[1], type, at_end},
                      {widths[2], type, at_end},
                      {widths[3], type, at_end},
                      {widths[4], type, at_end}};
  std::vector<char> packed[5];
  nin_layer made[5];
  for (int i = 0; i < 5; ++i) {
    weights[i].fill(widths[i] * fans[i], 2 / std::sqrt(double(fans[i])));
    biases[i].fill(widths[i], 1);
    const int64_t k = i == 1 ? s.kernel : 1;
    const nin_weight_view view{type, widths[i], fans[i] / k / k, k, k, fans[i], k * k, k, 1};
    const void* packer = i == 1 ? nin_find_kernels(isa, 0) : kernels;
    packed[i].resize(size_t(nin_packed_bytes(packer, &view)));
    nin_pack(packer, &view, weights[i].data, packed[i].data());
    made[i] = {packed[i].data(), biases[i].data, widths[i], activations[i]};
  }
  std::vector<nin_layer> layers;
  if (s.expands) layers.push_back(made[0]);
  layers.push_back(made[1]);
  if (normalizes) layers.push_back(made[0]);
  if (s.squeezed) layers.insert(layers.end(), {made[3], made[4]});
  layers.push_back(made[2]);
  p.layers = int64_t(layers.size());
  const nin_thread_pool pool{nullptr, threads};
  if (nin_inverted_bottleneck(kernels, &p, layers.data(), residual, x.data, y.data, &pool, nullptr, nullptr, 0) != 0) {
    return false;
  }
  const Case c{isa, type, {batch, s.channels, s.height, s.width, s.kernel, s.stride, s.padding, s.dilation, {0, 0}},
               channels_last, at_end, 0};
  const auto relu6 = [](double z) { return std::min(6.0, std::max(0.0, z)); };
  const auto input = [&](int64_t n, int64_t channel, int64_t h, int64_t w) {
    return x.get(n * p.x_stride[0] + channel * p.x_stride[1] + h * p.x_stride[2] + w * p.x_stride[3]);
  };
  const auto product_at = [&](int64_t n, int64_t row, int64_t column) {
    std::vector<double> product(size_t(widths[1]), 0);
    for (int64_t o = 0; o < widths[1]; ++o) {
      double sum = biases[1].get(o);
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t h = row * s.stride - s.padding + t / s.kernel * s.dilation;
        const int64_t w = column * s.stride - s.padding + t % s.kernel * s.dilation;
        if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
        double up = s.expands ? biases[0].get(o) : input(n, o, h, w);
        for (int64_t ch = 0; s.expands && ch < s.channels; ++ch) {
          up += weights[0].get(o * s.channels + ch) * input(n, ch, h, w);
        }
        sum += weights[1].get(o * taps + t) * (s.expands ? relu6(up) : up);
      }
      product[size_t(o)] = sum * relu6(sum + 3) / 6;
    }
    if (!normalizes) return product;
    double mean = 0, variance = 0;
    for (const double value : product) mean += value / double(s.channels);
    for (const double value : product) variance += (value - mean) * (value - mean) / double(s.channels);
    std::vector<double> wide(size_t(s.hidden), 0);
    for (int64_t h = 0; h < s.hidden; ++h) {
      double sum = biases[0].get(h);
      for (int64_t o = 0; o < s.channels; ++o) {
        sum += weights[0].get(h * s.channels + o) * (product[size_t(o)] - mean) / std::sqrt(variance + s.epsilon);
      }
      wide[size_t(h)] = relu6(sum);
    }
    return wide;
  };
  std::vector<std::vector<double>> factors(size_t(batch), std::vector<double>(size_t(s.hidden), 1));
  for (int64_t n = 0; s.squeezed && n < batch; ++n) {
    std::vector<double> mean(size_t(s.hidden), 0);
    for (int64_t i = 0; i < p.out_height * p.out_width; ++i) {
      const std::vector<double> product = product_at(n, i / p.out_width, i % p.out_width);
      for (size_t h = 0; h < mean.size(); ++h) mean[h] += product[h] / double(p.out_height * p.out_width);
    }
    for (int64_t h = 0; h < s.hidden; ++h) {
      double sum = biases[4].get(h);
      for (int64_t q = 0; q < s.squeezed; ++q) {
        double squeeze = biases[3].get(q);
        for (int64_t g = 0; g < s.hidden; ++g) squeeze += weights[3].get(q * s.hidden + g) * mean[size_t(g)];
        sum += weights[4].get(h * s.squeezed + q) * std::max(0.0, squeeze);
      }
      factors[size_t(n)][size_t(h)] = relu6(sum + 3) / 6;
    }
  }
  bool good = true;
  for (int64_t i = 0; i < batch * p.out_height * p.out_width; i += 1 + batch * p.out_height * p.out_width / 16) {
    const int64_t n = i / p.out_width / p.out_height, row = i / p.out_width % p.out_height, column = i % p.out_width;
    std::vector<double> product = product_at(n, row, column);
    for (size_t h = 0; h < product.size(); ++h) product[h] *= factors[size_t(n)][h];
    for (int64_t o = 0; o < s.out; ++o) {
      Sum sum;
      sum.add(biases[2].get(o));
      for (int64_t h = 0; h < s.hidden; ++h) sum.add(weights[2].get(o * s.hidden + h) * product[size_t(h)]);
      if (residual) sum.add(input(n, o, row, column));
      const int64_t at = n * p.y_stride[0] + o * p.y_stride[1] + row * p.y_stride[2] + column * p.y_stride[3];
      good = good && close(c, "inverted bottleneck", y.get(at), sum.value, sum.size);
    }
  }
  return good;
}

// A step on buffers between guard pages, by one and by three threads to the same bits, against plain loops: value i of
// the result must be want(i).
template <typename Want>
bool run_step(const char* isa, int64_t type, nin_step step, const Buffer& x, const Buffer* other, int64_t count,
              bool at_end, const Want& want) {
  const void* const kernels[] = {nin_find_kernels(isa, 0), nin_find_kernels(isa, 1)};
  Buffer alone(count, type, at_end), shared(count, type, at_end);
  step.type = type;
  step.x[0] = 0, step.other[0] = other ? 1 : -1, step.y[0] = 2;
  for (const int64_t threads : {1, 3}) {
    char* const memory[] = {x.data, other ? other->data : nullptr, threads == 1 ? alone.data : shared.data};
    const nin_thread_pool pool{nullptr, threads};
    if (nin_run_steps(kernels, &step, 1, memory, &pool) != 0) return false;
  }
  if (std::memcmp(alone.data, shared.data, size_t(count * alone.size())) != 0) return false;
  bool good = true;
  const Case c{isa, type, {1, count, 1, 1, 1, 1, 0, 1, {0, 0}}, true, at_end, 0};
  for (int64_t i = 0; i < count; i += 1 + count / 64) {
    const Sum sum = want(i);
    good = good && close(c, "step", alone.get(i), sum.value, sum.size);
  }
  return good;
}

// Every kind of step but the convolutions, whose kernels run above.
bool run_steps(const char* isa, int64_t type, bool at_end) {
  if (!nin_find_kernels(isa, type)) return true;
  bool good = true;
  for (const int64_t count : {1, 15, 33, 64, 70001}) {
    Buffer x(count, type, at_end), other(count, type, at_end);
    x.fill(count, 4), other.fill(count, 4);
    nin_step step{};
    step.kind = nin_step_add, step.count = count, step.option = 4;  // relu6
    good = good && run_step(isa, type, step, x, &other, count, at_end, [&](int64_t i) {
      return Sum{std::min(6.0, std::max(0.0, x.get(i) + other.get(i))), 8};
    });
    step.option = 5;  // hardswish
    good = good && run_step(isa, type, step, x, nullptr, count, at_end, [&](int64_t i) {
      return Sum{x.get(i) * std::min(6.0, std::max(0.0, x.get(i) + 3)) / 6, 4};
    });
  }
  struct Pool {
    int64_t channels, height, width, kernel[2], stride, padding;
  };
  for (const Pool& s : {Pool{1, 1, 1, {1, 1}, 1, 0}, Pool{5, 7, 6, {3, 3}, 2, 1}, Pool{33, 9, 4, {2, 3}, 1, 1},
                        Pool{70, 40, 31, {3, 3}, 1, 1}, Pool{130, 7, 5, {7, 5}, 1, 0}}) {
    const int64_t batch = 2;
    nin_chain p{};
    p.batch = batch, p.channels = s.channels, p.height = s.height, p.width = s.width;
    for (int d = 0; d < 2; ++d) p.kernel[d] = s.kernel[d], p.stride[d] = s.stride, p.padding[d] = s.padding, p.dilation[d] = 1;
    p.out_height = (s.height + 2 * s.padding - s.kernel[0]) / s.stride + 1;
    p.out_width = (s.width + 2 * s.padding - s.kernel[1]) / s.stride + 1;
    set_strides(p.x_stride, s.channels, s.height, s.width, true);
    set_strides(p.y_stride, s.channels, p.out_height, p.out_width, true);
    const int64_t in_count = batch * s.channels * s.height * s.width;
    Buffer x(in_count, type, at_end);
    x.fill(in_count, 3);
    for (const int64_t kind : {nin_step_max_pool, nin_step_average_pool}) {
      nin_step step{};
      step.kind = kind, step.chain = &p, step.option = 1;
      const int64_t count = batch * s.channels * p.out_height * p.out_width;
      good = good && run_step(isa, type, step, x, nullptr, count, at_end, [&](int64_t i) {
        const int64_t channel = i % s.channels, column = i / s.channels % p.out_width;
        const int64_t line = i / s.channels / p.out_width % p.out_height, n = i / s.channels / p.out_width / p.out_height;
        double largest = -1e30, sum = 0, values = 0;
        for (int64_t h = line * s.stride - s.padding; h < line * s.stride - s.padding + s.kernel[0]; ++h) {
          for (int64_t w = column * s.stride - s.padding; w < column * s.stride - s.padding + s.kernel[1]; ++w) {
            if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
            const double value = x.get(((n * s.height + h) * s.width + w) * s.channels + channel);
            largest = std::max(largest, value), sum += value, ++values;
          }
        }
        return Sum{kind == nin_step_max_pool ? largest : sum / values, 3};
      });
    }
  }
  struct Linear {
    int64_t batch, channels, outputs;
  };
  for (const Linear& s : {Linear{1, 1, 1}, Linear{1, 130, 7}, Linear{5, 17, 6}, Linear{9, 33, 41}, Linear{3, 1500, 70}}) {
    Buffer x(s.batch * s.channels, type, at_end), weight(s.outputs * s.channels, type, at_end), bias(s.outputs, type, at_end);
    x.fill(s.batch * s.channels, 1), weight.fill(s.outputs * s.channels, 1), bias.fill(s.outputs, 1);
    nin_chain p{};
    p.batch = s.batch, p.channels = s.channels;
    p.x_stride[0] = s.channels, p.y_stride[0] = s.outputs;
    const nin_layer layer{weight.data, bias.data, s.outputs, 0};
    nin_step step{};
    step.kind = nin_step_linear, step.chain = &p, step.layers = &layer;
    good = good && run_step(isa, type, step, x, nullptr, s.batch * s.outputs, at_end, [&](int64_t i) {
      Sum sum;
      sum.add(bias.get(i % s.outputs));
      for (int64_t k = 0; k < s.channels; ++k) {
        sum.add(weight.get(i % s.outputs * s.channels + k) * x.get(i / s.outputs * s.channels + k));
      }
      return sum;
    });
  }
  return good;
}

// The steps of every pixel by itself: norms, factors, sums.
bool run_pixelwise_steps(const char* isa, int64_t type, bool at_end) {
  if (!nin_find_kernels(isa, type)) return true;
  bool good = true;
  struct Images {
    int64_t channels, pixels;
    bool channels_last;
  };
  const int64_t batch = 2;
  for (const Images& s : {Images{1, 1, true}, Images{5, 7, true}, Images{33, 40, true}, Images{64, 9, true},
                          Images{130, 700, true}, Images{5, 7, false}, Images{70, 33, false}}) {
    const int64_t count = batch * s.channels * s.pixels;
    nin_chain p{};
    p.type = type, p.batch = batch, p.channels = s.channels, p.height = p.out_height = s.pixels;
    p.width = p.out_width = p.layers = 1, p.norm_epsilon = 0.5;
    set_strides(p.x_stride, s.channels, s.pixels, 1, s.channels_last);
    set_strides(p.y_stride, s.channels, s.pixels, 1, true);
    Buffer x(count, type, at_end), other(count, type, at_end), factors(batch * s.channels, type, at_end);
    const int64_t whole = (s.channels + 15) / 16 * 16;
    Buffer scale(whole, 0, at_end), shift(whole, 0, at_end);
    x.fill(count, 3), other.fill(count, 2), factors.fill(batch * s.channels, 2);
    scale.fill(whole, 2), shift.fill(whole, 2);
    const nin_layer layer{scale.data, shift.data, s.channels, 1};  // relu
    const auto value = [&](int64_t i, int64_t channel) {
      const int64_t image = i / s.channels / s.pixels, pixel = i / s.channels % s.pixels;
      return x.get(image * p.x_stride[0] + channel * p.x_stride[1] + pixel * p.x_stride[2]);
    };
    const auto check = [&](int64_t kind, int64_t option, int64_t stride, const Buffer* operand, const auto& compute) {
      nin_step step{};
      step.kind = kind, step.chain = &p, step.layers = &layer, step.option = option, step.count = stride;
      good = good && run_step(isa, type, step, x, operand, count, at_end,
                              [&](int64_t i) { return Sum{std::max(0.0, compute(i, i % s.channels)), 14}; });
    };
    check(nin_step_scale_shift, 0, 0, nullptr,
          [&](int64_t i, int64_t c) { return value(i, c) * scale.get(c) + shift.get(c); });
    check(nin_step_scale_shift, nin_other_scale, s.channels, &factors, [&](int64_t i, int64_t c) {
      return value(i, c) * factors.get(i / s.channels / s.pixels * s.channels + c) * scale.get(c) + shift.get(c);
    });
    check(nin_step_scale_shift, nin_other_pixel_scale, s.channels, &other,
          [&](int64_t i, int64_t c) { return value(i, c) * other.get(i) * scale.get(c) + shift.get(c); });
    check(nin_step_scale_shift, nin_other_pixel_shift, s.channels, &other,
          [&](int64_t i, int64_t c) { return value(i, c) * scale.get(c) + shift.get(c) + other.get(i); });
    check(nin_step_layer_norm, 0, 0, nullptr, [&](int64_t i, int64_t c) {
      double mean = 0, variance = 0;
      for (int64_t k = 0; k < s.channels; ++k) mean += value(i, k) / double(s.channels);
      for (int64_t k = 0; k < s.channels; ++k) variance += std::pow(value(i, k) - mean, 2) / double(s.channels);
      return (value(i, c) - mean) / std::sqrt(variance + 0.5) * scale.get(c) + shift.get(c);
    });
  }
  return good;
}

// Convolutions of groups of channels, and of single channels.
bool run_grouped_steps(const char* isa, int64_t type, bool at_end) {
  const void* kernels = nin_find_kernels(isa, type);
  if (!kernels) return true;
  bool good = true;
  struct Grouped {
    int64_t groups, channels, out, height, width, kernel, stride, padding, dilation;  // channels of a group
    bool channels_last;
  };
  const int64_t batch = 2;
  for (const Grouped& s : {Grouped{3, 4, 5, 7, 6, 3, 1, 1, 1, true}, Grouped{2, 17, 33, 5, 9, 2, 2, 0, 1, true},
                           Grouped{4, 3, 2, 6, 7, 3, 1, 2, 2, false}, Grouped{33, 1, 1, 9, 8, 3, 1, 1, 1, true},
                           Grouped{64, 1, 1, 60, 61, 5, 2, 2, 1, true}, Grouped{5, 1, 1, 1, 2, 3, 1, 2, 2, true},
                           Grouped{35, 1, 1, 9, 13, 7, 1, 3, 1, false}}) {
    const bool depthwise = s.channels == 1;
    const int64_t channels = s.groups * s.channels, out = s.groups * s.out, taps = s.kernel * s.kernel;
    nin_chain p{};
    p.type = type, p.batch = batch, p.channels = depthwise ? channels : s.channels, p.height = s.height;
    p.width = s.width, p.layers = 1;
    for (int d = 0; d < 2; ++d) {
      p.kernel[d] = s.kernel, p.stride[d] = s.stride, p.padding[d] = s.padding, p.dilation[d] = s.dilation;
    }
    p.out_height = (s.height + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
    p.out_width = (s.width + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1;
    set_strides(p.x_stride, channels, s.height, s.width, s.channels_last);
    set_strides(p.y_stride, out, p.out_height, p.out_width, s.channels_last);
    const int64_t in_count = batch * channels * s.height * s.width, fan = s.channels * taps;
    Buffer x(in_count, type, at_end), weight(out * fan, type, at_end), bias(out, type, at_end);
    x.fill(in_count, 1), weight.fill(out * fan, 1), bias.fill(out, 1);
    std::vector<std::vector<char>> packed;
    std::vector<nin_layer> layers;
    for (int64_t g = 0; g < (depthwise ? 1 : s.groups); ++g) {
      const int64_t columns = depthwise ? out : s.out;
      const nin_weight_view view{type, columns, s.channels, s.kernel, s.kernel, fan, taps, s.kernel, 1};
      const void* packer = depthwise ? nin_find_kernels(isa, 0) : kernels;
      packed.emplace_back(size_t(nin_packed_bytes(packer, &view)));
      nin_pack(packer, &view, weight.data + g * columns * fan * weight.size(), packed.back().data());
      layers.push_back({packed.back().data(), bias.data + g * columns * bias.size(), columns, 1});
    }
    nin_step step{};
    step.kind = depthwise ? nin_step_depthwise : nin_step_chain;
    step.chain = &p, step.layers = layers.data(), step.option = depthwise ? 0 : s.groups;
    const int64_t pixels = p.out_height * p.out_width;
    good = good && run_step(isa, type, step, x, nullptr, batch * out * pixels, at_end, [&](int64_t i) {
      const int64_t n = i / out / pixels, inside = i % (out * pixels);
      const int64_t o = s.channels_last ? inside % out : inside / pixels;
      const int64_t pixel = s.channels_last ? inside / out : inside % pixels;
      Sum sum;
      sum.add(bias.get(o));
      for (int64_t ch = 0; ch < s.channels; ++ch) {
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t h = pixel / p.out_width * s.stride - s.padding + t / s.kernel * s.dilation;
          const int64_t w = pixel % p.out_width * s.stride - s.padding + t % s.kernel * s.dilation;
          if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
          const int64_t channel = o / s.out * s.channels + ch;
          sum.add(weight.get(o * fan + ch * taps + t) *
                  x.get(n * p.x_stride[0] + channel * p.x_stride[1] + h * p.x_stride[2] + w * p.x_stride[3]));
        }
      }
      sum.value = std::max(0.0, sum.value);
      return sum;
    });
  }
  return good;
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {2, 1, 1, 1, 1, 1, 0, 1, {1, 1}},       {1, 3, 5, 7, 1, 1, 0, 1, {5, 2}},
      {2, 17, 3, 9, 1, 1, 0, 1, {33, 18}},    {1, 18, 6, 5, 1, 2, 0, 1, {7, 15}},
      {1, 64, 4, 4, 1, 1, 0, 1, {64, 32}},    {3, 31, 1, 13, 1, 1, 0, 1, {32, 1}},
      {1, 3, 9, 8, 5, 1, 2, 1, {20, 9}},      {2, 5, 7, 11, 3, 2, 1, 2, {17, 33}},
      {1, 34, 6, 6, 3, 1, 1, 1, {48, 10}},    {1, 1, 4, 4, 2, 1, 3, 1, {3, 3}},
      {2, 192, 5, 5, 1, 1, 0, 1, {160, 96}},  {1, 3, 23, 23, 11, 4, 0, 1, {24, 24}},
      {1, 30, 3, 5, 1, 1, 0, 1, {24, 20}},    {1, 5, 5, 5, 3, 1, 1, 1, {23, 17}},
      {1, 530, 3, 3, 1, 1, 0, 1, {540, 510}}, {1, 3, 600, 240, 1, 1, 0, 1, {16, 64}},  // written with non-temporal stores
  };
  int runs = 0;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"}) {
    for (int64_t type : {0, 1}) {
      for (const Shape& shape : shapes) {
        for (int variant = 0; variant < 4; ++variant, ++runs) {
          if (!run({isa, type, shape, (variant & 1) != 0, (variant & 2) != 0, 0})) return 1;
        }
      }
    }
  }
  const Shape winograd_shapes[] = {
      {2, 5, 7, 11, 3, 1, 1, 1, {17, 33}}, {1, 34, 9, 6, 5, 1, 2, 1, {48, 10}}, {1, 1, 4, 4, 4, 1, 3, 1, {3, 3}},
      {5, 19, 5, 4, 3, 1, 0, 1, {40, 7}},  {1, 16, 30, 9, 7, 1, 3, 1, {33, 5}}, {1, 96, 16, 16, 5, 1, 2, 1, {192, 64}},
  };
  for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"}) {
    for (const Shape& shape : winograd_shapes) {
      for (int64_t winograd_tile : {6, 8}) {
        if (winograd_tile - shape.kernel + 1 < 2) continue;
        for (int variant = 0; variant < 8; ++variant, runs += 2) {
          const Case c{isa, variant / 4, shape, (variant & 1) != 0, (variant & 2) != 0, winograd_tile};
          if (!run(c)) return 1;
          Case outlier = c;
          outlier.outlier = true;
          if (!run(outlier)) return 1;
        }
      }
    }
  }
  const BlockShape blocks[] = {
      {5, 35, 5, 9, 8, 3, 1, 1, 1, true},   {3, 16, 7, 9, 7, 3, 2, 1, 1, true},    {17, 33, 18, 7, 7, 5, 1, 2, 1, true},
      {4, 64, 4, 14, 5, 7, 1, 3, 1, true},  {6, 18, 1, 9, 11, 3, 1, 2, 2, true},   {2, 3, 33, 1, 1, 1, 1, 0, 1, true},
      {2, 5, 3, 1, 2, 3, 3, 4, 1, true},    {8, 160, 12, 60, 61, 3, 1, 1, 1, true}, {19, 19, 19, 6, 10, 3, 1, 1, 1, false},
      {31, 31, 9, 8, 60, 5, 2, 2, 1, false}, {24, 1030, 24, 29, 20, 3, 1, 1, 1, true}, {7, 56, 24, 15, 15, 5, 1, 2, 1, true},
      {5, 35, 5, 9, 8, 3, 1, 1, 1, false, 0, 0.1}, {40, 70, 40, 9, 9, 7, 1, 3, 1, false, 0, 0.1},
      {33, 18, 7, 30, 31, 5, 2, 2, 1, false, 0, 0.1}, {17, 48, 3, 1, 2, 3, 1, 2, 2, false, 0, 0.1},
      {5, 35, 5, 9, 8, 3, 1, 1, 1, true, 9}, {6, 50, 40, 5, 4, 3, 1, 1, 1, true, 33}, {19, 19, 7, 9, 30, 5, 2, 2, 1, false, 1},
  };
  for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"}) {
    for (const BlockShape& block : blocks) {
      for (int variant = 0; variant < 8; ++variant, ++runs) {
        for (const int64_t threads : {2, 3}) {
          if (!run_bottleneck(isa, variant / 4, block, (variant & 1) != 0, (variant & 2) != 0, threads)) return 1;
        }
      }
    }
  }
  for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"}) {
    for (const int64_t type : {0, 1}) {
      for (const bool at_end : {false, true}) {
        if (!run_steps(isa, type, at_end)) return 1;
        if (!run_pixelwise_steps(isa, type, at_end)) return 1;
        if (!run_grouped_steps(isa, type, at_end)) return 1;
        runs += 3;
      }
    }
  }
  std::printf("%d runs\n", runs);
  return 0;
}
