// Where Winograd's transforms would lose what a sum over the taps keeps. They mix all pixels of a tile, so the rounding
// errors of the largest reach every output, also those whose taps do not read it; a NaN or an infinity does too. Such
// tiles are found by the magnitudes of their pixels, and computed tap by tap.
//
// Magnitudes are the bits of positive floats: they compare as the floats do, and their differences are close to those of
// the logarithms to base 2, times 2^23.
#pragma once

#include "winograd.hpp"

namespace nin {

// A copied window's pixels: their magnitudes over all channels; -1 in the padding around the image.
struct PixelMagnitudes {
  int32_t* data;
  int64_t line_stride;
  int32_t smallest = INT32_MAX, largest = 0;  // of all in the image

  static int64_t line_stride_of(int64_t columns) { return round_up(columns, 16); }
  // with room for what Kernels::pixel_magnitudes writes past the end
  static int64_t bytes(int64_t lines, int64_t columns) { return lines * line_stride_of(columns) * 4 + 64; }
  const int32_t* at(int64_t line, int64_t column) const { return data + line * line_stride + column; }
};

PixelMagnitudes measure_pixels(const Kernels& k, const nin_chain& chain, const Window& window, const PixelGrid& copy,
                               int32_t* memory);

// Returns the range of inputs for which columns with these weights can be computed in the Winograd domain. It is empty
// where a weight is not finite, or much larger than the others of its column: an input of zero hides it from an output.
InputRange safe_inputs(const ColumnMagnitudes& columns, int64_t width);
// The inputs that are in both.
InputRange intersection(const InputRange& a, const InputRange& b);

// The largest of some of the pixels, and the mean of the logarithms of those that are not zero.
struct MagnitudeSummary {
  int32_t largest, typical;
};
MagnitudeSummary summarize(const PixelMagnitudes& magnitudes, int64_t line, int64_t column, int64_t lines,
                           int64_t columns);

// Whether no tile among these pixels has an outlier: what holds for nearly all, and is known at once.
bool are_alike(const PixelMagnitudes& magnitudes);

// Returns the mark of a tile of the forward pass: `by_taps` if it has an outlier, or an output's taps read values that
// are much smaller than the largest of the tile, or that is out of range; else the set of those outputs, of
// lines × columns, whose taps read nothing but zeros.
TileMark mark_tile(const PixelMagnitudes& magnitudes, int64_t line, int64_t column, int size, int kernel, int lines,
                   int columns, const InputRange& range);

// Whether a tile's part of a weight gradient is to be computed tap by tap. Its sums mix those of all tiles, so what is
// typical is taken from those around it.
bool loses_digits(const MagnitudeSummary& input, const MagnitudeSummary& gradient);

}  // namespace nin
