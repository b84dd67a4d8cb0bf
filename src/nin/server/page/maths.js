// The arithmetic of the lesson, in float64. Arrays are flat: channel by channel, row by row.

// Numbers that look random and are the same everywhere: mulberry32.
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Standard normal numbers, by Box and Muller.
export function normals(count, draw, scale = 1) {
  return Float64Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - draw()));
    return scale * radius * Math.cos(2 * Math.PI * draw());
  });
}

export const relu = (z) => (z > 0 ? z : 0);

// y[p] += sum over c of weights[c] x[c, p], in loops that engines compile well.
export function addProducts(y, weights, x) {
  const pixels = y.length;
  for (let c = 0; c < weights.length; c++) {
    const weight = weights[c];
    const start = c * pixels;
    for (let p = 0; p < pixels; p++) y[p] += weight * x[start + p];
  }
}

// y[f, p] = max(0, sum over c of weight[f, c] x[c, p] + bias[f]) for x (channels, pixels).
export function conv1x1(x, channels, weight, bias, activation = relu) {
  const pixels = x.length / channels;
  const filters = weight.length / channels;
  const y = new Float64Array(filters * pixels);
  for (let f = 0; f < filters; f++) {
    addProducts(y.subarray(f * pixels, (f + 1) * pixels).fill(bias ? bias[f] : 0), weight.slice(f * channels, (f + 1) * channels), x);
  }
  return y.map(activation);
}

// A k×k convolution of one channel with zeros around it, so that the size stays; k is odd. weight (filters, k * k).
export function convolve(x, height, width, weight, bias, k, activation = relu) {
  const filters = bias.length;
  const around = (k - 1) / 2;
  const y = new Float64Array(filters * height * width);
  for (let f = 0; f < filters; f++) {
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        let sum = bias[f];
        for (let i = 0; i < k; i++) {
          for (let j = 0; j < k; j++) {
            const r = row + i - around;
            const c = column + j - around;
            if (r >= 0 && r < height && c >= 0 && c < width) sum += weight[f * k * k + i * k + j] * x[r * width + c];
          }
        }
        y[(f * height + row) * width + column] = activation(sum);
      }
    }
  }
  return y;
}

export function softmax(scores) {
  const top = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

export const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

export function largest(values) {
  let top = 0;
  for (const value of values) top = Math.max(top, Math.abs(value));
  return top || 1;
}
