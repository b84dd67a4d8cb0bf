// The layer that steps 2 and 3 share: a 6×6×32 image, the filters, the outputs, the chosen pixel and filter.

import { conv1x1, normals, random } from "./maths.js";

export const SIDE = 6;
export const CHANNELS = 32;
export const MOST_FILTERS = 64;

export const state = { row: 2, column: 3, filters: 8, filter: 7, seed: 0, input: null, weight: null, output: null, sums: null };
const listeners = [];

// Calls back now and after each change.
export function watch(listener) {
  listeners.push(listener);
  listener();
}

export function change(values) {
  const numbers = "filters" in values || "seed" in values;
  Object.assign(state, values);
  state.filter = Math.min(state.filter, state.filters - 1);
  if (numbers) compute();
  for (const listener of listeners) listener();
}

function compute() {
  const draw = random(state.seed + 1);
  // a smooth image: what neighbours share and what each has of its own
  const shared = normals(CHANNELS, draw);
  const own = normals(CHANNELS * SIDE * SIDE, draw);
  state.input = own.map((value, i) => Math.max(0, 0.6 * value + 0.5 * shared[Math.floor(i / (SIDE * SIDE))] + 0.3));
  state.weight = normals(CHANNELS * MOST_FILTERS, draw, Math.sqrt(2 / CHANNELS)).slice(0, CHANNELS * state.filters);
  state.sums = conv1x1(state.input, CHANNELS, state.weight, null, (z) => z);
  state.output = state.sums.map((z) => (z > 0 ? z : 0));
}

const pixel = () => state.row * SIDE + state.column;
// The 32 values at the chosen pixel, the 32 weights of the chosen filter.
export const values = () => Array.from({ length: CHANNELS }, (_, c) => state.input[c * SIDE * SIDE + pixel()]);
export const weights = () => Array.from(state.weight.subarray(state.filter * CHANNELS, (state.filter + 1) * CHANNELS));
export const outputs = () => Array.from({ length: state.filters }, (_, f) => state.output[f * SIDE * SIDE + pixel()]);
export const sum = () => state.sums[state.filter * SIDE * SIDE + pixel()];

compute();
