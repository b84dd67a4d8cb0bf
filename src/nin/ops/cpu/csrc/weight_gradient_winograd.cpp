// The weight gradient of a k×k layer in the Winograd domain, Gᵀ (Bᵀ x B ⊙ A g Aᵀ) G: for each component the outer
// product of inputs and gradients, summed over all tiles. The tiles are processed in batches whose components fit an L3
// cache; within a batch the threads divide the tiles first, then the components. Tiles that would lose digits this way
// (dynamic_range.hpp) are summed tap by tap. Nothing depends on the number of threads.
#include <memory>
#include <new>

#include "dynamic_range.hpp"
#include "parallel.hpp"

namespace nin {
namespace {

// Bytes of a batch's components, in the shared scratch.
constexpr size_t batch_bytes = 16 << 20;
// Tiles that a task transforms.
constexpr int64_t task_tiles = 16;

using FloatMemory = std::unique_ptr<float, void (*)(void*)>;

// Returns zeros, or null if there is no memory.
FloatMemory zeros(int64_t count) {
  FloatMemory memory(static_cast<float*>(std::aligned_alloc(64, size_t(round_up(count * 4, 64)))), std::free);
  if (memory) std::fill(memory.get(), memory.get() + count, 0.0f);
  return memory;
}

// A tile whose components are its pixels, to be summed tap by tap: its place in the batch and its first output pixel.
struct TapTile {
  int64_t index, line, column;
};

class WinogradWeightGradient {
 public:
  WinogradWeightGradient(const Kernels& k, const nin_chain& chain, int64_t columns, const void* x, const void* grad);
  nin_status run(float* weight_grad, const nin_thread_pool& pool);

