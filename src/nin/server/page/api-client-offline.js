// The functions of api-client.js from files beside the page, for an export on a disk or a web host.
// Each file is a script that puts its content into ninSaved, as a page from the disk may read no other files.

import { ACTIVATIONS } from "./low-rank.js";
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
export const weights = async (layer, run) => weightsOf((await layerFile(layer, run)).weights);
export const spectrum = async (layer, run) => spectrumOf((await layerFile(layer, run)).spectrum);

// The stored sums of an image: each convolution's, and each pooling's output.
async function storedSums({ sample }, layer, run) {
  return numbers((await load(`run-${run}-image-${sample}`))[layer]);
}

export const sums = storedSums;

export async function activations(image, layer, run) {
  const { kind, inputs, activation } = (await model(run)).layers[layer];
  if (kind === "joining") return join(await Promise.all(inputs.map((input) => activations(image, input, run))));
  const { shape, values } = await storedSums(image, layer, run);
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
