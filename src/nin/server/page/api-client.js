// Requests to the server. An image is {blob, label, sample}: its file, its true class and its place among
// the run's test images, where it has them. api-client-offline.js has the same functions for an export of the page.

import { numbers, spectrumOf, weightsOf } from "./decode-arrays.js";

async function json(answer) {
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof value.detail === "string" ? value.detail : `the server answered ${answer.status}`);
  return value;
}

const ask = (path, options) => fetch(path, options).then(json);
const send = (path, { blob }, options) => ask(path, { method: "POST", body: blob, headers: { "Content-Type": blob.type || "application/octet-stream" }, ...options });

let stopping = new AbortController();

// Ends the requests for a layer's numbers that are still under way: another layer is wanted. Nothing comes of them.
export function stopLayers() {
  stopping.abort();
  stopping = new AbortController();
}

// A request that `stopLayers` ends; whoever waits for it waits for ever then, and is forgotten.
function stoppable(request) {
  const { signal } = stopping;
  return request({ signal }).catch((error) => {
    if (!signal.aborted) throw error;
    return new Promise(() => {});
  });
}

export const LIVE = true; // images of the visitor's can be classified, and times measured

// What is served; null where no server answers.
export async function health() {
  try {
    return await ask("api/health");
  } catch {
    return null;
  }
}

export const asset = (name) => fetch(name).then((answer) => answer.blob());
export const model = (run) => ask(`api/model?run=${run}`);
export const samples = () => ask("api/samples");
export const dead = (run) => ask(`api/dead?run=${run}`);
export const predict = (image, run) => send(`api/predict?maps=true&run=${run}`, image).then(({ predictions }) => predictions[0]);
export const approximateMap = (image, label, run) => send(`api/approximate-map?label=${label}&run=${run}`, image).then(numbers);
export const mistakes = (run) => ask(`api/mistakes?run=${run}`);
// the image itself, layer 0, is always wanted
export const activations = (image, layer, run) => {
  const request = (options) => send(`api/layers/${layer}/activations?run=${run}`, image, options).then(numbers);
  return layer ? stoppable(request) : request();
};
export const sums = (image, layer, run) => stoppable((options) => send(`api/layers/${layer}/activations?sums=true&run=${run}`, image, options).then(numbers));
export const narrowed = (layer, rank, run) => stoppable((options) => ask(`api/layers/${layer}/narrowed?rank=${rank}&run=${run}`, options));
export const bottleneck = (r) => fetch(`api/bottleneck?r=${r}`, { method: "POST" }).then(json);
export const weights = (layer, run) => stoppable((options) => ask(`api/layers/${layer}/weights?run=${run}`, options).then(weightsOf));
export const spectrum = (layer, run) => stoppable((options) => ask(`api/layers/${layer}/spectrum?run=${run}`, options).then(spectrumOf));
