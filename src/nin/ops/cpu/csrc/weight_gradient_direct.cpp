// The weight and bias gradients of a k×k layer, computed directly (not in the Winograd domain). Pixels of a line are
// contiguous in the padded copy of the input, so the taps of a kernel line and their channels are the rows of one outer
// product with the gradient, summed over the pixels of a tile. Made for a network's first layer, with few channels.
#include <memory>
#include <new>

#include "parallel.hpp"
#include "tiling.hpp"

namespace nin {
namespace {

// As in backward.cpp: tiles and slices do not depend on the number of threads.
constexpr int64_t tile_pixels = 128, max_slices = 32, slices_bytes = 64 << 20;

class DirectWeightGradient {
 public:
  DirectWeightGradient(const Kernels& k, const nin_chain& p, const nin_gradient_strides& gradient, int64_t columns,
                       const void* x, const void* grad, const void* y)
      : k_(k), chain_(p), columns_(columns), x_(image_view(x, p.x_stride, element_size(DataType(p.type)))),
        grad_(image_view(grad, gradient.grad_stride, element_size(DataType(p.type)))),
        y_(image_view(y, p.y_stride, element_size(DataType(p.type)))),
        tile_grid_(make_tile_grid(p.batch, p.out_height, p.out_width, tile_pixels, 1)) {
    line_taps_ = p.kernel[1] * p.channels;
    row_bytes_ = tile_row_bytes(k, columns);
    tile_bytes_ = tile_grid_.lines * tile_grid_.columns * row_bytes_;
    copy_line_stride_ = ((tile_grid_.columns - 1) * p.stride[1] + p.kernel[1]) * p.channels * 4;
    copy_bytes_ = round_up(((tile_grid_.lines - 1) * p.stride[0] + p.kernel[0]) * copy_line_stride_ + 64, 64);
    for (int64_t line = 0; line < tile_grid_.lines; ++line)
      line_offsets_.push_back(line * p.stride[0] * copy_line_stride_);
  }
  // of the sums: one for each tap and channel, and one for the bias
  int64_t rows() const { return chain_.kernel[0] * line_taps_ + 1; }
  nin_status run(float* sums, int64_t sums_row_stride, const nin_thread_pool& pool) const;

 private:
  void accumulate_tile(const Tile& t, char* scratch, float* sums, int64_t sums_row_stride) const;
  void load(const ImageView& from, const Tile& t, char* to) const;

  const Kernels& k_;  // of floats
  nin_chain chain_;
  int64_t columns_;
  ImageView x_, grad_, y_;
  TileGrid tile_grid_;
  int64_t line_taps_, row_bytes_, tile_bytes_, copy_line_stride_, copy_bytes_;
  std::vector<int64_t> line_offsets_;  // of a tile, in the copy
};

void DirectWeightGradient::load(const ImageView& from, const Tile& t, char* to) const {
  for (int64_t line = 0; line < t.lines; ++line) {
    k_.load({from.pixel(t.image, t.line + line, t.column), from.c_stride, from.w_stride, DataType(chain_.type),
             columns_, t.columns},
            to + line * t.columns * row_bytes_, row_bytes_);
  }
}

void DirectWeightGradient::accumulate_tile(const Tile& t, char* scratch, float* sums, int64_t sums_row_stride) const {
  char *copy = scratch, *grad = scratch + copy_bytes_, *y = grad + tile_bytes_;
  load(grad_, t, grad);
  if (y_.data) {
    load(y_, t, y);
    Epilogue gate;
    gate.gate = y, gate.gate_row_stride = row_bytes_;
    gate.gate_is_relu_output = true;
    k_.apply_gate(grad, row_bytes_, gate, t.pixels(), columns_);
  }
  const int64_t pixel = chain_.channels * 4;
  copy_padded(
      k_, chain_, x_,
      {t.image, t.line * chain_.stride[0] - chain_.padding[0], t.column * chain_.stride[1] - chain_.padding[1],
       (t.lines - 1) * chain_.stride[0] + chain_.kernel[0], (t.columns - 1) * chain_.stride[1] + chain_.kernel[1]},
      {copy, pixel, copy_line_stride_});
  OuterProductArguments args;
  args.a_k_stride = chain_.stride[1] * pixel;
  args.segment_offsets = line_offsets_.data(), args.segment_count = t.lines, args.k_steps = t.columns;
  args.b_k_stride = row_bytes_;
  args.sums_row_stride = sums_row_stride;
  const Panels panels(k_, columns_, 1);
  const int64_t groups = ceil_div(line_taps_, k_.max_rows);
  for (int64_t i = 0; i < chain_.kernel[0]; ++i) {
    for (int64_t j = 0; j < panels.count; ++j) {
      args.b = grad + j * panels.width * 4;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = line_taps_ * g / groups, rows = line_taps_ * (g + 1) / groups - first;
        args.a = copy + i * copy_line_stride_ + first * 4;
        args.sums = sums + (i * line_taps_ + first) * sums_row_stride + j * panels.width;
        k_.outer_product(args, int(rows), panels.vectors(k_, j));
      }
    }
  }
  k_.add_column_sums(grad, row_bytes_, t.pixels(), columns_, sums + (rows() - 1) * sums_row_stride);
}

nin_status DirectWeightGradient::run(float* sums, int64_t sums_row_stride, const nin_thread_pool& pool) const {
  const int64_t size = rows() * sums_row_stride;
  const int64_t slices = std::min(tile_grid_.count(), std::clamp<int64_t>(slices_bytes / (size * 4), 1, max_slices));
  const std::unique_ptr<float, void (*)(void*)> own(
      static_cast<float*>(std::aligned_alloc(64, size_t(round_up(slices * size * 4, 64)))), std::free);
  if (!own) return nin_out_of_memory;
  const size_t scratch_bytes = size_t(copy_bytes_ + (y_.data ? 2 : 1) * tile_bytes_);
  const nin_status status = run_tasks(pool, slices, scratch_bytes, [&](int64_t slice, char* scratch) {
    float* at = own.get() + slice * size;
    std::fill(at, at + size, 0.0f);
    const int64_t last = tile_grid_.count() * (slice + 1) / slices;
    for (int64_t tile = tile_grid_.count() * slice / slices; tile < last; ++tile) {
      accumulate_tile(tile_at(tile_grid_, tile), scratch, at, sums_row_stride);
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

int32_t nin_tap_gradient(const void* kernels, const nin_chain* chain, const nin_gradient_strides* gradient,
                         int64_t columns, const void* x, const void* grad, const void* y, float* sums,
                         int64_t sums_row_stride, const nin_thread_pool* pool) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels)->float_kernels;
    return nin::DirectWeightGradient(k, *chain, *gradient, columns, x, grad, y).run(sums, sums_row_stride, *pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
