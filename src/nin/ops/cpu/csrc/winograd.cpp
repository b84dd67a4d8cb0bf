// When a convolution runs in the Winograd domain, how its tiles are divided into tasks, and the forward pass.
#include "winograd.hpp"

namespace nin {
namespace {

constexpr int64_t min_kernel = 3, max_kernel = 7, tile_sizes[] = {6, 8};

// Bytes of a task's components and of their products with one panel of weights: what an L2 cache holds beside the
// streamed weights; more if it cannot hold the weights, so that they are read less often.
constexpr int64_t max_task_bytes = 640 << 10, large_weights_max_task_bytes = 1280 << 10;
// Bytes of a task's pixels in the layers that follow.
constexpr int64_t max_hidden_bytes = 2 << 20;

// With fewer channels the transforms take longer than the GEMMs.
constexpr int64_t min_channels = 16;

// The cost model, in multiply-adds. `transform_cost`: additions, loads and stores for a channel of a component.
// `pixels_per_weight`: pixels that can be multiplied while a weight is loaded from the L2 cache, the L3 cache or
// memory; a GEMM of fewer is bound by that load. Winograd must be faster by a margin, because it is less accurate.
constexpr double transform_cost = 10, margin = 1.2;
constexpr int64_t l2_bytes = 1 << 20, l3_bytes = 24 << 20;
double pixels_per_weight(int64_t bytes) { return bytes <= l2_bytes ? 3 : bytes <= l3_bytes ? 8 : 16; }

// The taps along one side that do not fall into the padding, summed over all outputs.
int64_t count_taps(const nin_chain& chain, int side, int64_t size, int64_t out_size) {
  int64_t count = 0;
  for (const TapRange& taps : taps_inside_image(chain, side, size, out_size)) count += taps.count();
  return count;
}

}  // namespace

void transform_input_tiles(const Kernels& k, const nin_chain& chain, int64_t size, const ImageView& x,
                           const WinogradTiles& s, const PixelGrid& copy, const TransformedTiles& to) {
  const int64_t output_tile = size - chain.kernel[0] + 1;
  copy_padded(k, chain, x,
              {s.image, s.line - chain.padding[0], s.column - chain.padding[1],
               s.tiles_down * output_tile + chain.kernel[0] - 1, s.tiles_across * output_tile + chain.kernel[1] - 1},
              copy);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t line = i / s.tiles_across * output_tile, column = i % s.tiles_across * output_tile;
    const PixelGrid tile{copy.data + line * copy.line_stride + column * copy.pixel_stride, copy.pixel_stride,
                         copy.line_stride};
    k.input_transform(int(size), tile, chain.channels, reinterpret_cast<float*>(to.data + i * to.tile_stride),
                      to.component_stride);
  }
}

