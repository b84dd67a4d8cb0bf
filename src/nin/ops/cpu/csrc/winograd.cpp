// When a convolution runs in the Winograd domain, how its tiles are divided into tasks, and the forward pass.
#include "winograd.hpp"

#include "dynamic_range.hpp"

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

Window input_window(const nin_chain& chain, int64_t size, const WinogradTiles& s) {
  const int64_t output_tile = size - chain.kernel[0] + 1;
  return {s.image, s.line - chain.padding[0], s.column - chain.padding[1],
          s.tiles_down * output_tile + chain.kernel[0] - 1, s.tiles_across * output_tile + chain.kernel[1] - 1};
}

void transform_input_tiles(const Kernels& k, const nin_chain& chain, int64_t size, const WinogradTiles& s,
                           const PixelGrid& copy, const TileMark* marks, const TransformedTiles& to) {
  const int64_t output_tile = size - chain.kernel[0] + 1;
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t line = i / s.tiles_across * output_tile, column = i % s.tiles_across * output_tile;
    const PixelGrid tile{copy.data + line * copy.line_stride + column * copy.pixel_stride, copy.pixel_stride,
                         copy.line_stride};
    char* components = to.data + i * to.tile_stride;
    if (marks[i] != by_taps) {
      k.input_transform(int(size), tile, chain.channels, reinterpret_cast<float*>(components), to.component_stride);
      continue;
    }
    for (int64_t j = 0; j < size; ++j) {
      k.float_kernels->load({tile.data + j * tile.line_stride, element_size(k.tile_type), tile.pixel_stride,
                             k.tile_type, chain.channels, size},
                            components + j * size * to.component_stride, to.component_stride);
    }
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
    across_ = tiles_across_;
    max_tiles_ = tile_grid_.lines * image_tiles;
  } else {
    tile_grid_ = make_tile_grid(chain.batch, tiles_down_, tiles_across_, max_tiles, threads);
    // Lines of some widths divide into tasks of one tile fewer. They get as much scratch, so that it does not grow with
    // the images.
    across_ = tile_grid_.lines == 1 ? std::min(max_tiles, tiles_across_) : tile_grid_.columns;
    max_tiles_ = tile_grid_.lines * across_;
  }
  const int64_t lines = (whole_images_ ? tiles_down_ : tile_grid_.lines) * output_tile_ + chain.kernel[0] - 1,
                across = across_ * output_tile_ + chain.kernel[1] - 1;
  copy_line_stride_ = across * copy_row_bytes_;
  copy_bytes_ = round_up(lines * copy_line_stride_ + 64, 64);
  magnitudes_bytes_ = round_up(PixelMagnitudes::bytes(lines, across), 64);
  marks_bytes_ = round_up(max_tiles_ * int64_t(sizeof(TileMark)), 64);
  input_component_stride_ = odd_cache_lines(max_tiles_ * input_tile_stride_);
  product_component_stride_ = width_bytes;
  transformed_bytes_ = size * size * input_component_stride_;
  products_bytes_ = max_tiles_ * product_tile_stride_;
  for (int64_t i = 0; i < chain.kernel[0]; ++i) {
    for (int64_t j = 0; j < chain.kernel[1]; ++j) tap_offsets_.push_back((i * size + j) * input_component_stride_);
  }
}

