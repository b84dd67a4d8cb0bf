// Network in Network: a 5×5 convolution, two 1×1 layers, class maps, global average pooling.

import { announce, element, format, number, setNumber, shade } from "./elements.js";
import { pixelGrid } from "./pixel-grid.js";
import { digitPad } from "./digit-pad.js";
import { conv1x1, convolve, largest, mean, softmax } from "./maths.js";
import { asset } from "./api-client.js";

const SIDE = 8;
const KERNEL = 5;

// All layers of the little network for an image of 64 numbers from 0 to 1.
function forward(layers, image) {
  const [first, second, last] = layers.map(({ weight, bias }) => ({ weight: weight.flat(), bias }));
  const seen = convolve(image, SIDE, SIDE, first.weight, first.bias, KERNEL);
  const thought = conv1x1(seen, first.bias.length, second.weight, second.bias);
  const maps = conv1x1(thought, second.bias.length, last.weight, last.bias, (z) => z);
  const classes = last.bias.length;
  const scores = Array.from({ length: classes }, (_, c) => mean(maps.subarray(c * SIDE * SIDE, (c + 1) * SIDE * SIDE)));
  return { seen, thought, maps, scores, probabilities: softmax(scores) };
}

export async function network(figure) {
  const { layers, images } = JSON.parse(await (await asset("digits.json")).text());
  const state = { digit: 3, row: 2, column: 4, result: null };
  const select = (row, column) => {
    Object.assign(state, { row, column });
    point();
  };
  const input = pixelGrid({ rows: SIDE, columns: SIDE, kind: "digit", label: "the image, 8×8: choose a pixel", onSelect: select });
  const widths = layers.map(({ bias }) => bias.length);
  const stacks = widths.map((count) => Array.from({ length: count }, (_, c) => element("i", {}, count === 10 ? String(c) : "")));
  const names = ["5×5, ReLU", "1×1, ReLU", "1×1: classes"];
  const columns = element("div", { class: "columns", role: "img" }, ...stacks.map((cells, i) =>
    element("div", {}, element("p", { class: "caption" }, names[i]), element("div", { class: "column" }, ...cells))));
  const maps = images.map((_, digit) => {
    const grid = pixelGrid({ rows: SIDE, columns: SIDE, kind: "map", label: `map of class ${digit}`, onSelect: select });
    const score = number(0, 2, { "data-score": digit });
    const sure = element("span");
    const part = element("div", { class: "part" }, grid.element, element("p", { class: "caption" }, `${digit}: mean `, score, element("br"), sure));
    return { grid, score, sure, part };
  });
  const said = element("p", { class: "said" });
  const pad = digitPad((pixels) => showImage(pixels, -1));
  const powers = maps.map((_, digit) => ({ power: number(), probability: number(0, 1, { "data-probability": digit }), score: number(0, 2), row: element("tr") }));
  powers.forEach(({ power, probability, score, row }, digit) => {
    row.append(element("th", { scope: "row" }, String(digit)), element("td", {}, score), element("td", {}, power), element("td", {}, probability, " %"));
  });
  const total = number();
  const choices = element("fieldset", { class: "choices" }, element("legend", {}, "digits that it never saw while learning"),
    ...images.map((image, digit) => element("button", { type: "button", class: "choice", "aria-label": `digit ${digit}`, onclick: () => show(digit) }, thumbnail(image))));

  function show(digit) {
    pad.clear();
    showImage(Float64Array.from(images[digit], (value) => value / 255), digit);
  }

  // digit: of the images; -1 for one that was drawn
  function showImage(pixels, digit) {
    state.digit = digit;
    state.result = forward(layers, pixels);
    input.show(pixels, 1.4);
    const limit = largest(state.result.maps);
    const best = state.result.scores.indexOf(Math.max(...state.result.scores));
    maps.forEach(({ grid, score, sure, part }, c) => {
      grid.show(state.result.maps.subarray(c * SIDE * SIDE, (c + 1) * SIDE * SIDE), limit);
      setNumber(score, state.result.scores[c], 2);
      sure.textContent = `${format(100 * state.result.probabilities[c], 1)} % sure`;
      part.classList.toggle("best", c === best);
    });
    const exponentials = state.result.scores.map(Math.exp);
    setPower(total, exponentials.reduce((a, b) => a + b, 0));
    powers.forEach(({ power, probability, score, row }, c) => {
      setNumber(score, state.result.scores[c], 2);
      setPower(power, exponentials[c]);
      setNumber(probability, 100 * state.result.probabilities[c], 1);
      row.classList.toggle("most", c === best);
    });
    choices.querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", i === digit));
    point();
  }

  function point() {
    const { row, column, result } = state;
    const at = row * SIDE + column;
    input.choose(row, column);
    input.near(row, column, (KERNEL - 1) / 2);
    for (const { grid } of maps) grid.choose(row, column);
    [result.seen, result.thought, result.maps].forEach((values, layer) => {
      const limit = largest(values);
      stacks[layer].forEach((cell, c) => shade(cell, values[c * SIDE * SIDE + at], limit));
    });
    const here = Array.from({ length: maps.length }, (_, c) => result.maps[c * SIDE * SIDE + at]);
    const most = here.indexOf(Math.max(...here));
    const best = result.scores.indexOf(Math.max(...result.scores));
    said.textContent = `This place says ${most} (${format(here[most], 1)}). The mean over all places says ${best}, ${format(100 * result.probabilities[best], 0)} % sure.`;
    columns.setAttribute("aria-label", `At this pixel: ${here.map((value, c) => `class ${c} ${format(value, 1)}`).join(", ")}`);
    announce(said.textContent);
  }

  figure.append(
    element("div", { class: "row" }, choices, pad.element),
    element("div", { class: "chain" },
      element("div", {}, element("p", { class: "caption" }, "the image, and what the 5×5 sees"), input.element),
      columns),
    said,
    element("div", { class: "maps" }, ...maps.map(({ part }) => part)),
    element("table", { class: "figures softmax" },
      element("caption", { class: "caption" }, "The softmax: e to the power of each score, divided by the sum of all ten"),
      element("thead", {}, element("tr", {}, ...["class", "score", "e^score", "probability"].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...powers.map(({ row }) => row)),
      element("tfoot", {}, element("tr", {}, element("th", { scope: "row" }, "sum"), element("td"), element("td", {}, total), element("td", {}, "100 %")))));
  show(state.digit);
}

// Powers reach from thousandths to millions.
function setPower(made, value) {
  setNumber(made, value, value < 100 ? 2 : 0);
}

function thumbnail(image) {
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  const picture = new ImageData(SIDE, SIDE);
  image.forEach((value, i) => picture.data.set([255 - value, 255 - value, 255 - value, 255], 4 * i));
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}
