// A depthwise convolution by itself. A task takes some lines of a panel of channels: it copies those that they look at
// to scratch memory as floats, with zeros beside them, where the kernel finds the channels of a panel together.
#include "depthwise_layer.hpp"

namespace nin {
namespace {

// Scratch of a task: half of the smallest usual L2 cache. The lines at its end are copied again by the next task.
constexpr int64_t max_task_bytes = 128 << 10;

class DepthwiseLayer {
 public:
  DepthwiseLayer(const Kernels& k, const nin_chain& chain, const nin_layer& layer, const void* x, void* y);
  nin_status run(const nin_thread_pool& pool) const;

 private:
  int64_t window(int64_t lines) const {
    return (lines - 1) * chain_.stride[0] + chain_.dilation[0] * (chain_.kernel[0] - 1) + 1;
  }
  int64_t bytes(int64_t lines) const { return window(lines) * line_bytes_ + chain_.out_width * pixel_bytes_; }
  void run_lines(int64_t image, int64_t panel, int64_t first, int64_t last, char* scratch) const;

  const Kernels& k_;
  const nin_chain& chain_;
  DataType type_;  // of x and y
  ImageView x_, y_;
  std::vector<Layer> layers_;
  Panels panels_;
  std::vector<TapRange> line_taps_;                 // lines of taps inside the image, by output line
  int64_t pixel_bytes_, line_pixels_, line_bytes_;  // of a panel's pixel and line
  int64_t lines_ = 1;                               // output lines of a task
};

nin_chain with_one_layer(nin_chain chain) {
  chain.layers = 1;
  return chain;
}

DepthwiseLayer::DepthwiseLayer(const Kernels& k, const nin_chain& chain, const nin_layer& layer, const void* x, void* y)
    : k_(k),
      chain_(chain),
      type_(DataType(chain.type)),
      x_(image_view(x, chain.x_stride, element_size(type_))),
      y_(image_view(y, chain.y_stride, element_size(type_))),
      layers_(read_layers(k, with_one_layer(chain), &layer)),
      panels_(k, chain.channels, chain.kernel[0] * chain.kernel[1]),
      line_taps_(taps_inside_image(chain, 0, chain.height, chain.out_height)),
      pixel_bytes_(panels_.width * 4),
      line_pixels_((chain.out_width - 1) * chain.stride[1] + chain.dilation[1] * (chain.kernel[1] - 1) + 1),
      line_bytes_(line_pixels_ * pixel_bytes_) {
  while (lines_ < chain.out_height && bytes(lines_ + 1) <= max_task_bytes) ++lines_;
}

void DepthwiseLayer::run_lines(int64_t image, int64_t panel, int64_t first, int64_t last, char* scratch) const {
  const Layer& layer = layers_[0];
  const int64_t channel = panel * panels_.width, top = first * chain_.stride[0] - chain_.padding[0];
  const int vectors = panels_.vectors(k_, panel);
  nin_chain part = chain_;
  part.channels = std::min(panels_.width, chain_.channels - channel);
  ImageView x = x_;
  x.data += channel * x_.c_stride;
  copy_padded(*k_.float_kernels, part, x, {image, top, -chain_.padding[1], window(last - first), line_pixels_},
              {scratch, pixel_bytes_, line_bytes_});
  std::vector<const char*> lines(size_t(chain_.kernel[0]), nullptr);
  char* const out = scratch + window(last - first) * line_bytes_;
  const bool writes_in_place = y_.c_stride == element_size(type_) && part.channels == vectors * k_.lanes;
  DepthwiseArguments args;
  args.lines = lines.data();
  args.bias = layer.bias.empty() ? nullptr : layer.bias.data() + channel;
  args.activation = layer.activation;
  args.taps = chain_.kernel[1], args.stride = chain_.stride[1], args.dilation = chain_.dilation[1];
  args.columns = chain_.out_width;
  args.out_type = type_;
  for (int64_t line = first; line < last; ++line) {
    const TapRange inside = line_taps_[size_t(line)];
    for (int64_t tap = inside.first; tap < inside.last; ++tap) {
      const int64_t at = (line - first) * chain_.stride[0] + tap * chain_.dilation[0];
      lines[size_t(tap - inside.first)] = scratch + at * line_bytes_;
    }
    args.line_count = inside.count();
    args.weights = static_cast<const float*>(layer.weight) +
                   (panel * chain_.kernel[0] * panels_.width + inside.first * vectors * k_.lanes) * chain_.kernel[1];
    char* const to = y_.pixel(image, line, 0) + channel * y_.c_stride;
    args.out = writes_in_place ? to : out;
    args.out_row_stride = writes_in_place ? y_.w_stride : pixel_bytes_;
    k_.depthwise(args, vectors);
    if (!writes_in_place) {
      k_.store({to, y_.c_stride, y_.w_stride, type_, part.channels, chain_.out_width}, out, pixel_bytes_);
    }
  }
}

nin_status DepthwiseLayer::run(const nin_thread_pool& pool) const {
  const int64_t parts = ceil_div(chain_.out_height, lines_);
  return run_tasks(pool, chain_.batch * panels_.count * parts, size_t(bytes(lines_)), [&](int64_t task, char* scratch) {
    const int64_t part = task % parts, panel = task / parts % panels_.count;
    run_lines(task / parts / panels_.count, panel, chain_.out_height * part / parts,
              chain_.out_height * (part + 1) / parts, scratch);
  });
}

}  // namespace

nin_status depthwise_layer(const Kernels& k, const nin_chain& chain, const nin_layer& layer, const void* x, void* y,
                           const nin_thread_pool& pool) {
  return DepthwiseLayer(k, chain, layer, x, y).run(pool);
}

}  // namespace nin
