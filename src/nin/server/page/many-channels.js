// Many channels: 6×6×32 ∗ 1×1×32×F, one pixel and one filter spelled out.

import { element, narrow, slider } from "./elements.js";
import { largest } from "./maths.js";
import { CHANNELS, MOST_FILTERS, SIDE, change, state, watch } from "./layer-state.js";
import { makeDotProduct } from "./dot-product.js";
import { player } from "./play.js";
import { volume } from "./volume.js";

export function manyChannels(figure) {
  const select = (row, column) => {
    moving.stop();
    change({ row, column });
  };
  const moving = player("Move the pixel", () => {
    const next = (state.row * SIDE + state.column + 1) % (SIDE * SIDE);
    change({ row: Math.floor(next / SIDE), column: next % SIDE });
  });
  const block = { rows: SIDE, columns: SIDE, cell: 27, step: 1.7, onSelect: select };
  const input = volume({ ...block, depth: CHANNELS, label: "input, 6×6×32" });
  const output = volume({ ...block, depth: state.filters, room: narrow() ? null : MOST_FILTERS, label: "output" });
  const caption = element("figcaption", {});
  const drawn = { filters: 0, seed: -1, filter: -1 };
  const product = makeDotProduct();
  const filters = slider({ label: "filters F:", min: 1, max: MOST_FILTERS, value: state.filters, onInput: (value) => change({ filters: value }) });
  const filter = slider({
    label: "look at filter", min: 1, max: state.filters, value: 1, onInput: (value) => change({ filter: value - 1 }),
  });
  const again = element("button", { type: "button", onclick: () => change({ seed: state.seed + 1 }) }, "New random numbers");

  figure.append(
    element("div", { class: "controls" }, filters.element, filter.element, moving.element, again),
    element("div", { class: "volumes" },
      element("figure", { class: "part" }, input.element, element("figcaption", {}, "image 6×6×32")),
      element("span", { class: "sign" }, "∗ 1×1×32 ="),
      element("figure", { class: "part" }, output.element, caption)),
    product.element);

  watch(() => {
    if (drawn.filters !== state.filters) {
      output.setDepth(state.filters);
      filter.input.max = state.filters;
      caption.textContent = `output 6×6×${state.filters}`;
    }
    if (drawn.seed !== state.seed) input.show(state.input.subarray(0, SIDE * SIDE), largest(state.input));
    const map = state.output.subarray(state.filter * SIDE * SIDE, (state.filter + 1) * SIDE * SIDE);
    output.show(map, largest(state.output));
    Object.assign(drawn, state);
    filters.set(state.filters);
    filter.set(state.filter + 1);
    input.highlight(state.row, state.column);
    output.highlight(state.row, state.column, state.filter, state.filter + 1);
    product.update();
  });
}
