// The maps of a layer's channels: a filter's products at a pixel, in float64, drawing, correlation.

import { mean } from "./maths.js";

// input: {shape: [C, h, w], values}, weight: {shape: [F, C, k, k], values}. Returns C sums over the filter's window.
export function contributions(input, weight, { stride, padding }, filter, row, column) {
  const [channels, height, width] = input.shape;
  const k = weight.shape[2];
  const taken = new Float64Array(channels);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < k; i++) {
      for (let j = 0; j < k; j++) {
        const [r, s] = [row * stride + i - padding, column * stride + j - padding];
        if (r < 0 || r >= height || s < 0 || s >= width) continue;
        taken[c] += weight.values[((filter * channels + c) * k + i) * k + j] * input.values[(c * height + r) * width + s];
      }
    }
  }
  return taken;
}

export const channel = ({ shape, values }, c) => values.subarray(c * shape[1] * shape[2], (c + 1) * shape[1] * shape[2]);

// The pixel of a map at a place given as fractions of height and width.
export const pixelAt = ({ shape }, place) => [Math.floor(place[0] * shape[1]), Math.floor(place[1] * shape[2])];

// Orange for positive, blue for negative, on transparent ground.
export function drawMap(canvas, values, height, width, limit) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  values.forEach((value, i) => {
    const alpha = 235 * Math.min(1, Math.abs(value) / limit);
    image.data.set(value > 0 ? [213, 94, 0, alpha] : [0, 114, 178, alpha], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The channel of another output whose map correlates most with a channel's over the pixels; the other map is resized
// where it has more or fewer pixels.
export function mostAlike(base, chosen, other) {
  const [, height, width] = base.shape;
  const pixels = Array.from({ length: height * width }, (_, p) => {
    const [row, column] = pixelAt(other, [(Math.floor(p / width) + 0.5) / height, ((p % width) + 0.5) / width]);
    return row * other.shape[2] + column;
  });
  const map = channel(base, chosen);
  let best = { channel: 0, correlation: -1 };
  for (let c = 0; c < other.shape[0]; c++) {
    const values = channel(other, c);
    const found = correlation(map, pixels.map((p) => values[p]));
    if (found > best.correlation) best = { channel: c, correlation: found };
  }
  return best;
}

// 0 where one of them is the same everywhere.
function correlation(a, b) {
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  a.forEach((value, i) => {
    ab += (value - ma) * (b[i] - mb);
    aa += (value - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  });
  return aa && bb ? ab / Math.sqrt(aa * bb) : 0;
}
