// Which tiles and weights hold numbers so far apart that the transforms would lose digits. The thresholds are from
// docs/kernels.md, which has the measurements.
#include "dynamic_range.hpp"

namespace nin {
namespace {

// Bits of the float 2^exponent, and of a ratio of 2^exponent.
constexpr int64_t float_bits(int exponent) { return int64_t(127 + exponent) << 23; }
constexpr int64_t ratio_bits(int exponent) { return int64_t(exponent) << 23; }
constexpr int64_t infinity_bits = float_bits(128);

// A tile's largest value over that of its typical pixel, and over the largest that an output's taps read. Over real
// images trained networks stay below: see docs/kernels.md.
constexpr int64_t max_tile_ratio = ratio_bits(4);
// The same over the typical pixel of some tiles, for the weight gradient.
constexpr int64_t max_summed_ratio = ratio_bits(5);
// A column's largest weight over its typical one; 29 was the largest of two trained networks.
constexpr int64_t max_weight_ratio = ratio_bits(8);
// Products of the largest values. The transforms' coefficients and the sums over channels may multiply them by 2^30; of
// smaller ones the components would be denormal, with fewer digits.
constexpr int64_t min_product = float_bits(-90), max_product = float_bits(96);
// The input and filter transforms themselves may multiply the largest by 2^10.
constexpr int64_t max_value = float_bits(116);

constexpr int max_size = 8;

}  // namespace

PixelMagnitudes measure_pixels(const Kernels& k, const nin_chain& chain, const Window& w, const PixelGrid& copy,
                               int32_t* memory) {
  PixelMagnitudes to{memory, PixelMagnitudes::line_stride_of(w.columns)};
  const auto [first, last] = columns_inside_image(chain, w);
  for (int64_t i = 0; i < w.lines; ++i) {
    int32_t* line = to.data + i * to.line_stride;
    const bool inside = w.top + i >= 0 && w.top + i < chain.height;
    if (inside) {  // may write into the next line, which comes next
      k.pixel_magnitudes(copy.data + i * copy.line_stride + first * copy.pixel_stride, copy.pixel_stride, last - first,
                         chain.channels, line + first);
      for (int64_t j = first; j < last; ++j) {
        to.smallest = std::min(to.smallest, line[j]);
        to.largest = std::max(to.largest, line[j]);
      }
    }
    std::fill(line, line + (inside ? first : w.columns), -1);
    std::fill(line + last, line + w.columns, -1);
  }
  return to;
}

InputRange safe_inputs(const ColumnMagnitudes& columns, int64_t width) {
  InputRange range = all_inputs;
  for (int64_t j = 0; j < width; ++j) {
    if (columns.counts[j] == 0) continue;
    const int64_t largest = columns.largest[j];
    const float root = columns.root_sums[j] / float(columns.counts[j]), typical = root * root;
    int32_t typical_bits;
    std::memcpy(&typical_bits, &typical, 4);
    if (largest >= max_value || largest - typical_bits > max_weight_ratio) return no_inputs;
    const auto limit = [&](int64_t product) {
      return int32_t(std::clamp<int64_t>(product - largest + float_bits(0), 0, max_value));
    };
    range = intersection(range, {limit(min_product), limit(max_product)});
  }
  return range;
}

InputRange intersection(const InputRange& a, const InputRange& b) {
  return {std::max(a.smallest, b.smallest), std::min(a.largest, b.largest)};
}

MagnitudeSummary summarize(const PixelMagnitudes& magnitudes, int64_t line, int64_t column, int64_t lines,
                           int64_t columns) {
  int32_t largest = 0;
  int64_t sum = 0, count = 0;
  for (int64_t i = 0; i < lines; ++i) {
    const int32_t* at = magnitudes.at(line + i, column);
    for (int64_t j = 0; j < columns; ++j) {
      const int32_t value = std::max(at[j], 0);
      largest = std::max(largest, value);
      sum += value, count += value > 0;
    }
  }
  return {largest, int32_t(sum / std::max<int64_t>(1, count))};
}

bool are_alike(const PixelMagnitudes& magnitudes) {
  return magnitudes.largest == 0 || magnitudes.largest - int64_t(magnitudes.smallest) <= max_tile_ratio;
}

TileMark mark_tile(const PixelMagnitudes& magnitudes, int64_t line, int64_t column, int size, int kernel, int lines,
                   int columns, const InputRange& range) {
  const int32_t* at = magnitudes.at(line, column);
  const int64_t stride = magnitudes.line_stride;
  int32_t largest = 0;
  uint32_t smallest = infinity_bits;  // unsigned, so that the padding's -1 is none
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      largest = std::max(largest, at[i * stride + j]);
      smallest = std::min(smallest, uint32_t(at[i * stride + j]));
    }
  }
  if (largest > range.largest || (largest > 0 && largest < range.smallest)) return by_taps;
  if (largest == 0 || largest - int64_t(smallest) <= max_tile_ratio) return 0;
  if (largest - summarize(magnitudes, line, column, size, size).typical > max_tile_ratio) return by_taps;
  int32_t across[max_size][max_size];  // the largest of each `kernel` pixels of a line
  for (int i = 0; i < lines + kernel - 1; ++i) {
    for (int j = 0; j < columns; ++j) {
      const int32_t* first = at + i * stride + j;
      across[i][j] = *std::max_element(first, first + kernel);
    }
  }
  TileMark zeros = 0;
  for (int i = 0; i < lines; ++i) {
    for (int j = 0; j < columns; ++j) {
      int32_t seen = 0;
      for (int a = 0; a < kernel; ++a) seen = std::max(seen, across[i + a][j]);
      if (seen == 0) {
        zeros |= output_bit(i, j);
      } else if (largest - seen > max_tile_ratio) {
        return by_taps;
      }
    }
  }
  return zeros;
}

bool loses_digits(const MagnitudeSummary& input, const MagnitudeSummary& gradient) {
  for (const MagnitudeSummary& tile : {input, gradient}) {
    if (tile.largest > max_value || tile.largest - tile.typical > max_summed_ratio) return true;
  }
  if (input.largest == 0 || gradient.largest == 0) return false;
  const int64_t product = int64_t(input.largest) + gradient.largest - float_bits(0);
  return product < min_product || product > max_product;
}

}  // namespace nin
