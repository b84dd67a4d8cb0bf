// Convolutions by Winograd's minimal filtering: a square of size × size pixels, taken apart into as many frequencies,
// needs one product of channels a frequency for block × block results, block = size - kernel + 1, where the taps one by
// one need kernel² for each result: 64 instead of 400 for blocks of 4 × 4 and 5 × 5 taps.
// S. Winograd, "Arithmetic Complexity of Computations" (1980); for convolutions A. Lavin and S. Gray, "Fast Algorithms
// for Convolutional Neural Networks" (2016), from which the names Aᵀ, Bᵀ and G of the transforms are.
#pragma once

#include "tiles.hpp"

namespace nin {

// Bytes between two frequencies: an odd number of cache lines, so that they fall into different sets of the caches.
inline int64_t odd_lines(int64_t bytes) { return round_up(bytes, 64) | 64; }

// Squares of one image, beside and below each other: `line` and `column` are those of the first one's results.
struct Squares {
  int64_t image, line, column;
  int64_t down, across;

  int64_t count() const { return down * across; }
};

// Where frequencies lie: bytes from one square's to the next one's, and from one frequency to the next.
struct Frequencies {
  char* at;
  int64_t square, frequency;
};

// What the squares reach, with zeros around the image, is copied to `copy` and from there taken apart.
void take_apart(const Kernels& k, const nin_problem& p, int64_t size, const Images& x, const Squares& squares,
                const Grid& copy, const Frequencies& to);

class Winograd {
 public:
  // The size of square that is fastest for a problem, or 0 where its taps one by one are.
  static int64_t choose_size(const Kernels& k, const nin_problem& p, int64_t columns);
  // G, size × kernel: what a tap is worth at 0, at the points and at infinity, over the denominators of the Lagrange
  // polynomials. Weights are transformed with it, on both sides, before they are packed.
  static void weights_matrix(int64_t size, int64_t kernel, double* matrix);
  static std::vector<float> weights_matrix(int64_t size, int64_t kernel);

  // `pixel_bytes`: scratch that the layers behind it take for a pixel.
  Winograd(const Kernels& k, const nin_problem& p, int64_t size, int64_t columns, int64_t pixel_bytes, int64_t threads);

  int64_t tasks() const { return cut_.tiles(); }
  // The pixels of a task. Of several images, all of whose lines are `lines`, one below the other.
  Tile tile(int64_t task) const;
  int64_t most_pixels() const { return most_squares_ * block_ * block_; }
  int64_t weight_bytes() const { return size_ * size_ * p_.channels * columns_ * 4; }
  int64_t scratch_bytes() const { return copy_bytes_ + frequencies_bytes_ + products_bytes_; }
  // `out`: where the tile's first pixel goes. `finish`: bias, activation and type of all columns. `part`: the panels.
  void run(const Tile& t, const Images& x, const void* weight, const Finish& finish, const Grid& out,
           const Panels& part, char* scratch) const;

 private:
  double cost() const;
  int64_t images(const Tile& t) const { return whole_images_ ? t.lines / p_.out_height : 1; }

  const Kernels& k_;       // for the images and the transforms
  const Kernels& floats_;  // for the products
  nin_problem p_;
  int64_t size_, block_, columns_;
  int64_t down_, across_;              // squares of an image
  bool whole_images_ = false;          // a task takes some of them, else squares of one
  Cut cut_;                            // of images, or of squares
  int64_t most_squares_ = 0;           // of a task
  int64_t copy_row_, copy_line_ = 0;   // bytes between pixels, and lines, of the input's copy
  int64_t row_, step_ = 0;             // between squares, and frequencies, of the input
  int64_t products_row_, products_step_ = 0;
  int64_t copy_bytes_ = 0, frequencies_bytes_ = 0, products_bytes_ = 0;
};

}  // namespace nin
