// Weights in the order in which the products read them: panels of columns, in each the taps, channels and columns.
#include <cstring>

#include "tiles.hpp"

namespace nin {
namespace {

int64_t packed_bytes(const Kernels& k, const nin_weight& w) {
  const Panels panels(k, w.columns, w.height * w.width * steps_of(k, w.channels));
  const int64_t last = panels.vectors(k, panels.count - 1) * panels.full_bytes / max_vectors;
  return (panels.count - 1) * panels.full_bytes + last;
}

// One value as the tiles have it.
void convert(const char* from, Type type, char* to, Type tile_type) {
  if (type == tile_type) {
    std::memcpy(to, from, size_of(type));
  } else {  // bfloat16 to float
    uint16_t half;
    std::memcpy(&half, from, 2);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(to, &bits, 4);
  }
}

void pack(const Kernels& k, const nin_weight& w, const char* data, char* packed) {
  const Type type = Type(w.type);
  const int64_t size = size_of(type), out_size = size_of(k.type), per_step = 4 / out_size;
  const int64_t channels = padded_channels(k, w.channels);
  const Panels panels(k, w.columns, w.height * w.width * steps_of(k, w.channels));
  std::memset(packed, 0, packed_bytes(k, w));
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.vectors(k, panel) * k.lanes;
    const int64_t first = panel * panels.width, existing = std::min(width, w.columns - first);
    char* row = packed + panel * panels.full_bytes;
    for (int64_t tap = 0; tap < w.height * w.width; ++tap, row += channels * width * out_size) {
      const char* at = data + (tap / w.width * w.height_stride + tap % w.width * w.width_stride) * size;
      for (int64_t c = 0; c < w.channels; ++c) {
        char* to = row + (c / per_step * width * per_step + c % per_step) * out_size;
        const char* from = at + (c * w.channel_stride + first * w.column_stride) * size;
        for (int64_t j = 0; j < existing; ++j) {
          convert(from + j * w.column_stride * size, type, to + j * 4, k.type);
        }
      }
    }
  }
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
