// The gradients of a k×k layer's weights and bias, tap by tap. Neighbours along a line lie side by side in the copy of
// the input, so the taps of a line and their channels are one run of numbers: a product of each with the gradient,
// summed over the pixels of a tile. Meant for few channels, where a run is all that a line has to give.
#include <memory>
#include <new>

#include "parallel.hpp"
#include "tiles.hpp"

namespace nin {
namespace {

// As in backward.cpp: pixels of a tile, and the slices of tiles with sums of their own, which do not know of threads.
constexpr int64_t tile_pixels = 128, most_slices = 32, slices_bytes = 64 << 20;

class TapGradient {
 public:
  TapGradient(const Kernels& k, const nin_problem& p, const nin_gradient& gradient, int64_t columns, const void* x,
              const void* grad, const void* y)
      : k_(k), p_(p), columns_(columns), x_(images(x, p.x_stride, size_of(Type(p.type)))),
        grad_(images(grad, gradient.grad_stride, size_of(Type(p.type)))),
        y_(images(y, p.y_stride, size_of(Type(p.type)))),
        cut_(cut(p.batch, p.out_height, p.out_width, tile_pixels, 1)) {
    run_ = p.kernel[1] * p.channels;
    row_ = tile_row(k, columns);
    tile_bytes_ = cut_.lines * cut_.columns * row_;
    copy_line_ = ((cut_.columns - 1) * p.stride[1] + p.kernel[1]) * p.channels * 4;
    copy_bytes_ = round_up(((cut_.lines - 1) * p.stride[0] + p.kernel[0]) * copy_line_ + 64, 64);
    for (int64_t line = 0; line < cut_.lines; ++line) lines_.push_back(line * p.stride[0] * copy_line_);
  }
  // rows of sums: one for each tap and channel, and one for the bias
  int64_t rows() const { return p_.kernel[0] * run_ + 1; }
  nin_status run(float* sums, int64_t sums_row, const nin_pool& pool) const;

 private:
  void add_tile(const Tile& t, char* scratch, float* sums, int64_t sums_row) const;
  void load(const Images& from, const Tile& t, char* to) const;

  const Kernels& k_;  // of floats
  nin_problem p_;
  int64_t columns_;
  Images x_, grad_, y_;
  Cut cut_;
  int64_t run_, row_, tile_bytes_, copy_line_, copy_bytes_;
  std::vector<int64_t> lines_;  // where each line of a tile starts in the copy
};

void TapGradient::load(const Images& from, const Tile& t, char* to) const {
  for (int64_t line = 0; line < t.lines; ++line) {
    k_.load({from.pixel(t.image, t.line + line, t.column), from.c, from.w, Type(p_.type), columns_, t.columns},
            to + line * t.columns * row_, row_);
  }
}

void TapGradient::add_tile(const Tile& t, char* scratch, float* sums, int64_t sums_row) const {
  char *copy = scratch, *grad = scratch + copy_bytes_, *y = grad + tile_bytes_;
  load(grad_, t, grad);
  if (y_.at) {
    load(y_, t, y);
    Finish gate;
    gate.gate = y, gate.gate_row = row_;
    gate.gate_is_result = true;
    k_.apply_gate(grad, row_, gate, t.pixels(), columns_);
  }
  const int64_t pixel = p_.channels * 4;
  copy_bordered(k_, p_, x_,
                {t.image, t.line * p_.stride[0] - p_.padding[0], t.column * p_.stride[1] - p_.padding[1],
                 (t.lines - 1) * p_.stride[0] + p_.kernel[0], (t.columns - 1) * p_.stride[1] + p_.kernel[1]},
                {copy, pixel, copy_line_});
  OuterProduct p;
  p.a_step = p_.stride[1] * pixel;
  p.segments = lines_.data(), p.segment_count = t.lines, p.steps = t.columns;
  p.b_step = row_;
  p.sums_row = sums_row;
  const Panels panels(k_, columns_, 1);
  const int64_t groups = divide_up(run_, k_.rows);
  for (int64_t i = 0; i < p_.kernel[0]; ++i) {
    for (int64_t j = 0; j < panels.count; ++j) {
      p.b = grad + j * panels.width * 4;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = run_ * g / groups, rows = run_ * (g + 1) / groups - first;
        p.a = copy + i * copy_line_ + first * 4;
        p.sums = sums + (i * run_ + first) * sums_row + j * panels.width;
        k_.accumulate(p, int(rows), panels.vectors(k_, j));
      }
    }
  }
  k_.sum_pixels(grad, row_, t.pixels(), columns_, sums + (rows() - 1) * sums_row);
}

nin_status TapGradient::run(float* sums, int64_t sums_row, const nin_pool& pool) const {
  const int64_t size = rows() * sums_row;
  const int64_t slices = std::min(cut_.tiles(), std::clamp<int64_t>(slices_bytes / (size * 4), 1, most_slices));
  const std::unique_ptr<float, void (*)(void*)> own(
      static_cast<float*>(std::aligned_alloc(64, size_t(round_up(slices * size * 4, 64)))), std::free);
  if (!own) return nin_out_of_memory;
  const size_t scratch_bytes = size_t(copy_bytes_ + (y_.at ? 2 : 1) * tile_bytes_);
  const nin_status status = run_tasks(pool, slices, scratch_bytes, [&](int64_t slice, char* scratch) {
    float* at = own.get() + slice * size;
    std::fill(at, at + size, 0.0f);
    const int64_t last = cut_.tiles() * (slice + 1) / slices;
    for (int64_t tile = cut_.tiles() * slice / slices; tile < last; ++tile) {
      add_tile(tile_of(cut_, tile), scratch, at, sums_row);
    }
  });
  if (status != nin_ok) return status;
  for (int64_t i = 0; i < size; ++i) {
    float sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += own.get()[slice * size + i];
    sums[i] = sum;
  }
  return nin_ok;
}

}  // namespace
}  // namespace nin

int32_t nin_tap_gradient(const void* kernels, const nin_problem* problem, const nin_gradient* gradient, int64_t columns,
                         const void* x, const void* grad, const void* y, float* sums, int64_t sums_row,
                         const nin_pool* pool) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels)->floats;
    return nin::TapGradient(k, *problem, *gradient, columns, x, grad, y).run(sums, sums_row, *pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