// The estimated time, in float32 multiply-adds.
double Winograd::cost() const {
  const double components = double(tile_size_ * tile_size_), tiles = double(chain_.batch * tiles_down_ * tiles_across_);
  const int64_t task_tiles = whole_images_ ? max_tiles_ : tile_grid_.lines * tile_grid_.columns;
  const double wait = std::max(1.0, pixels_per_weight(weight_bytes()) / double(task_tiles));
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

// Marks the tiles of an image, whose input is in `copy`. `t`: the task's pixels.
void Winograd::mark_tiles(const WinogradTiles& tiles, const Tile& t, const PixelGrid& copy, const InputRange& range,
                          int32_t* memory, TileMark* marks) const {
  const PixelMagnitudes magnitudes =
      measure_pixels(k_, chain_, input_window(chain_, tile_size_, tiles), copy, memory);
  if (are_alike(magnitudes) && magnitudes.largest <= range.largest && magnitudes.smallest >= range.smallest) {
    std::fill(marks, marks + tiles.count(), TileMark(0));
    return;
  }
  const int64_t lines = t.lines / images(t);
  for (int64_t i = 0; i < tiles.count(); ++i) {
    const int64_t line = i / tiles.tiles_across * output_tile_, column = i % tiles.tiles_across * output_tile_;
    marks[i] = mark_tile(magnitudes, line, column, int(tile_size_), int(chain_.kernel[0]),
                         int(std::min(output_tile_, lines - line)), int(std::min(output_tile_, t.columns - column)),
                         range);
  }
}

// Computes one panel's columns of a tile tap by tap. `pixels`: the tile's components, which are its pixels.
void Winograd::convolve(const char* pixels, const char* panel, int vectors, const Epilogue& epilogue,
                        const PixelGrid& out, int lines, int columns, int64_t channels) const {
  GemmArguments args;
  args.a_row_stride = input_component_stride_;
  args.tap_offsets = tap_offsets_.data(), args.tap_count = int64_t(tap_offsets_.size());
  args.k_steps = chain_.channels;
  args.panel = panel;
  args.columns = channels;
  args.epilogue = epilogue;
  args.epilogue.out_row_stride = out.pixel_stride;
  for (int line = 0; line < lines; ++line) {
    args.a = pixels + line * tile_size_ * input_component_stride_;
    args.epilogue.out = out.data + line * out.line_stride;
    float_kernels_.gemm(args, columns, vectors);
  }
}

// Writes outputs whose taps read zeros only: products of no taps.
void Winograd::set_zero_outputs(TileMark zeros, int vectors, const Epilogue& epilogue, const PixelGrid& out,
                                int64_t channels) const {
  GemmArguments args;
  args.a = args.prefetch = out.data;
  args.columns = channels;
  args.epilogue = epilogue;
  for (int line = 0; line < output_tile_; ++line) {
    for (int column = 0; column < output_tile_; ++column) {
      if (!(zeros & output_bit(line, column))) continue;
      args.epilogue.out = out.data + line * out.line_stride + column * out.pixel_stride;
      float_kernels_.gemm(args, 1, vectors);
    }
  }
}

void Winograd::run(const Tile& t, const ImageView& x, const void* weight, const Epilogue& epilogue,
                   const PixelGrid& out, const Panels& part, char* scratch) const {
  char* magnitudes = scratch + copy_bytes_;
  auto* const marks = reinterpret_cast<TileMark*>(magnitudes + magnitudes_bytes_);
  char *components = magnitudes + magnitudes_bytes_ + marks_bytes_, *products = components + transformed_bytes_;
  const WinogradWeights packed(float_kernels_, tile_size_, chain_.kernel[0], chain_.channels, columns_);
  const char* weights_at = static_cast<const char*>(weight);
  InputRange range;
  std::memcpy(&range, weights_at + packed.range_offset, sizeof range);
  const int64_t count = images(t), lines = t.lines / count;
  const int64_t down = ceil_div(lines, output_tile_), across = ceil_div(t.columns, output_tile_);
  const int64_t tiles = count * down * across, groups = ceil_div(tiles, float_kernels_.max_rows);
  for (int64_t i = 0; i < count; ++i) {
    const WinogradTiles s{t.image + i, t.line, t.column, down, across};
    const PixelGrid copy{scratch, copy_row_bytes_, copy_line_stride_};
    const int64_t first = i * s.count();
    copy_padded(k_, chain_, x, input_window(chain_, tile_size_, s), copy);
    mark_tiles(s, t, copy, range, reinterpret_cast<int32_t*>(magnitudes), marks + first);
    transform_input_tiles(k_, chain_, tile_size_, s, copy, marks + first,
                          {components + first * input_tile_stride_, input_tile_stride_, input_component_stride_});
  }
  const bool transformed = std::any_of(marks, marks + tiles, [](TileMark mark) { return mark != by_taps; });
  static constexpr int64_t no_offset = 0;
  const Panels& panels = packed.components;
  GemmArguments args;
  args.a_row_stride = input_tile_stride_;
  args.tap_offsets = &no_offset, args.tap_count = 1, args.k_steps = chain_.channels;
  args.epilogue.out_row_stride = product_tile_stride_;
  args.epilogue.zero_tail = true;
  for (int64_t j = part.begin; j < part.end; ++j) {
    const int vectors = panels.vectors(float_kernels_, j);
    const int64_t width = vectors * float_kernels_.lanes, weights = chain_.channels * width * 4;
    const char* panel = weights_at + j * panels.full_bytes;
    args.columns = width;
    args.prefetch_bytes_per_step = width * 4 / groups;
    for (int64_t component = 0; transformed && component < tile_size_ * tile_size_; ++component, panel += weights) {
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
    panel_epilogue.non_temporal = false, panel_epilogue.out_row_stride = out.pixel_stride;
    int64_t tile = 0;
    for (int64_t i = 0; i < count * down; ++i) {
      const int64_t below = i % down * output_tile_, line = i / down * lines + below;  // of the image, of the task
      for (int64_t column = 0; column < t.columns; column += output_tile_, ++tile) {
        const PixelGrid to{
            out.data + line * out.line_stride + column * out.pixel_stride + from * element_size(epilogue.out_type),
            out.pixel_stride, out.line_stride};
        const int tile_lines = int(std::min(output_tile_, lines - below)),
                  tile_columns = int(std::min(output_tile_, t.columns - column));
        if (marks[tile] == by_taps) {
          convolve(components + tile * input_tile_stride_, weights_at + packed.taps_offset + j * packed.taps.full_bytes,
                   vectors, panel_epilogue, to, tile_lines, tile_columns, channels);
          continue;
        }
        k_.output_transform(int(tile_size_), int(output_tile_),
                            reinterpret_cast<const float*>(products + tile * product_tile_stride_),
                            product_component_stride_, panel_epilogue, to, tile_lines, tile_columns, channels);
        if (marks[tile]) set_zero_outputs(marks[tile], vectors, panel_epilogue, to, channels);
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
