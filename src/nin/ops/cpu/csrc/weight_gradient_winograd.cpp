// The weight gradient of a k×k layer in the Winograd domain, Gᵀ (Bᵀ x B ⊙ A g Aᵀ) G: for each component the outer
// product of inputs and gradients, summed over all tiles. The tiles are processed in batches whose components fit an L3
// cache; within a batch the threads divide the tiles first, then the components. Nothing depends on the number of
// threads.
#include <memory>
#include <new>

#include "parallel.hpp"
#include "winograd.hpp"

namespace nin {
namespace {

// Bytes of a batch's components, in the shared scratch.
constexpr size_t batch_bytes = 16 << 20;
// Tiles that a task transforms.
constexpr int64_t task_tiles = 16;

class WinogradWeightGradient {
 public:
  WinogradWeightGradient(const Kernels& k, const nin_chain& chain, int64_t columns, const void* x, const void* grad);
  nin_status run(float* weight_grad, const nin_thread_pool& pool) const;

 private:
  WinogradTiles tiles(int64_t task) const;
  void transform_gradient_tiles(const WinogradTiles& s, const PixelGrid& copy, const TransformedTiles& to) const;
  nin_status accumulate_batches(float* sums, const nin_thread_pool& pool) const;
  void accumulate_component(int64_t component, int64_t count, const TransformedTiles& inputs,
                            const TransformedTiles& gradients, float* sums) const;
  nin_status transform_to_weight(const float* sums, float* weight_grad, const nin_thread_pool& pool) const;

  const Kernels& k_;
  const Kernels& float_kernels_;
  nin_chain chain_, grad_chain_;  // the second has the gradient as its input
  int64_t tile_size_, output_tile_;
  ImageView x_, grad_;
  TileGrid tile_grid_;                        // of Winograd tiles
  int64_t x_tile_stride_, grad_tile_stride_;  // the second is also the stride of the sums' input channels
  int64_t copy_bytes_;
};

WinogradWeightGradient::WinogradWeightGradient(const Kernels& k, const nin_chain& chain, int64_t columns, const void* x,
                                               const void* grad)
    : k_(k), float_kernels_(*k.float_kernels), chain_(chain), grad_chain_(chain), tile_size_(chain.winograd_tile_size),
      output_tile_(tile_size_ - chain.kernel[0] + 1),
      x_(image_view(x, chain.x_stride, element_size(DataType(chain.type)))),
      grad_(image_view(grad, chain.y_stride, element_size(DataType(chain.type)))),
      tile_grid_(make_tile_grid(chain.batch, ceil_div(chain.out_height, output_tile_),
                                ceil_div(chain.out_width, output_tile_), task_tiles, 1)) {
  grad_chain_.channels = columns;
  grad_chain_.height = chain.out_height, grad_chain_.width = chain.out_width;
  x_tile_stride_ = tile_row_bytes(float_kernels_, chain.channels);
  grad_tile_stride_ = tile_row_bytes(float_kernels_, columns);
  const int64_t window_pixels = (tile_grid_.lines * output_tile_ + chain.kernel[0] - 1) *
                                (tile_grid_.columns * output_tile_ + chain.kernel[1] - 1);
  copy_bytes_ = window_pixels * std::max(tile_row_bytes(k, chain.channels), tile_row_bytes(k, columns)) + 64;
}

WinogradTiles WinogradWeightGradient::tiles(int64_t task) const {
  const Tile t = tile_at(tile_grid_, task);
  return {t.image, t.line * output_tile_, t.column * output_tile_, t.lines, t.columns};
}

void WinogradWeightGradient::transform_gradient_tiles(const WinogradTiles& s, const PixelGrid& copy,
                                                      const TransformedTiles& to) const {
  copy_padded(k_, grad_chain_, grad_,
              {s.image, s.line, s.column, s.tiles_down * output_tile_, s.tiles_across * output_tile_}, copy);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t line = i / s.tiles_across * output_tile_, column = i % s.tiles_across * output_tile_;
    const PixelGrid output_tile{copy.data + line * copy.line_stride + column * copy.pixel_stride, copy.pixel_stride,
                                copy.line_stride};
    k_.gradient_transform(int(tile_size_), int(output_tile_), output_tile, grad_chain_.channels,
                          reinterpret_cast<float*>(to.data + i * to.tile_stride), to.component_stride);
  }
}

void WinogradWeightGradient::accumulate_component(int64_t component, int64_t count, const TransformedTiles& inputs,
                                                  const TransformedTiles& gradients, float* sums) const {
  static constexpr int64_t no_offset = 0;
  const Panels panels(float_kernels_, grad_chain_.channels, 1);
  const int64_t groups = ceil_div(chain_.channels, float_kernels_.max_rows);
  OuterProductArguments args;
  args.segment_offsets = &no_offset, args.segment_count = 1, args.k_steps = count;
  args.a_k_stride = inputs.tile_stride, args.b_k_stride = gradients.tile_stride;
  args.sums_row_stride = grad_tile_stride_ / 4;
  for (int64_t j = 0; j < panels.count; ++j) {
    args.b = gradients.data + component * gradients.component_stride + j * panels.width * 4;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = chain_.channels * g / groups, rows = chain_.channels * (g + 1) / groups - first;
      args.a = inputs.data + component * inputs.component_stride + first * 4;
      args.sums = sums + (component * chain_.channels + first) * args.sums_row_stride + j * panels.width;
      float_kernels_.outer_product(args, int(rows), panels.vectors(float_kernels_, j));
    }
  }
}

