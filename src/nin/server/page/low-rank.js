// A layer's output from few principal directions, in float64: what `nin narrow` does, without its sensitivities.

import { addProducts } from "./maths.js";

// The error function, to 1.5e-7: Abramowitz and Stegun, 7.1.26.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

export const ACTIVATIONS = {
  none: (z) => z,
  relu: (z) => (z > 0 ? z : 0),
  gelu: (z) => 0.5 * z * (1 + erf(z / Math.SQRT2)),
  silu: (z) => z / (1 + Math.exp(-z)),
};

// z[k, p] = sum over c of V[k, c] (y[c, p] - m[c]) for sums y {shape: [C, h, w], values}.
export function coordinates({ shape, values }, { mean, directions }) {
  const [channels, height, width] = shape;
  const pixels = height * width;
  const centred = Float64Array.from(values, (value, i) => value - mean.values[Math.floor(i / pixels)]);
  const z = new Float64Array(channels * pixels);
  for (let k = 0; k < channels; k++) addProducts(z.subarray(k * pixels, (k + 1) * pixels), directions.values.subarray(k * channels, (k + 1) * channels), centred);
  return z;
}

// The layer's output with the first `rank` directions: {shape, values}.
export function rebuild(z, shape, { mean, directions }, rank, activation) {
  const [channels, height, width] = shape;
  const pixels = height * width;
  const act = ACTIVATIONS[activation];
  const y = new Float64Array(channels * pixels);
  for (let c = 0; c < channels; c++) {
    const weights = Float64Array.from({ length: rank }, (_, k) => directions.values[k * channels + c]);
    addProducts(y.subarray(c * pixels, (c + 1) * pixels).fill(mean.values[c]), weights, z);
  }
  return { shape, values: y.map(act) };
}

// Fractions of the variance in the first 0, 1, … C directions.
export function varianceKept({ variances }) {
  const sums = [0];
  for (const variance of variances.values) sums.push(sums.at(-1) + variance);
  const total = sums.at(-1) || 1;
  return sums.map((sum) => sum / total);
}

// Multiply-accumulates for an image: of the layer as it is, and of k×k to `rank` channels with a 1×1 after it.
export const macs = ({ in_channels: taken, channels, kernel_size: k }, pixels) => pixels * taken * k * k * channels;
export const narrowMacs = ({ in_channels: taken, channels, kernel_size: k }, pixels, rank) => pixels * rank * (taken * k * k + channels);
// The first rank that takes no fewer multiply-accumulates.
export const stopsPaying = ({ in_channels: taken, channels, kernel_size: k }) => Math.ceil((taken * k * k * channels) / (taken * k * k + channels));
