// One channel at one pixel: its filter's products with each input channel, and the activations of the whole block.

import { channel, contributions, drawMap, pixelAt } from "./feature-maps.js";
import { announce, element, format, number } from "./elements.js";
import { largest } from "./maths.js";
import { channelsOf } from "./served-network.js";

const LISTED = 8; // input channels, those of the largest products

// An element with both, for the image of a view. filter is a channel of the layer.
export async function tracePixel(view, index, filter, place) {
  const { layers, model } = view.network;
  const layer = layers[index];
  const output = await view.layer(index);
  const [row, column] = pixelAt(output, place);
  const value = channel(output, filter)[row * output.shape[2] + column];
  const name = index === layers.length - 1 ? `class ${model.classes[filter]}` : `channel ${filter + 1}`;
  const where = `row ${row + 1}, column ${column + 1}`;
  const heading = element("h3", {}, `${capital(view.name)}: ${name} at ${where}`);
  if (layer.kind !== "convolution") {
    announce(`${capital(view.name)}, ${where}: ${name} is ${format(value, 3)}`);
    const from = layer.kind === "joining" ? branchOf(layers, layer, filter) : "";
    return element("div", {}, heading, element("p", {}, "the value is ", number(value, 3, { "data-value": "" }), from), await strips(view, index, place));
  }
  const [input, { weight, bias }] = await Promise.all([view.layer(layer.inputs[0]), view.network.weights(index)]);
  const taken = contributions(input, weight, layer, filter, row, column);
  const added = bias ? bias.values[filter] : 0;
  const sum = taken.reduce((a, b) => a + b, added);
  announce(`${capital(view.name)}, ${where}: the sum is ${format(sum, 3)}, ${name} gives ${format(value, 3)}`);
  return element("div", {},
    heading,
    listed(taken, input, weight, filter, row, column),
    element("p", { class: "sum" }, "all of them + bias ", number(added, 3), " = ", number(sum, 3, { "data-sum": "" }),
      layer.activation === "none" ? "" : ` → ${layer.activation} → `,
      layer.activation === "none" ? null : number(value, 3, { "data-value": "" })),
    await strips(view, index, place));
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

// The branch of an Inception module that a channel of the concatenated ones comes from.
function branchOf(layers, layer, filter) {
  let first = 0;
  for (const source of layer.inputs) {
    if (filter < first + layers[source].channels) return `, channel ${filter - first + 1} of ${layers[source].name}`;
    first += layers[source].channels;
  }
  return "";
}

function listed(taken, input, weight, filter, row, column) {
  const order = [...taken.keys()].sort((a, b) => Math.abs(taken[b]) - Math.abs(taken[a])).slice(0, LISTED);
  const limit = largest(taken);
  const [, height, width] = input.shape;
  const single = weight.shape[2] === 1;
  const lines = order.flatMap((c) => {
    const bar = element("i");
    bar.style.width = `${(100 * Math.abs(taken[c])) / limit}%`;
    bar.style.backgroundColor = taken[c] > 0 ? "var(--plus)" : "var(--minus)";
    const factors = single ? `${format(input.values[(c * height + row) * width + column], 2)} × ${format(weight.values[filter * weight.shape[1] + c], 2)} = ` : "";
    return [element("dt", {}, `from channel ${c + 1}`), element("dd", { class: "bar", "aria-hidden": "true" }, bar), element("dd", {}, factors, number(taken[c], 3))];
  });
  const rest = taken.length - order.length;
  return element("div", {}, element("dl", { class: "answer taken" }, ...lines), rest > 0 ? element("p", { class: "quiet" }, `and ${rest} smaller ones`) : null);
}

// Every layer of the block at this pixel: one strip each, a cell for each channel.
async function strips(view, index, place) {
  const { layers } = view.network;
  const inBlock = layers.map((layer, i) => [layer, i]).filter(([layer]) => layer.block === layers[index].block);
  const drawn = await Promise.all(inBlock.map(async ([layer, i]) => {
    const values = await view.layer(i);
    const [row, column] = pixelAt(values, place);
    const at = Float32Array.from({ length: values.shape[0] }, (_, c) => channel(values, c)[row * values.shape[2] + column]);
    const canvas = element("canvas", { class: "pixel-strip", role: "img", "aria-label": `${layer.name}: ${at.filter((v) => v !== 0).length} of ${at.length} channels are not zero here` });
    drawMap(canvas, at, 1, at.length, largest(at));
    return element("div", {}, element("p", { class: "caption" }, `${layer.name}, ${channelsOf(layer)}${i === index ? " (this one)" : ""}`), canvas);
  }));
  return element("div", {}, element("p", { class: "quiet" }, "The whole block at this pixel, from its first layer to its last:"), ...drawn);
}
