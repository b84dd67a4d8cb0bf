// Many channels: 6×6×32 ∗ 1×1×32×F, one pixel and one filter spelled out.

import { element, narrow, slider } from "./elements.js";
import { largest } from "./maths.js";
import { CHANNELS, MOST_FILTERS, SIDE, change, scene, watch } from "./scene.js";
import { makeStrip } from "./strip.js";
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
