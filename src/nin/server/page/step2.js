// Many channels: 6×6×32 ∗ 1×1×32×F, one pixel and one filter spelled out.

import { announce, element, format, narrow, number, setNumber, shade, slider } from "./elements.js";
import { largest } from "./maths.js";
import { CHANNELS, MOST_FILTERS, SIDE, change, outputs, scene, sum, values, watch, weights } from "./scene.js";
import { volume } from "./volume.js";

export function manyChannels(figure) {
  const select = (row, column) => change({ row, column });
  const block = { rows: SIDE, columns: SIDE, cell: 27, step: 1.7, onSelect: select };
  const input = volume({ ...block, depth: CHANNELS, label: "input, 6×6×32" });
  const output = volume({ ...block, depth: scene.filters, room: narrow() ? null : MOST_FILTERS, label: "output" });
  const caption = element("figcaption", {});
  const drawn = { filters: 0, seed: -1, filter: -1 };
  const strip = makeStrip();
  const filters = slider({ label: "filters F:", min: 1, max: MOST_FILTERS, value: scene.filters, onInput: (value) => change({ filters: value }) });
  const filter = slider({
    label: "look at filter", min: 1, max: scene.filters, value: 1, onInput: (value) => change({ filter: value - 1 }),
  });
  const again = element("button", { type: "button", onclick: () => change({ seed: scene.seed + 1 }) }, "New random numbers");

  figure.append(
    element("div", { class: "controls" }, filters.element, filter.element, again),
    element("div", { class: "volumes" },
      element("figure", { class: "part" }, input.element, element("figcaption", {}, "image 6×6×32")),
      element("span", { class: "sign" }, "∗ 1×1×32 ="),
      element("figure", { class: "part" }, output.element, caption)),
    strip.element);

  watch(() => {
    if (drawn.filters !== scene.filters) {
      output.setDepth(scene.filters);
      filter.input.max = scene.filters;
      caption.textContent = `output 6×6×${scene.filters}`;
    }
    if (drawn.seed !== scene.seed) input.show(scene.input.subarray(0, SIDE * SIDE), largest(scene.input));
    const map = scene.output.subarray(scene.filter * SIDE * SIDE, (scene.filter + 1) * SIDE * SIDE);
    output.show(map, largest(scene.output));
    Object.assign(drawn, scene);
    filters.set(scene.filters);
    filter.set(scene.filter + 1);
    input.highlight(scene.row, scene.column);
    output.highlight(scene.row, scene.column, scene.filter, scene.filter + 1);
    strip.update();
  });
}

function makeStrip() {
  const rows = ["values", "weights", "products", "sum so far"].map((name) => {
    const cells = Array.from({ length: CHANNELS }, (_, channel) => {
      const data = number();
      const cell = element("td", {}, data);
      cell.addEventListener("pointerover", () => look(channel));
      return { cell, data };
    });
    return { line: element("tr", {}, element("th", { scope: "row" }, name), ...cells.map(({ cell }) => cell)), cells, name };
  });
  const result = { sum: number(0, 3, { "data-sum": "" }), relu: number(0, 3, { "data-relu": "" }) };
  const where = element("span", { class: "quiet" });
  const said = element("p", { class: "said quiet" });
  let channel = 0;
  const channels = slider({ label: "look at channel", min: 1, max: CHANNELS, value: 1, onInput: (value) => look(value - 1) });

  function look(next) {
    for (const { cells } of rows) {
      cells[channel].cell.classList.remove("chosen");
      cells[next].cell.classList.add("chosen");
    }
    channel = next;
    channels.set(channel + 1);
    tell();
  }
  function tell() {
    const [x, w] = [values()[channel], weights()[channel]];
    said.textContent = `channel ${channel + 1}: ${format(x, 3)} × ${format(w, 3)} = ${format(x * w, 3)}`;
    announce(said.textContent);
  }
  function update() {
    const [x, w] = [values(), weights()];
    const products = x.map((value, c) => value * w[c]);
    let total = 0;
    const sums = products.map((product) => (total += product));
    [x, w, products, sums].forEach((numbers, i) => {
      const limit = largest(numbers);
      numbers.forEach((value, c) => {
        const { cell, data } = rows[i].cells[c];
        shade(cell, value, limit);
        setNumber(data, value, 3);
      });
    });
    const z = sum();
    setNumber(result.sum, z, 3);
    setNumber(result.relu, Math.max(0, z), 3);
    where.textContent = `It lands in map ${scene.filter + 1} of ${scene.filters}, row ${scene.row + 1}, column ${scene.column + 1}. `
      + `All filters at this pixel: ${outputs().slice(0, 8).map((value) => format(value, 1)).join(", ")}${scene.filters > 8 ? ", …" : ""}.`;
    tell();
    announce(`Pixel in row ${scene.row + 1}, column ${scene.column + 1}, filter ${scene.filter + 1}: the sum is ${format(z, 3)}, after the ReLU ${format(Math.max(0, z), 3)}.`);
  }
  look(0);
  const table = element("table", { class: "strip", "data-strip": "", "aria-label": "The chosen pixel's 32 values, the filter's weights, their products, and the sum so far" },
    element("tbody", {}, ...rows.map(({ line }) => line)));
  const sums = element("p", { class: "sum" }, "all 32 added up: ", result.sum, " → ReLU → ", result.relu, where);
  return { element: element("div", {}, table, sums, element("div", { class: "row" }, channels.element, said)), update };
}
