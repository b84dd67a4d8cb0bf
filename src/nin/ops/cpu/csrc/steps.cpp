// The steps of a network, run one after the other: convolutions, norms, sums, activations, poolings and fully connected
// layers.

#include "depthwise_layer.hpp"
#include "parallel.hpp"
#include "tiling.hpp"

namespace nin {
namespace {

// Values, or pixels times channels, that a task takes: below, a second thread costs more than it saves.
constexpr int64_t task_values = 32 << 10;

class Step {
 public:
  Step(const void* const* kernels, const nin_step& step, char* const* memory, const nin_thread_pool& pool)
      : k_(*static_cast<const Kernels*>(kernels[step.type])),
        step_(step),
        type_(DataType(step.type)),
        size_(element_size(type_)),
        x_(memory[step.x[0]] + step.x[1]),
        other_(step.other[0] < 0 ? nullptr : memory[step.other[0]] + step.other[1]),
        y_(memory[step.y[0]] + step.y[1]),
        pool_(pool) {}
  int32_t run() const;

 private:
  int32_t convolve() const;
  nin_status add() const;
  nin_status linear() const;
  nin_status scale_and_shift(bool normalizes) const;
  nin_status pool_pixels(bool largest) const;
  void pool_line(int64_t image, int64_t line, bool largest, const char** pixels) const;

  const Kernels& k_;
  const nin_step& step_;
  const DataType type_;
  const int64_t size_;  // of an element
  char* const x_;
  char* const other_;
  char* const y_;
  const nin_thread_pool& pool_;
};

int32_t Step::run() const {
  switch (step_.kind) {
    case nin_step_chain: return convolve();
    case nin_step_bottleneck:
      return nin_inverted_bottleneck(&k_, step_.chain, step_.layers, step_.option, x_, y_, &pool_, nullptr, nullptr, 0);
    case nin_step_add: return add();
    case nin_step_linear: return linear();
    case nin_step_depthwise: return depthwise_layer(k_, *step_.chain, *step_.layers, x_, y_, pool_);
    case nin_step_scale_shift: return scale_and_shift(false);
    case nin_step_layer_norm: return scale_and_shift(true);
    default: return pool_pixels(step_.kind == nin_step_max_pool);
  }
}

int32_t Step::convolve() const {
  const nin_chain& c = *step_.chain;
  const int64_t groups = std::max<int64_t>(1, step_.option);
  for (int64_t g = 0; g < groups; ++g) {
    const nin_layer* layer = step_.layers + g;
    const int32_t status =
        nin_forward(&k_, &c, layer, x_ + g * c.channels * c.x_stride[1] * size_,
                    y_ + g * layer->channels * c.y_stride[1] * size_, &pool_, nullptr, nullptr, 0);
    if (status != nin_ok) return status;
  }
  return nin_ok;
}

nin_status Step::add() const {
  const int64_t count = step_.count, tasks = ceil_div(count, task_values);
  return run_tasks(pool_, tasks, 0, [&](int64_t task, char*) {
    const int64_t from = task * task_values, at = from * size_;
    k_.add_and_activate(y_ + at, x_ + at, other_ ? other_ + at : nullptr, std::min(task_values, count - from),
                        Activation(step_.option), type_);
  });
}

nin_status Step::linear() const {
  const nin_chain& c = *step_.chain;
  const nin_layer& layer = *step_.layers;
  LinearArguments args;
  args.type = type_;
  args.x = x_, args.x_row_stride = c.x_stride[0] * size_, args.rows = c.batch, args.channels = c.channels;
  args.weight = static_cast<const char*>(layer.weight), args.weight_row_stride = c.channels * size_;
  args.bias = static_cast<const char*>(layer.bias);
  args.y = y_, args.y_row_stride = c.y_stride[0] * size_;
  const int64_t outputs = std::clamp<int64_t>(task_values / (c.channels * c.batch), 1, layer.channels);
  return run_tasks(pool_, ceil_div(layer.channels, outputs), 0, [&](int64_t task, char*) {
    k_.linear(args, task * outputs, std::min((task + 1) * outputs, layer.channels));
  });
}

// Pixels whose channels lie apart, as in NCHW, come to rows of scratch memory first.
nin_status Step::scale_and_shift(bool normalizes) const {
  const nin_chain& c = *step_.chain;
  const nin_layer& layer = *step_.layers;
  const ImageView x = image_view(x_, c.x_stride, size_), y = image_view(y_, c.y_stride, size_);
  const bool in_place = x.c_stride == size_, widened = type_ != k_.tile_type;
  const int64_t row_bytes = tile_row_bytes(k_, c.channels);
  const int64_t pixels = std::clamp<int64_t>(task_values / c.channels, 1, c.height), parts = ceil_div(c.height, pixels);
  const size_t scratch_bytes = in_place ? 0 : size_t(pixels * row_bytes * (widened ? 2 : 1));
  return run_tasks(pool_, c.batch * parts, scratch_bytes, [&](int64_t task, char* scratch) {
    const int64_t image = task / parts, first = task % parts * pixels;
    RowArguments args;
    args.type = type_, args.rows = std::min(pixels, c.height - first), args.channels = c.channels;
    args.x = x.pixel(image, first, 0), args.x_row_stride = x.h_stride;
    if (!in_place) {
      k_.load({x.pixel(image, first, 0), x.c_stride, x.h_stride, type_, c.channels, args.rows}, scratch, row_bytes);
      args.x = scratch, args.x_row_stride = row_bytes;
      if (widened) {  // to floats, as the set's tiles are: back again
        char* const rows = scratch + pixels * row_bytes;
        std::memset(rows, 0, size_t(args.rows * row_bytes));
        k_.add_rows(rows, row_bytes, type_, scratch, row_bytes, k_.tile_type, args.rows, c.channels);
        args.x = rows;
      }
    }
    args.scale = static_cast<const float*>(layer.weight), args.shift = static_cast<const float*>(layer.bias);
    const int64_t other_stride = step_.count * size_;
    if (other_ && step_.option == nin_other_scale) {
      args.factors = other_ + image * other_stride;
    } else if (other_) {
      const bool scales = step_.option == nin_other_pixel_scale;
      (scales ? args.factors : args.addends) = other_ + (image * c.height + first) * other_stride;
      (scales ? args.factors_row_stride : args.addends_row_stride) = other_stride;
    }
    args.activation = Activation(layer.activation);
    args.normalizes = normalizes, args.epsilon = float(c.norm_epsilon);
    args.y = y.pixel(image, first, 0), args.y_row_stride = y.h_stride;
    k_.scale_and_shift(args);
  });
}

nin_status Step::pool_pixels(bool largest) const {
  const nin_chain& c = *step_.chain;
  const int64_t window = std::min(c.kernel[0], c.height) * std::min(c.kernel[1], c.width);
  const int64_t line_values = c.out_width * c.channels * window;
  const int64_t lines = std::clamp<int64_t>(task_values / line_values, 1, c.out_height);
  const int64_t parts = ceil_div(c.out_height, lines);
  return run_tasks(pool_, c.batch * parts, size_t(window) * sizeof(char*), [&](int64_t task, char* scratch) {
    const int64_t image = task / parts, first = task % parts * lines;
    for (int64_t line = first; line < std::min(first + lines, c.out_height); ++line) {
      pool_line(image, line, largest, reinterpret_cast<const char**>(scratch));
    }
  });
}

// The part of a window inside the image, along one side, and its length with the padding, as PyTorch counts it.
struct PoolRange {
  int64_t first, last, step, padded;