 private:
  WinogradTiles tiles(int64_t task) const;
  void transform_tiles(const WinogradTiles& s, TileMark* marks, const TransformedTiles& x_to,
                       const TransformedTiles& grad_to, char* scratch) const;
  void transform_gradient_tiles(const WinogradTiles& s, const PixelGrid& copy, const TileMark* marks,
                                const TransformedTiles& to) const;
  nin_status accumulate_batches(float* sums, const nin_thread_pool& pool);
  void accumulate_tap(int64_t tap, const TapTile& tile, const TransformedTiles& inputs,
                      const TransformedTiles& gradients) const;
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
  int64_t copy_bytes_, magnitudes_bytes_;     // of an input's or a gradient's window
  FloatMemory tap_sums_{nullptr, std::free};  // (tap, input channel, column), once there is a tile for them
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
  const int64_t lines = tile_grid_.lines * output_tile_ + chain.kernel[0] - 1,
                across = tile_grid_.columns * output_tile_ + chain.kernel[1] - 1;
  copy_bytes_ =
      round_up(lines * across * std::max(tile_row_bytes(k, chain.channels), tile_row_bytes(k, columns)) + 64, 64);
  magnitudes_bytes_ = round_up(PixelMagnitudes::bytes(lines, across), 64);
}

WinogradTiles WinogradWeightGradient::tiles(int64_t task) const {
  const Tile t = tile_at(tile_grid_, task);
  return {t.image, t.line * output_tile_, t.column * output_tile_, t.lines, t.columns};
}

// Copies, marks and transforms the tiles of a task.
void WinogradWeightGradient::transform_tiles(const WinogradTiles& s, TileMark* marks, const TransformedTiles& x_to,
                                             const TransformedTiles& grad_to, char* scratch) const {
  const int64_t x_row = tile_row_bytes(k_, chain_.channels), grad_row = tile_row_bytes(k_, grad_chain_.channels);
  const Window x_window = input_window(chain_, tile_size_, s);
  const Window grad_window{s.image, s.line, s.column, s.tiles_down * output_tile_, s.tiles_across * output_tile_};
  const PixelGrid x_copy{scratch, x_row, x_window.columns * x_row};
  const PixelGrid grad_copy{scratch + copy_bytes_, grad_row, grad_window.columns * grad_row};
  char* memory = scratch + 2 * copy_bytes_;
  copy_padded(k_, chain_, x_, x_window, x_copy);
  copy_padded(k_, grad_chain_, grad_, grad_window, grad_copy);
  const PixelMagnitudes x = measure_pixels(k_, chain_, x_window, x_copy, reinterpret_cast<int32_t*>(memory));
  const PixelMagnitudes grad =
      measure_pixels(k_, grad_chain_, grad_window, grad_copy, reinterpret_cast<int32_t*>(memory + magnitudes_bytes_));
  MagnitudeSummary x_tile = summarize(x, 0, 0, x_window.lines, x_window.columns);
  MagnitudeSummary grad_tile = summarize(grad, 0, 0, grad_window.lines, grad_window.columns);
  std::fill(marks, marks + s.count(), TileMark(0));
  const bool alike = are_alike(x) && are_alike(grad) && !loses_digits(x_tile, grad_tile);
  for (int64_t i = 0; i < s.count() && !alike; ++i) {
    const int64_t line = i / s.tiles_across * output_tile_, column = i % s.tiles_across * output_tile_;
    x_tile.largest = summarize(x, line, column, tile_size_, tile_size_).largest;
    grad_tile.largest = summarize(grad, line, column, output_tile_, output_tile_).largest;
    marks[i] = loses_digits(x_tile, grad_tile) ? by_taps : 0;
  }
  transform_input_tiles(k_, chain_, tile_size_, s, x_copy, marks, x_to);
  transform_gradient_tiles(s, grad_copy, marks, grad_to);
}

void WinogradWeightGradient::transform_gradient_tiles(const WinogradTiles& s, const PixelGrid& copy,
                                                      const TileMark* marks, const TransformedTiles& to) const {
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t line = i / s.tiles_across * output_tile_, column = i % s.tiles_across * output_tile_;
    const PixelGrid output_tile{copy.data + line * copy.line_stride + column * copy.pixel_stride, copy.pixel_stride,
                                copy.line_stride};
    char* components = to.data + i * to.tile_stride;
    if (marks[i] != by_taps) {
      k_.gradient_transform(int(tile_size_), int(output_tile_), output_tile, grad_chain_.channels,
                            reinterpret_cast<float*>(components), to.component_stride);
      continue;
    }
    for (int64_t j = 0; j < output_tile_; ++j) {
      float_kernels_.load({output_tile.data + j * output_tile.line_stride, element_size(k_.tile_type),
                           output_tile.pixel_stride, k_.tile_type, grad_chain_.channels, output_tile_},
                          components + j * output_tile_ * to.component_stride, to.component_stride);
    }
  }
}

// Adds a tile's products of inputs and gradients to the sums of one tap.
void WinogradWeightGradient::accumulate_tap(int64_t tap, const TapTile& tile, const TransformedTiles& inputs,
                                            const TransformedTiles& gradients) const {
  static constexpr int64_t no_offset = 0;
  const int64_t tap_line = tap / chain_.kernel[1], tap_column = tap % chain_.kernel[1];
  // outputs of which the tap reads the image: products with the padding would be NaN where the gradient is not finite
  const int64_t top = tile.line + tap_line - chain_.padding[0], left = tile.column + tap_column - chain_.padding[1];
  const int64_t first_line = std::max<int64_t>(0, -top), first_column = std::max<int64_t>(0, -left);
  const int64_t last_line = std::min({output_tile_, chain_.out_height - tile.line, chain_.height - top});
  const int64_t last_column = std::min({output_tile_, chain_.out_width - tile.column, chain_.width - left});
  const Panels panels(float_kernels_, grad_chain_.channels, 1);
  const int64_t groups = ceil_div(chain_.channels, float_kernels_.max_rows);
  OuterProductArguments args;
  args.segment_offsets = &no_offset, args.segment_count = 1, args.k_steps = last_column - first_column;
  args.a_k_stride = inputs.component_stride, args.b_k_stride = gradients.component_stride;
  args.sums_row_stride = grad_tile_stride_ / 4;
  for (int64_t line = first_line; args.k_steps > 0 && line < last_line; ++line) {
    const int64_t x_pixel = (line + tap_line) * tile_size_ + first_column + tap_column,
                  grad_pixel = line * output_tile_ + first_column;
    for (int64_t j = 0; j < panels.count; ++j) {
      args.b = gradients.data + tile.index * gradients.tile_stride + grad_pixel * gradients.component_stride +
               j * panels.width * 4;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = chain_.channels * g / groups, rows = chain_.channels * (g + 1) / groups - first;
        args.a = inputs.data + tile.index * inputs.tile_stride + x_pixel * inputs.component_stride + first * 4;
        args.sums = tap_sums_.get() + (tap * chain_.channels + first) * args.sums_row_stride + j * panels.width;
        float_kernels_.outer_product(args, int(rows), panels.vectors(float_kernels_, j));
      }
    }
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

// Writes Gᵀ s G of the sums s of each pair of channels, and what was summed tap by tap.
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
      for (int64_t tap = 0; tap_sums_ && tap < taps; ++tap) {
        const float* more = tap_sums_.get() + (tap * chain_.channels + channel) * row + column;
        float* to = reinterpret_cast<float*>(scratch) + tap * panels.width;
        for (int64_t j = 0; j < columns; ++j) to[j] += more[j];
      }
      float_kernels_.store({weight_grad + (column * chain_.channels + channel) * taps, chain_.channels * taps * 4, 4,
                            DataType::f32, columns, taps},
                           scratch, panels.width * 4);
    }
  });
}

