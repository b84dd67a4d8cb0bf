// Weights in the order in which the products read them: panels of columns, in each the taps, channels and columns.
#include <cstring>
#include <new>

#include "parallel.hpp"
#include "winograd.hpp"

namespace nin {
namespace {

int64_t packed_bytes(const Kernels& k, const nin_weight& w) {
  const Panels panels(k, w.columns, w.height * w.width * steps_of(k, w.channels));
  const int64_t last = panels.vectors(k, panels.count - 1) * panels.full_bytes / max_vectors;
  return (panels.count - 1) * panels.full_bytes + last;
}

// The weights of one tap for some columns: rows of channels, or of pairs of them, each with its columns side by side.
void pack_tap(const Kernels& k, const nin_weight& w, const char* data, int64_t columns, char* rows, int64_t row) {
  char* at = const_cast<char*>(data);
  const int64_t size = size_of(Type(w.type)), column = w.column_stride * size, channel = w.channel_stride * size;
  // a tile's pixels are the channels here, and its channels the columns
  if (k.type == Type::f32) return k.load({at, column, channel, Type(w.type), columns, w.channels}, rows, row);
  int64_t packed = 0;
  if (channel == size) {  // channels side by side: a pair of them moves as one value of four bytes
    k.load({at, column, 2 * size, Type::f32, columns, w.channels / 2}, rows, row);
    packed = w.channels / 2 * 2;
  } else if (column == size && columns % k.lanes == 0) {
    return k.pair_pixels(at, channel, w.channels, columns, rows, row);
  }
  for (int64_t c = packed; c < w.channels; ++c) {
    for (int64_t j = 0; j < columns; ++j) {
      std::memcpy(rows + c / 2 * row + (2 * j + c % 2) * size, at + c * channel + j * column, size);
    }
  }
}

void pack(const Kernels& k, const nin_weight& w, const char* data, char* packed) {
  const int64_t size = size_of(Type(w.type)), tap_steps = steps_of(k, w.channels);
  const Panels panels(k, w.columns, w.height * w.width * tap_steps);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.vectors(k, panel) * k.lanes, row = width * 4;
    const int64_t first = panel * panels.width, existing = std::min(width, w.columns - first);
    char* rows = packed + panel * panels.full_bytes;
    if (existing < width || padded_channels(k, w.channels) != w.channels) {
      std::memset(rows, 0, w.height * w.width * tap_steps * row);
    }
    for (int64_t tap = 0; tap < w.height * w.width; ++tap, rows += tap_steps * row) {
      const int64_t offset = tap / w.width * w.height_stride + tap % w.width * w.width_stride;
      pack_tap(k, w, data + (offset + first * w.column_stride) * size, existing, rows, row);
    }
  }
}

// A panel is packed as it is into scratch, and transformed from there to its place.
nin_status pack_transformed(const Kernels& k, const nin_weight& w, int64_t size, const char* data, char* packed,
                            const nin_pool& pool) {
  const Panels panels(k, w.columns, size * size * w.channels);
  const std::vector<float> matrix = Winograd::weights_matrix(size, w.height);
  const int64_t scratch_bytes = w.height * w.width * w.channels * panels.width * 4;
  return run_tasks(pool, panels.count, size_t(scratch_bytes), [&](int64_t panel, char* scratch) {
    const int64_t first = panel * panels.width, count = w.channels * panels.vectors(k, panel) * k.lanes;
    nin_weight part = w;
    part.columns = std::min(panels.width, w.columns - first);
    pack(k, part, data + first * w.column_stride * size_of(Type(w.type)), scratch);
    k.transform_sides(int(size), int(w.height), matrix.data(), reinterpret_cast<float*>(scratch), count * 4,
                      reinterpret_cast<float*>(packed + panel * panels.full_bytes), count * 4, count);
  });
}

}  // namespace
}  // namespace nin

int64_t nin_packed_bytes(const void* kernels, const nin_weight* weight) {
  return nin::packed_bytes(*static_cast<const nin::Kernels*>(kernels), *weight);
}

void nin_pack(const void* kernels, const nin_weight* weight, const void* data, void* packed) {
  nin::pack(*static_cast<const nin::Kernels*>(kernels), *weight, static_cast<const char*>(data),
            static_cast<char*>(packed));
}

int32_t nin_winograd_pack(const void* kernels, const nin_weight* weight, int64_t size, const void* data, void* packed,
                          const nin_pool* pool) {
  try {
    return nin::pack_transformed(*static_cast<const nin::Kernels*>(kernels), *weight, size,
                                 static_cast<const char*>(data), static_cast<char*>(packed), *pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}

uint64_t nin_sample(const void* data, int64_t bytes) {
  constexpr int64_t samples = 64;
  const int64_t words = bytes / 4, count = std::min(words, samples);
  uint64_t hash = 14695981039346656037u;  // FNV-1a's
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(data) + (words - 1) * i / std::max<int64_t>(1, count - 1) * 4, 4);
    hash = (hash ^ word) * 1099511628211u;
  }
  return hash;
}

uint64_t nin_hash(const void* data, int64_t bytes) {
  constexpr int lanes = 8;  // independent of each other, so that the processor works on all of them at once
  uint64_t hashes[lanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  const auto mix = [](uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
  };
  const char* at = static_cast<const char*>(data);
  const int64_t block = lanes * 8, whole = bytes / block * block;
  for (int64_t i = 0; i < whole; i += block) {
    uint64_t words[lanes];
    std::memcpy(words, at + i, block);
    for (int lane = 0; lane < lanes; ++lane) hashes[lane] = mix(hashes[lane], words[lane]);
  }
  uint64_t words[lanes] = {};
  std::memcpy(words, at + whole, bytes - whole);
  uint64_t hash = uint64_t(bytes);
  for (int lane = 0; lane < lanes; ++lane) hash = mix(hash, mix(hashes[lane], words[lane]));
  return hash;
}