// Writes Gᵀ s G of the sums s of each pair of channels.
nin_status WinogradWeightGradient::transform_to_weight(const float* sums, float* weight_grad,
                                                       const nin_thread_pool& pool) const {
  const Panels panels(float_kernels_, grad_chain_.channels, 1);
  const int64_t kernel = chain_.kernel[0], taps = kernel * kernel, row = grad_tile_stride_ / 4;
  const std::vector<float> matrix = Winograd::filter_transform_matrix(tile_size_, kernel);
  std::vector<float> transposed(matrix.size());
  for (int64_t i = 0; i < kernel; ++i) {
    for (int64_t a = 0; a < tile_size_; ++a) transposed[size_t(i * tile_size_ + a)] = matrix[size_t(a * kernel + i)];
  }
  constexpr int64_t task_channels = 16;
  const int64_t groups = ceil_div(chain_.channels, task_channels);
  return run_tasks(pool, panels.count * groups, size_t(taps * panels.width * 4), [&](int64_t task, char* scratch) {
    const int64_t panel = task / groups, first = task % groups * task_channels, column = panel * panels.width;
    const int64_t last = std::min(chain_.channels, first + task_channels);
    for (int64_t channel = first; channel < last; ++channel) {
      float_kernels_.filter_transform(int(kernel), int(tile_size_), transposed.data(), sums + channel * row + column,
                                      chain_.channels * grad_tile_stride_, reinterpret_cast<float*>(scratch),
                                      panels.width * 4, panels.vectors(float_kernels_, panel) * float_kernels_.lanes);
      const int64_t columns = std::min(panels.width, panels.columns - column);
      float_kernels_.store({weight_grad + (column * chain_.channels + channel) * taps, chain_.channels * taps * 4, 4,
                            DataType::f32, columns, taps},
                           scratch, panels.width * 4);
    }
  });
}

nin_status WinogradWeightGradient::run(float* weight_grad, const nin_thread_pool& pool) const {
  const int64_t count = tile_size_ * tile_size_ * chain_.channels * grad_tile_stride_ / 4;
  const std::unique_ptr<float, void (*)(void*)> sums(
      static_cast<float*>(std::aligned_alloc(64, size_t(round_up(count * 4, 64)))), std::free);
  if (!sums) return nin_out_of_memory;
  std::fill(sums.get(), sums.get() + count, 0.0f);
  const nin_status status = accumulate_batches(sums.get(), pool);
  return status == nin_ok ? transform_to_weight(sums.get(), weight_grad, pool) : status;
}

nin_status WinogradWeightGradient::accumulate_batches(float* sums, const nin_thread_pool& pool) const {
  const int64_t bytes_per_tile = tile_size_ * tile_size_ * (x_tile_stride_ + grad_tile_stride_);
  const int64_t max_tiles =
      std::max<int64_t>(tile_grid_.lines * tile_grid_.columns, int64_t(batch_bytes) / bytes_per_tile);
  const int64_t x_component_stride = odd_cache_lines(max_tiles * x_tile_stride_),
                grad_component_stride = odd_cache_lines(max_tiles * grad_tile_stride_);
  char* shared = shared_scratch.reserve(size_t(tile_size_ * tile_size_ * (x_component_stride + grad_component_stride)));
  if (!shared) return nin_out_of_memory;
  const TransformedTiles inputs{shared, x_tile_stride_, x_component_stride};
  const TransformedTiles gradients{shared + tile_size_ * tile_size_ * x_component_stride, grad_tile_stride_,
                                   grad_component_stride};
  const int64_t components = tile_size_ * tile_size_;
  nin_status status = nin_ok;
  std::vector<int64_t> first;  // first tile of each task of the batch
  for (int64_t task = 0; task < tile_grid_.count() && status == nin_ok; task += int64_t(first.size())) {
    first.clear();
    int64_t count = 0;
    while (task + int64_t(first.size()) < tile_grid_.count()) {
      const int64_t more = tiles(task + int64_t(first.size())).count();
      if (count + more > max_tiles) break;
      first.push_back(count);
      count += more;
    }
    status = run_tasks(pool, int64_t(first.size()), size_t(copy_bytes_), [&](int64_t i, char* scratch) {
      const WinogradTiles s = tiles(task + i);
      const int64_t x_copy = tile_row_bytes(k_, chain_.channels), grad_copy = tile_row_bytes(k_, grad_chain_.channels);
      const TransformedTiles x_to{inputs.data + first[size_t(i)] * x_tile_stride_, x_tile_stride_, x_component_stride};
      transform_input_tiles(k_, chain_, tile_size_, x_, s,
                            {scratch, x_copy, (s.tiles_across * output_tile_ + chain_.kernel[1] - 1) * x_copy}, x_to);
      transform_gradient_tiles(
          s, {scratch, grad_copy, s.tiles_across * output_tile_ * grad_copy},
          {gradients.data + first[size_t(i)] * grad_tile_stride_, grad_tile_stride_, grad_component_stride});
    });
    if (status != nin_ok) break;
    status = run_tasks(pool, components, 1, [&](int64_t component, char*) {
      accumulate_component(component, count, inputs, gradients, sums);
    });
  }
  shared_scratch.trim(2 * batch_bytes);
  return status;
}

}  // namespace
}  // namespace nin

int32_t nin_winograd_gradient(const void* kernels, const nin_chain* chain, int64_t columns, const void* x,
                              const void* grad, float* weight_grad, const nin_thread_pool* pool) {
  try {
    const auto& k = *static_cast<const nin::Kernels*>(kernels);
    return nin::WinogradWeightGradient(k, *chain, columns, x, grad).run(weight_grad, *pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
