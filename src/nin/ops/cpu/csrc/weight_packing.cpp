// Weight packing: panels of columns, each ordered by tap, channel and column, as the GEMM reads them.
#include <cstring>
#include <new>

#include "dynamic_range.hpp"
#include "parallel.hpp"

namespace nin {
namespace {

int64_t packed_bytes(const Kernels& k, const nin_weight_view& w) {
  return Panels(k, w.columns, w.height * w.width * k_steps_of(k, w.channels)).bytes(k);
}

// Packs one tap's weights for some columns: a row for each channel, or pair of channels.
void pack_tap(const Kernels& k, const nin_weight_view& w, const char* data, int64_t columns, char* rows, int64_t row) {
  char* at = const_cast<char*>(data);
  const int64_t size = element_size(DataType(w.type)), column = w.column_stride * size,
                channel = w.channel_stride * size;
  // this transposes: the columns take the place of a tile's channels, the channels that of its pixels
  if (k.tile_type == DataType::f32)
    return k.load({at, column, channel, DataType(w.type), columns, w.channels}, rows, row);
  int64_t packed = 0;
  if (channel == size) {  // contiguous channels: a pair moves as one value of four bytes
    k.load({at, column, 2 * size, DataType::f32, columns, w.channels / 2}, rows, row);
    packed = w.channels / 2 * 2;
  } else if (column == size && columns % k.lanes == 0) {
    return k.interleave_pixel_pairs(at, channel, w.channels, columns, rows, row);
  }
  for (int64_t c = packed; c < w.channels; ++c) {
    for (int64_t j = 0; j < columns; ++j) {
      std::memcpy(rows + c / 2 * row + (2 * j + c % 2) * size, at + c * channel + j * column, size);
    }
  }
}

void pack(const Kernels& k, const nin_weight_view& w, const char* data, char* packed) {
  const int64_t size = element_size(DataType(w.type)), tap_steps = k_steps_of(k, w.channels);
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

WinogradWeights winograd_weights(const Kernels& k, const nin_weight_view& w, int64_t size) {
  return WinogradWeights(k, size, w.height, w.channels, w.columns);
}

// Packs each panel, and writes its filter transform G w Gᵀ.
nin_status pack_winograd(const Kernels& k, const nin_weight_view& w, int64_t size, const char* data, char* packed,
                         const nin_thread_pool& pool) {
  const WinogradWeights to = winograd_weights(k, w, size);
  const Panels& panels = to.components;
  const std::vector<float> matrix = Winograd::filter_transform_matrix(size, w.height);
  std::vector<InputRange> ranges(size_t(panels.count));
  const nin_status status = run_tasks(pool, panels.count, 1, [&](int64_t panel, char*) {
    const int vectors = panels.vectors(k, panel);
    const int64_t first = panel * panels.width, width = vectors * k.lanes, count = w.channels * width;
    nin_weight_view part = w;
    part.columns = std::min(panels.width, w.columns - first);
    auto* const taps = reinterpret_cast<float*>(packed + to.taps_offset + panel * to.taps.full_bytes);
    pack(k, part, data + first * w.column_stride * element_size(DataType(w.type)), reinterpret_cast<char*>(taps));
    ColumnMagnitudes magnitudes;
    k.column_magnitudes(taps, w.height * w.width * w.channels, vectors, magnitudes);
    ranges[size_t(panel)] = safe_inputs(magnitudes, width);
    k.filter_transform(int(size), int(w.height), matrix.data(), taps, count * 4,
                       reinterpret_cast<float*>(packed + panel * panels.full_bytes), count * 4, count);
  });
  InputRange range = all_inputs;
  for (const InputRange& other : ranges) range = intersection(range, other);
  std::memcpy(packed + to.range_offset, &range, sizeof range);
  return status;
}

}  // namespace
}  // namespace nin

int64_t nin_packed_bytes(const void* kernels, const nin_weight_view* weight) {
  return nin::packed_bytes(*static_cast<const nin::Kernels*>(kernels), *weight);
}

void nin_pack(const void* kernels, const nin_weight_view* weight, const void* data, void* packed) {
  nin::pack(*static_cast<const nin::Kernels*>(kernels), *weight, static_cast<const char*>(data),
            static_cast<char*>(packed));
}

int64_t nin_winograd_packed_bytes(const void* kernels, const nin_weight_view* weight, int64_t size) {
  return nin::winograd_weights(*static_cast<const nin::Kernels*>(kernels), *weight, size).bytes();
}

int32_t nin_winograd_pack(const void* kernels, const nin_weight_view* weight, int64_t size, const void* data,
                          void* packed, const nin_thread_pool* pool) {
  try {
    return nin::pack_winograd(*static_cast<const nin::Kernels*>(kernels), *weight, size, static_cast<const char*>(data),
                              static_cast<char*>(packed), *pool);
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}

int32_t nin_hash(const void* kernels, const nin_bytes* blocks, int64_t count, uint64_t* hashes,
                 const nin_thread_pool* pool) {
  const auto& k = *static_cast<const nin::Kernels*>(kernels);
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += blocks[i].bytes;
  // The pieces do not depend on the number of threads, so neither does the hash. Few bytes are read faster than a
  // thread is woken.
  constexpr int64_t piece = 128 << 10, least_parallel_bytes = 512 << 10;
  try {
    std::vector<nin_bytes> pieces;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t at = 0; at < blocks[i].bytes; at += piece) {
        pieces.push_back({static_cast<const char*>(blocks[i].data) + at, std::min(piece, blocks[i].bytes - at)});
      }
    }
    std::vector<uint64_t> piece_hashes(pieces.size());
    // Many small blocks: the processor does not foresee where the next lies.
    constexpr size_t ahead = 4;
    const auto fetch = [](const nin_bytes& block) {
      for (int64_t at = 0; at < std::min<int64_t>(block.bytes, 4096); at += 64) {
        __builtin_prefetch(static_cast<const char*>(block.data) + at);
      }
    };
    const nin_thread_pool alone{nullptr, 1};
    const nin_status status =
        nin::run_tasks(bytes < least_parallel_bytes ? alone : *pool, int64_t(pieces.size()), 0, [&](int64_t i, char*) {
          if (size_t(i) + ahead < pieces.size()) fetch(pieces[size_t(i) + ahead]);
          piece_hashes[i] = k.hash(static_cast<const char*>(pieces[i].data), pieces[i].bytes);
        });
    for (int64_t i = 0, p = 0; i < count; ++i) {
      const int64_t end = p + (blocks[i].bytes + piece - 1) / piece;
      hashes[i] = k.hash(reinterpret_cast<const char*>(piece_hashes.data() + p), (end - p) * 8);
      p = end;
    }
    return status;
  } catch (const std::bad_alloc&) {
    return nin_out_of_memory;
  }
}
