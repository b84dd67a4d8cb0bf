#include "winograd.hpp"

namespace nin {
namespace {

constexpr int64_t smallest_kernel = 3, largest_kernel = 7, sizes[] = {6, 8};

// Bytes of the frequencies of a task's squares and of their products with one panel of weights: what a second cache
// holds beside the weights that come in, and more where it cannot hold the weights, so that they are read less often.
constexpr int64_t task_bytes = 640 << 10, wide_task_bytes = 1280 << 10;
// Bytes of what the layers behind it make of a task's pixels, at most.
constexpr int64_t behind_bytes = 2 << 20;

// Products of fewer channels than this take less time than the transforms around them.
constexpr int64_t least_channels = 16;

// For the choice. Transforms: additions, loads and stores for a channel of a frequency, in multiply-adds. Reading the
// weights: while those of one channel come from the second, the third cache or memory, so many pixels are multiplied
// with them; a product of fewer waits. Winograd must be faster by a margin, because it is less exact.
constexpr double transform_cost = 10, margin = 1.2;
constexpr int64_t second_cache = 1 << 20, third_cache = 24 << 20;
double pixels_per_weight(int64_t bytes) { return bytes <= second_cache ? 3 : bytes <= third_cache ? 8 : 16; }

// Taps of one side that reach into the image, over all results.
int64_t taps_inside(const nin_problem& p, int side, int64_t size, int64_t out_size) {
  int64_t count = 0;
  for (int64_t i = 0; i < out_size; ++i) {
    const int64_t start = i - p.padding[side];
    count += std::max<int64_t>(0, std::min(start + p.kernel[side], size) - std::max<int64_t>(start, 0));
  }
  return count;
}

}  // namespace

void take_apart(const Kernels& k, const nin_problem& p, int64_t size, const Images& x, const Squares& s,
                const Grid& copy, const Frequencies& to) {
  const int64_t block = size - p.kernel[0] + 1;
  copy_bordered(k, p, x,
                {s.image, s.line - p.padding[0], s.column - p.padding[1], s.down * block + p.kernel[0] - 1,
                 s.across * block + p.kernel[1] - 1},
                copy);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t line = i / s.across * block, column = i % s.across * block;
    const Grid square{copy.at + line * copy.line + column * copy.row, copy.row, copy.line};
    k.to_frequencies(int(size), square, p.channels, reinterpret_cast<float*>(to.at + i * to.square), to.frequency);
  }
}

void Winograd::weights_matrix(int64_t size, int64_t kernel, double* matrix) {
  const int pairs = int(size - 2) / 2;
  const auto row = [&](int64_t i, double point, double denominator) {
    double power = 1 / denominator;
    for (int64_t j = 0; j < kernel; ++j, power *= point) matrix[i * kernel + j] = power;
  };
  double denominator = 1;
  for (int i = 0; i < pairs; ++i) {
    const double p = winograd_point(size, i);
    denominator *= -p * p;
    double others = 2 * p * p;
    for (int j = 0; j < pairs; ++j) {
      const double q = winograd_point(size, j);
      if (j != i) others *= p * p - q * q;
    }
    row(1 + 2 * i, p, others);
    row(2 + 2 * i, -p, others);
  }
  row(0, 0, denominator);
  for (int64_t j = 0; j < kernel; ++j) matrix[(size - 1) * kernel + j] = j == kernel - 1;
}

std::vector<float> Winograd::weights_matrix(int64_t size, int64_t kernel) {
  std::vector<double> exact(size_t(size * kernel));
  weights_matrix(size, kernel, exact.data());
  return {exact.begin(), exact.end()};
}

// Nothing here knows of the threads: the bits of a result must not depend on their number.
int64_t Winograd::choose_size(const Kernels& k, const nin_problem& p, int64_t columns) {
  for (const int side : {0, 1}) {
    if (p.stride[side] != 1 || p.dilation[side] != 1) return 0;
  }
  const int64_t kernel = p.kernel[0];
  if (kernel != p.kernel[1] || kernel < smallest_kernel || kernel > largest_kernel) return 0;
  if (std::min(p.channels, columns) < least_channels) return 0;
  // tap by tap, pairs of bfloat16 take half of the time and less memory, tile registers a sixteenth
  const double speed = k.tiles ? 16 : k.type == Type::bf16 ? 2.25 : 1;
  double least = double(p.batch * taps_inside(p, 0, p.height, p.out_height) *
                        taps_inside(p, 1, p.width, p.out_width) * p.channels * round_up(columns, k.lanes)) /
                 speed / margin;
  int64_t best = 0;
  for (const int64_t size : sizes) {
    if (size - kernel + 1 < 2) continue;
    const double cost = Winograd(k, p, size, columns, 0, 1).cost();
    if (cost < least) least = cost, best = size;
  }
  return best;
}