nin_status WinogradWeightGradient::run(float* weight_grad, const nin_thread_pool& pool) {
  const FloatMemory sums = zeros(tile_size_ * tile_size_ * chain_.channels * grad_tile_stride_ / 4);
  if (!sums) return nin_out_of_memory;
  const nin_status status = accumulate_batches(sums.get(), pool);
  return status == nin_ok ? transform_to_weight(sums.get(), weight_grad, pool) : status;
}

nin_status WinogradWeightGradient::accumulate_batches(float* sums, const nin_thread_pool& pool) {
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
  const int64_t taps = chain_.kernel[0] * chain_.kernel[1];
  std::vector<int64_t> first;  // first tile of each task of the batch
  std::vector<TileMark> marks(size_t(max_tiles), 0);
  std::vector<TapTile> tap_tiles;
  for (int64_t task = 0; task < tile_grid_.count() && status == nin_ok; task += int64_t(first.size())) {
    first.clear();
    int64_t count = 0;
    while (task + int64_t(first.size()) < tile_grid_.count()) {
      const int64_t more = tiles(task + int64_t(first.size())).count();
      if (count + more > max_tiles) break;
      first.push_back(count);
      count += more;
    }
    const size_t scratch_bytes = size_t(2 * (copy_bytes_ + magnitudes_bytes_));
    status = run_tasks(pool, int64_t(first.size()), scratch_bytes, [&](int64_t i, char* scratch) {
      const int64_t at = first[size_t(i)];
      transform_tiles(tiles(task + i), marks.data() + at,
                      {inputs.data + at * x_tile_stride_, x_tile_stride_, x_component_stride},
                      {gradients.data + at * grad_tile_stride_, grad_tile_stride_, grad_component_stride}, scratch);
    });
    if (status != nin_ok) break;
    tap_tiles.clear();
    for (size_t i = 0; i < first.size(); ++i) {
      const WinogradTiles s = tiles(task + int64_t(i));
      for (int64_t j = 0; j < s.count(); ++j) {
        if (marks[size_t(first[i] + j)] != by_taps) continue;
        tap_tiles.push_back({first[i] + j, s.line + j / s.tiles_across * output_tile_,
                             s.column + j % s.tiles_across * output_tile_});
      }
    }
    if (!tap_tiles.empty()) {
      if (!tap_sums_) tap_sums_ = zeros(taps * chain_.channels * grad_tile_stride_ / 4);
      status = !tap_sums_ ? nin_out_of_memory : run_tasks(pool, taps, 1, [&](int64_t tap, char*) {
        for (const TapTile& tile : tap_tiles) accumulate_tap(tap, tile, inputs, gradients);
      });
      if (status != nin_ok) break;
    }
    status = run_tasks(pool, components, 1, [&](int64_t component, char*) {
      for (const TapTile& tile : tap_tiles) {  // these add nothing here
        std::memset(inputs.data + component * x_component_stride + tile.index * x_tile_stride_, 0, x_tile_stride_);
        std::memset(gradients.data + component * grad_component_stride + tile.index * grad_tile_stride_, 0,
                    grad_tile_stride_);
      }
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