void Winograd::filter_transform_matrix(int64_t size, int64_t kernel, double* matrix) {
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

std::vector<float> Winograd::filter_transform_matrix(int64_t size, int64_t kernel) {
  std::vector<double> exact(size_t(size * kernel));
  filter_transform_matrix(size, kernel, exact.data());
  return {exact.begin(), exact.end()};
}

// Independent of the number of threads, as the choice changes the bits of the result.
int64_t Winograd::choose_tile_size(const Kernels& k, const nin_chain& chain, int64_t columns) {
  for (const int side : {0, 1}) {
    if (chain.stride[side] != 1 || chain.dilation[side] != 1) return 0;
  }
  const int64_t kernel = chain.kernel[0];
  if (kernel != chain.kernel[1] || kernel < min_kernel || kernel > max_kernel) return 0;
  if (std::min(chain.channels, columns) < min_channels) return 0;
  // direct convolution: dot products of bfloat16 pairs take less than half of float32's time, AMX a sixteenth
  const double speed = k.uses_amx ? 16 : k.tile_type == DataType::bf16 ? 2.25 : 1;
  double least =
      double(chain.batch * count_taps(chain, 0, chain.height, chain.out_height) *
             count_taps(chain, 1, chain.width, chain.out_width) * chain.channels * round_up(columns, k.lanes)) /
      speed / margin;
  int64_t best = 0;
  for (const int64_t size : tile_sizes) {
    if (size - kernel + 1 < 2) continue;
    const double cost = Winograd(k, chain, size, columns, 0, 1).cost();
    if (cost < least) least = cost, best = size;
  }
  return best;
}

Winograd::Winograd(const Kernels& k, const nin_chain& chain, int64_t size, int64_t columns, int64_t pixel_bytes,
                   int64_t threads)
    : k_(k), float_kernels_(*k.float_kernels), chain_(chain), tile_size_(size),
      output_tile_(size - chain.kernel[0] + 1), columns_(columns),
      tiles_down_(ceil_div(chain.out_height, output_tile_)), tiles_across_(ceil_div(chain.out_width, output_tile_)),
      tile_grid_() {
  const Panels panels(float_kernels_, columns, 1);
  copy_row_bytes_ = tile_row_bytes(k, chain.channels);
  input_tile_stride_ = tile_row_bytes(float_kernels_, chain.channels);
  const int64_t width_bytes = std::min(panels.width, round_up(columns, float_kernels_.lanes)) * 4;
  product_tile_stride_ = odd_cache_lines(size * size * width_bytes);
  const int64_t bytes = weight_bytes() > l2_bytes ? large_weights_max_task_bytes : max_task_bytes;
  const int64_t hidden_bytes = std::max<int64_t>(1, output_tile_ * output_tile_ * pixel_bytes);
  const int64_t max_tiles = std::max<int64_t>(
      1, std::min(bytes / (size * size * input_tile_stride_ + product_tile_stride_), max_hidden_bytes / hidden_bytes));
  const int64_t image_tiles = tiles_down_ * tiles_across_;
  const bool stacked = chain.y_stride[0] == chain.out_height * chain.y_stride[2];
  whole_images_ = stacked && chain.batch > 1 && 2 * image_tiles <= max_tiles;
  if (whole_images_) {
    tile_grid_ = make_tile_grid(1, chain.batch, 1, max_tiles / image_tiles, threads);
    max_tiles_ = tile_grid_.lines * image_tiles;
  } else {
    tile_grid_ = make_tile_grid(chain.batch, tiles_down_, tiles_across_, max_tiles, threads);
    max_tiles_ = tile_grid_.lines * tile_grid_.columns;
  }
  const int64_t lines = whole_images_ ? tiles_down_ : tile_grid_.lines,
                across = whole_images_ ? tiles_across_ : tile_grid_.columns;
  copy_line_stride_ = (across * output_tile_ + chain.kernel[1] - 1) * copy_row_bytes_;
  copy_bytes_ = round_up((lines * output_tile_ + chain.kernel[0] - 1) * copy_line_stride_ + 64, 64);
  input_component_stride_ = odd_cache_lines(max_tiles_ * input_tile_stride_);
  product_component_stride_ = width_bytes;
  transformed_bytes_ = size * size * input_component_stride_;
  products_bytes_ = max_tiles_ * product_tile_stride_;
}

// The estimated time, in float32 multiply-adds.
double Winograd::cost() const {
  const double components = double(tile_size_ * tile_size_), tiles = double(chain_.batch * tiles_down_ * tiles_across_);
  const double wait = std::max(1.0, pixels_per_weight(weight_bytes()) / max_tiles_);
  const double channels = double(round_up(chain_.channels, float_kernels_.lanes));
  const double columns = double(round_up(columns_, float_kernels_.lanes));
  return tiles * components * (wait * chain_.channels * columns + transform_cost * (channels + columns));
}

Tile Winograd::tile(int64_t task) const {
  Tile t = tile_at(tile_grid_, task);
  if (whole_images_) return {t.line, 0, 0, t.lines * chain_.out_height, chain_.out_width};
  t.line *= output_tile_, t.column *= output_tile_;
  t.lines = std::min(t.lines * output_tile_, chain_.out_height - t.line);
  t.columns = std::min(t.columns * output_tile_, chain_.out_width - t.column);
  return t;
}

void Winograd::run(const Tile& t, const ImageView& x, const void* weight, const Epilogue& epilogue,
                   const PixelGrid& out, const Panels& part, char* scratch) const {
  char *components = scratch + copy_bytes_, *products = components + transformed_bytes_;
  const int64_t count = images(t), lines = t.lines / count;
  const int64_t down = ceil_div(lines, output_tile_), across = ceil_div(t.columns, output_tile_);
  const int64_t tiles = count * down * across, groups = ceil_div(tiles, float_kernels_.max_rows);
  for (int64_t i = 0; i < count; ++i) {
    transform_input_tiles(
        k_, chain_, tile_size_, x, {t.image + i, t.line, t.column, down, across},
        {scratch, copy_row_bytes_, copy_line_stride_},
        {components + i * down * across * input_tile_stride_, input_tile_stride_, input_component_stride_});
  }
  static constexpr int64_t no_offset = 0;
  const Panels panels(float_kernels_, columns_, tile_size_ * tile_size_ * chain_.channels);
  GemmArguments args;
  args.a_row_stride = input_tile_stride_;
  args.tap_offsets = &no_offset, args.tap_count = 1, args.k_steps = chain_.channels;
  args.epilogue.out_row_stride = product_tile_stride_;
  args.epilogue.zero_tail = true;
  for (int64_t j = part.begin; j < part.end; ++j) {
    const int vectors = panels.vectors(float_kernels_, j);
    const int64_t width = vectors * float_kernels_.lanes, weights = chain_.channels * width * 4;
    const char* panel = static_cast<const char*>(weight) + j * panels.full_bytes;
    args.columns = width;
    args.prefetch_bytes_per_step = width * 4 / groups;
    for (int64_t component = 0; component < tile_size_ * tile_size_; ++component, panel += weights) {
      args.panel = panel;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = tiles * g / groups;
        args.a = components + component * input_component_stride_ + first * input_tile_stride_;
        args.epilogue.out = products + component * product_component_stride_ + first * product_tile_stride_;
        args.prefetch = panel + weights + weights * g / groups;
        float_kernels_.gemm(args, int(tiles * (g + 1) / groups - first), vectors);
      }
    }
    const int64_t from = j * panels.width;
    Epilogue panel_epilogue = epilogue;
    if (epilogue.bias) panel_epilogue.bias = epilogue.bias + from;
    const int64_t channels = std::min(panels.width, panels.columns - from);
    const char* product = products;
    for (int64_t i = 0; i < count * down; ++i) {
      const int64_t below = i % down * output_tile_, line = i / down * lines + below;  // of the image, of the task
      for (int64_t column = 0; column < t.columns; column += output_tile_, product += product_tile_stride_) {
        char* at =
            out.data + line * out.line_stride + column * out.pixel_stride + from * element_size(epilogue.out_type);
        k_.output_transform(int(tile_size_), int(output_tile_), reinterpret_cast<const float*>(product),
                            product_component_stride_, panel_epilogue, {at, out.pixel_stride, out.line_stride},
                            int(std::min(output_tile_, lines - below)), int(std::min(output_tile_, t.columns - column)),
                            channels);
      }
    }
  }
}

}  // namespace nin

void nin_winograd_weights(int64_t size, int64_t kernel, double* matrix) {
  nin::Winograd::filter_transform_matrix(size, kernel, matrix);
}

int64_t nin_winograd_size(const void* kernels, const nin_chain* chain, int64_t columns) {
  return nin::Winograd::choose_tile_size(*static_cast<const nin::Kernels*>(kernels), *chain, columns);
}