Winograd::Winograd(const Kernels& k, const nin_problem& p, int64_t size, int64_t columns, int64_t pixel_bytes,
                   int64_t threads)
    : k_(k), floats_(*k.floats), p_(p), size_(size), block_(size - p.kernel[0] + 1), columns_(columns),
      down_(divide_up(p.out_height, block_)), across_(divide_up(p.out_width, block_)), cut_() {
  const Panels panels(floats_, columns, 1);
  copy_row_ = tile_row(k, p.channels);
  row_ = tile_row(floats_, p.channels);
  const int64_t width_bytes = std::min(panels.width, round_up(columns, floats_.lanes)) * 4;
  products_row_ = odd_lines(size * size * width_bytes);
  const int64_t bytes = weight_bytes() > second_cache ? wide_task_bytes : task_bytes;
  const int64_t behind = std::max<int64_t>(1, block_ * block_ * pixel_bytes);
  const int64_t most =
      std::max<int64_t>(1, std::min(bytes / (size * size * row_ + products_row_), behind_bytes / behind));
  const int64_t of_image = down_ * across_;
  const bool stacked = p.y_stride[0] == p.out_height * p.y_stride[2];
  whole_images_ = stacked && p.batch > 1 && 2 * of_image <= most;
  if (whole_images_) {
    cut_ = cut(1, p.batch, 1, most / of_image, threads);
    most_squares_ = cut_.lines * of_image;
  } else {
    cut_ = cut(p.batch, down_, across_, most, threads);
    most_squares_ = cut_.lines * cut_.columns;
  }
  const int64_t lines = whole_images_ ? down_ : cut_.lines, across = whole_images_ ? across_ : cut_.columns;
  copy_line_ = (across * block_ + p.kernel[1] - 1) * copy_row_;
  copy_bytes_ = round_up((lines * block_ + p.kernel[0] - 1) * copy_line_ + 64, 64);
  step_ = odd_lines(most_squares_ * row_);
  products_step_ = width_bytes;
  frequencies_bytes_ = size * size * step_;
  products_bytes_ = most_squares_ * products_row_;
}

// In multiply-adds of floats.
double Winograd::cost() const {
  const double frequencies = double(size_ * size_), squares = double(p_.batch * down_ * across_);
  const double waits = std::max(1.0, pixels_per_weight(weight_bytes()) / most_squares_);
  const double channels = double(round_up(p_.channels, floats_.lanes));
  const double columns = double(round_up(columns_, floats_.lanes));
  return squares * frequencies * (waits * p_.channels * columns + transform_cost * (channels + columns));
}

Tile Winograd::tile(int64_t task) const {
  Tile t = tile_of(cut_, task);
  if (whole_images_) return {t.line, 0, 0, t.lines * p_.out_height, p_.out_width};
  t.line *= block_, t.column *= block_;
  t.lines = std::min(t.lines * block_, p_.out_height - t.line);
  t.columns = std::min(t.columns * block_, p_.out_width - t.column);
  return t;
}

void Winograd::run(const Tile& t, const Images& x, const void* weight, const Finish& finish, const Grid& out,
                   const Panels& part, char* scratch) const {
  char *frequencies = scratch + copy_bytes_, *products = frequencies + frequencies_bytes_;
  const int64_t count = images(t), lines = t.lines / count;
  const int64_t down = divide_up(lines, block_), across = divide_up(t.columns, block_);
  const int64_t squares = count * down * across, groups = divide_up(squares, floats_.rows);
  for (int64_t i = 0; i < count; ++i) {
    take_apart(k_, p_, size_, x, {t.image + i, t.line, t.column, down, across}, {scratch, copy_row_, copy_line_},
               {frequencies + i * down * across * row_, row_, step_});
  }
  static constexpr int64_t no_offset = 0;
  const Panels panels(floats_, columns_, size_ * size_ * p_.channels);
  Product p;
  p.a_row = row_;
  p.taps = &no_offset, p.tap_count = 1, p.steps = p_.channels;
  p.finish.out_row = products_row_;
  p.finish.whole = true;
  for (int64_t j = part.begin; j < part.end; ++j) {
    const int vectors = panels.vectors(floats_, j);
    const int64_t width = vectors * floats_.lanes, weights = p_.channels * width * 4;
    const char* panel = static_cast<const char*>(weight) + j * panels.full_bytes;
    p.columns = width;
    p.next_step = width * 4 / groups;
    for (int64_t f = 0; f < size_ * size_; ++f, panel += weights) {
      p.panel = panel;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = squares * g / groups;
        p.a = frequencies + f * step_ + first * row_;
        p.finish.out = products + f * products_step_ + first * products_row_;
        p.next = panel + weights + weights * g / groups;
        floats_.multiply(p, int(squares * (g + 1) / groups - first), vectors);
      }
    }
    const int64_t from = j * panels.width;
    Finish finished = finish;
    if (finish.bias) finished.bias = finish.bias + from;
    const int64_t channels = std::min(panels.width, panels.columns - from);
    const char* product = products;
    for (int64_t i = 0; i < count * down; ++i) {
      const int64_t below = i % down * block_, line = i / down * lines + below;  // in its image, and of all
      for (int64_t column = 0; column < t.columns; column += block_, product += products_row_) {
        char* at = out.at + line * out.line + column * out.row + from * size_of(finish.out_type);
        k_.from_frequencies(int(size_), int(block_), reinterpret_cast<const float*>(product), products_step_, finished,
                            {at, out.row, out.line}, int(std::min(block_, lines - below)),
                            int(std::min(block_, t.columns - column)), channels);
      }
    }
  }
}

}  // namespace nin

void nin_winograd_weights(int64_t size, int64_t kernel, double* matrix) {
  nin::Winograd::weights_matrix(size, kernel, matrix);
}

int64_t nin_winograd_size(const void* kernels, const nin_problem* problem, int64_t columns) {
  return nin::Winograd::choose_size(*static_cast<const nin::Kernels*>(kernels), *problem, columns);
}