  PoolRange(const nin_chain& c, int side, int64_t size, int64_t out) : step(c.dilation[side]) {
    const int64_t start = out * c.stride[side] - c.padding[side];
    padded = std::min(start + c.kernel[side], size + c.padding[side]) - start;
    first = start < 0 ? start + ceil_div(-start, step) * step : start;
    last = std::min(start + (c.kernel[side] - 1) * step + 1, size);
  }
  int64_t count() const { return first < last ? ceil_div(last - first, step) : 0; }
};

void Step::pool_line(int64_t image, int64_t line, bool largest, const char** pixels) const {
  const nin_chain& c = *step_.chain;
  const ImageView x = image_view(x_, c.x_stride, size_), y = image_view(y_, c.y_stride, size_);
  const PoolRange rows(c, 0, c.height, line);
  for (int64_t column = 0; column < c.out_width; ++column) {
    const PoolRange columns(c, 1, c.width, column);
    int64_t count = 0;
    for (int64_t i = rows.first; i < rows.last; i += rows.step) {
      for (int64_t j = columns.first; j < columns.last; j += columns.step) pixels[count++] = x.pixel(image, i, j);
    }
    const int64_t divisor = step_.count ? step_.count : step_.option ? count : rows.padded * columns.padded;
    k_.pool(y.pixel(image, line, column), pixels, count, c.channels, largest, float(divisor),
            type_);
  }
}

}  // namespace
}  // namespace nin

int32_t nin_run_steps(const void* const* kernels, const nin_step* steps, int64_t count, char* const* memory,
                      const nin_thread_pool* pool) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t status = nin::Step(kernels, steps[i], memory, *pool).run();
    if (status != nin_ok) return status;
  }
  return nin_ok;
}
