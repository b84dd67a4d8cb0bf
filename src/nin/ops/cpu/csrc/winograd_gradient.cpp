// The gradient of a k×k layer's weights by Winograd's transforms: at each frequency the product of the inputs' values
// and of the gradients' over all squares. The squares are taken in turns, of so many as their frequencies fit a third
// cache; in a turn the threads share the squares first, then the frequencies. No cut knows of the number of threads.
#include <memory>
#include <new>

#include "parallel.hpp"
#include "winograd.hpp"

namespace nin {
namespace {

// Bytes of the frequencies of a turn, which the thread that calls keeps for the next one.
constexpr size_t turn_bytes = 16 << 20;
// Squares that a task takes apart.
constexpr int64_t task_squares = 16;

class WeightGradient {
 public:
  WeightGradient(const Kernels& k, const nin_problem& p, int64_t columns, const void* x, const void* grad);
  nin_status run(float* weight_grad, const nin_pool& pool) const;

 private:
  Squares squares(int64_t task) const;
  void spread(const Squares& s, const Grid& copy, const Frequencies& to) const;
  nin_status add_turns(float* sums, const nin_pool& pool) const;
  void add_products(int64_t frequency, int64_t count, const Frequencies& inputs, const Frequencies& gradients,
                    float* sums) const;
  nin_status put_together(const float* sums, float* weight_grad, const nin_pool& pool) const;

  const Kernels& k_;
  const Kernels& floats_;
  nin_problem p_, grad_p_;  // the second as if the gradient were the image
  int64_t size_, block_;
  Images x_, grad_;
  Cut cut_;                  // of squares
  int64_t x_row_, grad_row_;  // bytes between squares; the second between input channels of the sums, too
  int64_t copy_bytes_;
};

WeightGradient::WeightGradient(const Kernels& k, const nin_problem& p, int64_t columns, const void* x, const void* grad)
    : k_(k), floats_(*k.floats), p_(p), grad_p_(p), size_(p.winograd), block_(size_ - p.kernel[0] + 1),
      x_(images(x, p.x_stride, size_of(Type(p.type)))), grad_(images(grad, p.y_stride, size_of(Type(p.type)))),
      cut_(cut(p.batch, divide_up(p.out_height, block_), divide_up(p.out_width, block_), task_squares, 1)) {
  grad_p_.channels = columns;
  grad_p_.height = p.out_height, grad_p_.width = p.out_width;
  x_row_ = tile_row(floats_, p.channels);
  grad_row_ = tile_row(floats_, columns);
  const int64_t reached = (cut_.lines * block_ + p.kernel[0] - 1) * (cut_.columns * block_ + p.kernel[1] - 1);
  copy_bytes_ = reached * std::max(tile_row(k, p.channels), tile_row(k, columns)) + 64;
}

Squares WeightGradient::squares(int64_t task) const {
  const Tile t = tile_of(cut_, task);
  return {t.image, t.line * block_, t.column * block_, t.lines, t.columns};
}

void WeightGradient::spread(const Squares& s, const Grid& copy, const Frequencies& to) const {
  copy_bordered(k_, grad_p_, grad_, {s.image, s.line, s.column, s.down * block_, s.across * block_}, copy);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t line = i / s.across * block_, column = i % s.across * block_;
    const Grid block{copy.at + line * copy.line + column * copy.row, copy.row, copy.line};
    k_.spread_block(int(size_), int(block_), block, grad_p_.channels,
                    reinterpret_cast<float*>(to.at + i * to.square), to.frequency);
  }
}

void WeightGradient::add_products(int64_t frequency, int64_t count, const Frequencies& inputs,
                                  const Frequencies& gradients, float* sums) const {
  static constexpr int64_t no_offset = 0;
  const Panels panels(floats_, grad_p_.channels, 1);
  const int64_t groups = divide_up(p_.channels, floats_.rows);
  OuterProduct p;
  p.segments = &no_offset, p.segment_count = 1, p.steps = count;
  p.a_step = inputs.square, p.b_step = gradients.square;
  p.sums_row = grad_row_ / 4;
  for (int64_t j = 0; j < panels.count; ++j) {
    p.b = gradients.at + frequency * gradients.frequency + j * panels.width * 4;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = p_.channels * g / groups, rows = p_.channels * (g + 1) / groups - first;
      p.a = inputs.at + frequency * inputs.frequency + first * 4;
      p.sums = sums + (frequency * p_.channels + first) * p.sums_row + j * panels.width;
      floats_.accumulate(p, int(rows), panels.vectors(floats_, j));
    }
  }
}

