// The functions of api-client.js from files beside the page, for an export on a disk or a web host.
// Each file is a script that puts its content into ninSaved, as a page from the disk may read no other files.

import { ACTIVATIONS } from "./low-rank.js";
import { conv1x1 } from "./maths.js";
import { bytes, numbers, spectrumOf, weightsOf } from "./decode-arrays.js";

export const LIVE = false;

const loaded = new Map();

function load(name) {
  if (!loaded.has(name)) {
    loaded.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => resolve(globalThis.ninSaved[name]);
      script.onerror = () => reject(new Error(`data/${name}.js is missing beside this page`));
      document.head.append(script);
    }));
  }
  return loaded.get(name);
}

const page = () => load("page");
const layerFile = (layer, run) => load(`run-${run}-layer-${layer}`);

export const health = async () => (await page()).health;

export async function asset(name) {
  const { type, content } = (await page()).assets[name];
  return new Blob([bytes(content)], { type });
}

export const model = async (run) => (await page()).models[run];
export const samples = async () => (await page()).samples;
export const dead = async (run) => (await page()).dead[run];
export const predict = async ({ sample }, run) => (await page()).predictions[run][sample];
export const stopLayers = () => {};

// Of the images that are here, those that the network is wrong on, with their places among all.
export async function mistakes(run) {
  const { predictions, samples: { samples: all } } = await page();
  const placed = all.map((sample, place) => ({ ...sample, place, ...pick(predictions[run][place]) }));
  const wrong = placed.filter(({ label, answer }) => answer !== label).sort((a, b) => b.confidence - a.confidence);
  return { images: all.length, wrong: wrong.length, samples: wrong };
}

const pick = ({ label: answer, confidence }) => ({ answer, confidence });

export const weights = async (layer, run) => weightsOf((await layerFile(layer, run)).weights);
export const spectrum = async (layer, run) => spectrumOf((await layerFile(layer, run)).spectrum);

// A layer's sums for an image: stored, or of a 1×1 convolution computed from those of the layer before.
export async function sums(image, layer, run) {
  const stored = (await load(`run-${run}-image-${image.sample}`))[layer];
  if (stored) return numbers(stored);
  const { inputs: [input] } = (await model(run)).layers[layer];
  const [{ shape: [channels, height, width], values }, { weight, bias }] = await Promise.all([activations(image, input, run), weights(layer, run)]);
  return { shape: [weight.shape[0], height, width], values: Float32Array.from(conv1x1(values, channels, weight.values, bias?.values, (z) => z)) };
}

export async function activations(image, layer, run) {
  const { kind, inputs, activation } = (await model(run)).layers[layer];
  if (kind === "joining") return join(await Promise.all(inputs.map((input) => activations(image, input, run))));
  const { shape, values } = await sums(image, layer, run);
  return { shape, values: values.map(ACTIVATIONS[activation]) };
}

function join(parts) {
  const [, height, width] = parts[0].shape;
  const values = new Float32Array(parts.reduce((sum, part) => sum + part.values.length, 0));
  let start = 0;
  for (const part of parts) {
    values.set(part.values, start);
    start += part.values.length;
  }
  return { shape: [values.length / (height * width), height, width], values };
}

export async function bottleneck(r) {
  const found = (await page()).bottleneck[r];
  if (!found) throw new Error(`r = ${r} was not measured when this copy was written`);
  return found;
}

export async function approximateMap() {
  throw new Error("this needs the server: nin serve RUN");
}

export async function narrowed() {
  throw new Error("this needs the server: nin serve RUN");
}
