// The same weights as a small network, at the chosen pixel.

import { announce, element, format, svg, tint } from "./elements.js";
import { pixelGrid } from "./pixel-grid.js";
import { largest } from "./maths.js";
import { CHANNELS, SIDE, change, outputs, state, values, watch, weights } from "./layer-state.js";

const HIGH = 500;
const WIDE = 460;
const SHOWN = 16; // outputs drawn

export function dense(figure) {
  const grid = pixelGrid({ rows: SIDE, columns: SIDE, kind: "mini", label: "the image, choose a pixel", onSelect: (row, column) => change({ row, column }) });
  const edges = svg("g");
  const nodes = svg("g");
  const drawing = svg("svg", { class: "net", viewBox: `0 0 ${WIDE} ${HIGH}`, width: WIDE, height: HIGH, role: "img", "aria-label": "32 inputs, each joined to every output" }, edges, nodes);
  const said = element("p", { class: "said" });
  const code = element("p", { class: "quiet" });
  figure.append(
    element("div", { class: "chain" },
      element("div", { class: "beside" }, element("p", { class: "caption" }, "the pixel"), grid.element, element("br"), said, code),
      element("div", {}, drawing)));
  const drawn = { filters: -1, filter: -1, seed: -1 };
  let outs = [];

  const ins = Array.from({ length: CHANNELS }, (_, c) => svg("circle", { cx: 12, cy: yIn(c), r: 6.5 }));
  nodes.append(...ins);

  function redraw() {
    const count = Math.min(state.filters, SHOWN);
    outs.forEach(({ group }) => group.remove());
    outs = Array.from({ length: count }, (_, f) => {
      const circle = svg("circle", { cx: WIDE - 90, cy: yOut(f, count), r: 10 });
      const text = svg("text", { x: WIDE - 70, y: yOut(f, count) + 5 });
      const group = svg("g", { class: "unit", onclick: () => change({ filter: f }), onpointerenter: () => change({ filter: f }) }, circle, text);
      nodes.append(group);
      return { circle, text, group };
    });
  }

  watch(() => {
    if (drawn.filters !== state.filters) redraw();
    const [x, y, w] = [values(), outputs(), weights()];
    const limits = [largest(state.input), largest(state.output), largest(state.weight)];
    if (drawn.seed !== state.seed || drawn.filters !== state.filters || drawn.filter !== state.filter) drawEdges(edges, limits[2]);
    if (drawn.seed !== state.seed) grid.show(state.input.subarray(0, SIDE * SIDE), limits[0]);
    Object.assign(drawn, state);
    grid.choose(state.row, state.column);
    ins.forEach((circle, c) => circle.setAttribute("fill", paint(x[c], limits[0])));
    outs.forEach(({ circle, text }, f) => {
      circle.setAttribute("fill", paint(y[f], limits[1]));
      circle.classList.toggle("chosen", f === state.filter);
      text.textContent = format(y[f], 2);
    });
    const strongest = w.map((weight, c) => weight * x[c]).reduce((best, product, c, all) => (Math.abs(product) > Math.abs(all[best]) ? c : best), 0);
    said.textContent = `Output ${state.filter + 1} is ${format(y[state.filter], 3)}. Channel ${strongest + 1} counts most: ${format(x[strongest], 2)} × ${format(w[strongest], 2)}.`;
    code.textContent = `torch.nn.Linear(32, ${state.filters})` + (state.filters > SHOWN ? ` The first ${SHOWN} outputs are drawn.` : "");
    announce(said.textContent);
  });
}

// The weights as lines: those of the chosen output strong, the others faint.
function drawEdges(group, limit) {
  const count = Math.min(state.filters, SHOWN);
  const faint = [];
  const strong = [];
  for (let f = 0; f < count; f++) {
    for (let c = 0; c < CHANNELS; c++) {
      const weight = state.weight[f * CHANNELS + c];
      const chosen = f === state.filter;
      const line = svg("line", {
        class: "edge", x1: 19, y1: yIn(c), x2: WIDE - 100, y2: yOut(f, count),
        stroke: tint(weight, limit, chosen ? 1 : 0.2), "stroke-width": chosen ? 0.6 + 3 * (Math.abs(weight) / limit) : 1,
      });
      (chosen ? strong : faint).push(line);
    }
  }
  group.replaceChildren(...faint, ...strong);
}

const yIn = (c) => 10 + (c * (HIGH - 20)) / (CHANNELS - 1);
const yOut = (f, count) => HIGH / 2 + (f - (count - 1) / 2) * Math.min(54, (HIGH - 30) / count);
const paint = (value, limit) => (value === 0 ? "var(--cell)" : tint(value, limit, 0.9));
