// What steps 2 and 3 look at together: one 6×6×32 image, the filters, the chosen pixel and filter.

import { conv1x1, normals, random } from "./maths.js";

export const SIDE = 6;
export const CHANNELS = 32;
export const MOST_FILTERS = 64;

export const scene = { row: 2, column: 3, filters: 8, filter: 7, seed: 0, input: null, weight: null, output: null, sums: null };
const listeners = [];

// Calls back now, and after each change with what has changed.
export function watch(listener) {
  listeners.push(listener);
  listener();
}

export function change(values) {
  const numbers = "filters" in values || "seed" in values;
  Object.assign(scene, values);
  scene.filter = Math.min(scene.filter, scene.filters - 1);
  if (numbers) compute();
  for (const listener of listeners) listener();
}

function compute() {
  const draw = random(scene.seed + 1);
  // a smooth image: what neighbours share and what each has of its own
  const shared = normals(CHANNELS, draw);
  const own = normals(CHANNELS * SIDE * SIDE, draw);
  scene.input = own.map((value, i) => Math.max(0, 0.6 * value + 0.5 * shared[Math.floor(i / (SIDE * SIDE))] + 0.3));
  scene.weight = normals(CHANNELS * MOST_FILTERS, draw, Math.sqrt(2 / CHANNELS)).slice(0, CHANNELS * scene.filters);
  scene.sums = conv1x1(scene.input, CHANNELS, scene.weight, null, (z) => z);
  scene.output = scene.sums.map((z) => (z > 0 ? z : 0));
}

const pixel = () => scene.row * SIDE + scene.column;
// The 32 values at the chosen pixel, the 32 weights of the chosen filter.
export const values = () => Array.from({ length: CHANNELS }, (_, c) => scene.input[c * SIDE * SIDE + pixel()]);
export const weights = () => Array.from(scene.weight.subarray(scene.filter * CHANNELS, (scene.filter + 1) * CHANNELS));
export const outputs = () => Array.from({ length: scene.filters }, (_, f) => scene.output[f * SIDE * SIDE + pixel()]);
export const sum = () => scene.sums[scene.filter * SIDE * SIDE + pixel()];

compute();