// Gᵀ s G of the sums s of each pair of channels.
nin_status WeightGradient::put_together(const float* sums, float* weight_grad, const nin_pool& pool) const {
  const Panels panels(floats_, grad_p_.channels, 1);
  const int64_t kernel = p_.kernel[0], taps = kernel * kernel, row = grad_row_ / 4;
  const std::vector<float> matrix = Winograd::weights_matrix(size_, kernel);
  std::vector<float> turned(matrix.size());
  for (int64_t i = 0; i < kernel; ++i) {
    for (int64_t a = 0; a < size_; ++a) turned[size_t(i * size_ + a)] = matrix[size_t(a * kernel + i)];
  }
  constexpr int64_t task_channels = 16;
  const int64_t groups = divide_up(p_.channels, task_channels);
  return run_tasks(pool, panels.count * groups, size_t(taps * panels.width * 4), [&](int64_t task, char* scratch) {
    const int64_t panel = task / groups, first = task % groups * task_channels, column = panel * panels.width;
    const int64_t last = std::min(p_.channels, first + task_channels);
    for (int64_t channel = first; channel < last; ++channel) {
      floats_.transform_sides(int(kernel), int(size_), turned.data(), sums + channel * row + column,
                              p_.channels * grad_row_, reinterpret_cast<float*>(scratch), panels.width * 4,
                              panels.vectors(floats_, panel) * floats_.lanes);
      const int64_t columns = std::min(panels.width, panels.columns - column);
      floats_.store({weight_grad + (column * p_.channels + channel) * taps, p_.channels * taps * 4, 4, Type::f32,
                     columns, taps},
                    scratch, panels.width * 4);
    }
  });
}

nin_status WeightGradient::run(float* weight_grad, const nin_pool& pool) const {
  const int64_t count = size_ * size_ * p_.channels * grad_row_ / 4;
  const std::unique_ptr<float, void (*)(void*)> sums(
      static_cast<float*>(std::aligned_alloc(64, size_t(round_up(count * 4, 64)))), std::free);
  if (!sums) return nin_out_of_memory;
  std::fill(sums.get(), sums.get() + count, 0.0f);
  const nin_status status = add_turns(sums.get(), pool);
  return status == nin_ok ? put_together(sums.get(), weight_grad, pool) : status;
}

nin_status WeightGradient::add_turns(float* sums, const nin_pool& pool) const {
  const int64_t per_square = size_ * size_ * (x_row_ + grad_row_);
  const int64_t most = std::max<int64_t>(cut_.lines * cut_.columns, int64_t(turn_bytes) / per_square);
  const int64_t x_step = odd_lines(most * x_row_), grad_step = odd_lines(most * grad_row_);
  char* shared = shared_scratch.reserve(size_t(size_ * size_ * (x_step + grad_step)));
  if (!shared) return nin_out_of_memory;
  const Frequencies inputs{shared, x_row_, x_step};
  const Frequencies gradients{shared + size_ * size_ * x_step, grad_row_, grad_step};
  const int64_t frequencies = size_ * size_;
  nin_status status = nin_ok;
  std::vector<int64_t> first;  // square of each task of the turn
  for (int64_t task = 0; task < cut_.tiles() && status == nin_ok; task += int64_t(first.size())) {
    first.clear();
    int64_t count = 0;
    while (task + int64_t(first.size()) < cut_.tiles()) {
      const int64_t more = squares(task + int64_t(first.size())).count();
      if (count + more > most) break;
      first.push_back(count);
      count += more;
    }
    status = run_tasks(pool, int64_t(first.size()), size_t(copy_bytes_), [&](int64_t i, char* scratch) {
      const Squares s = squares(task + i);
      const int64_t x_copy = tile_row(k_, p_.channels), grad_copy = tile_row(k_, grad_p_.channels);
      const Frequencies x_to{inputs.at + first[size_t(i)] * x_row_, x_row_, x_step};
      take_apart(k_, p_, size_, x_, s, {scratch, x_copy, (s.across * block_ + p_.kernel[1] - 1) * x_copy}, x_to);
      spread(s, {scratch, grad_copy, s.across * block_ * grad_copy},
             {gradients.at + first[size_t(i)] * grad_row_, grad_row_, grad_step});
    });
    if (status != nin_ok) break;
    status = run_tasks(pool, frequencies, 1, [&](int64_t f, char*) {
      add_products(f, count, inputs, gradients, sums);
    });
  }
  shared_scratch.trim(2 * turn_bytes);
  return status;
}

}  // namespace
}  // namespace nin

int32_t nin_winograd_gradient(const void* kernels, const nin_problem* problem, int64_t columns, const void* x,
                              const void* grad, float* weight_grad, const nin_pool* pool) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels);
    return nin::WeightGradient(k, *problem, columns, x, grad).run(weight_grad, *pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
