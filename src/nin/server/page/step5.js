// The bottleneck: 256 → 1×1 → r → 4×4 → 256 beside 256 → 4×4 → 256, counted, and measured by the server on request.

import { announce, count, element, format, slider, svg } from "./elements.js";
import * as service from "./server.js";
import { volume } from "./volume.js";

const PIXELS = 28 * 28;
const [LEFT, RIGHT, TOP, BOTTOM] = [68, 576, 14, 230];
const MEASURED = [16, 48, 64, 96, 144, 192, 224, 256];

export const WIDE_MACS = PIXELS * 256 * 256 * 16;
export const narrowMacs = (r) => PIXELS * (256 * r + r * 256 * 16);
// 256·r·17 < 256·256·16
export const STOPS_PAYING = Math.ceil((256 * 16) / 17);

export function bottleneck(figure, { health }) {
  let r = 64;
  const measured = new Map(); // r -> the server's measurement
  const middle = volume({ rows: 14, columns: 14, cell: 6, step: 0.34, cells: false, room: 256, depth: r, label: "r channels" });
  const end = () => volume({ rows: 14, columns: 14, cell: 6, step: 0.34, cells: false, depth: 256, label: "256 channels" }).element;
  const form = element("span");
  const width = element("figcaption");
  const data = { macs: element("data") };
  const ms = { narrow: element("span", {}, "–"), wide: element("span", {}, "–") };
  const chart = svg("svg", { class: "chart", viewBox: "0 0 640 270", width: 640, height: 270, role: "img" });
  const said = element("p", { class: "said" });
  const note = element("p", { class: "quiet" });
  const control = slider({ label: "r:", min: 8, max: 256, step: 1, value: r, onInput: (value) => { r = value; update(); } });
  const one = element("button", { type: "button", class: "main", onclick: () => measure([r]) }, "Measure this r here");
  const all = element("button", { type: "button", onclick: () => measure(MEASURED) }, service.LIVE ? "Measure the curve" : "Show what was measured");
  const buttons = service.LIVE ? [one, all] : [all];
  const rows = [
    ["form", "multiplications", "milliseconds"],
    [form, data.macs, ms.narrow],
    ["256 → 4×4 → 256", count(WIDE_MACS), ms.wide],
  ];

  async function measure(values) {
    one.disabled = all.disabled = true;
    for (const value of values) {
      note.textContent = `measuring r = ${value} …`;
      try {
        measured.set(value, await service.bottleneck(value));
      } catch (error) {
        note.textContent = `This could not be measured: ${error.message}`;
        break;
      }
      update();
      note.textContent = conditions(measured.get(value));
    }
    one.disabled = all.disabled = false;
  }

  function update() {
    middle.setDepth(r);
    width.textContent = `r = ${r}`;
    form.textContent = `256 → 1×1 → ${r} → 4×4 → 256`;
    data.macs.value = String(narrowMacs(r));
    data.macs.textContent = count(narrowMacs(r));
    const ratio = WIDE_MACS / narrowMacs(r);
    said.textContent = ratio > 1
      ? `${format(ratio, 2)} times fewer multiplications. It stops paying at r = ${STOPS_PAYING}.`
      : `More multiplications than without: it stopped paying at r = ${STOPS_PAYING}.`;
    const here = measured.get(r);
    ms.narrow.textContent = here ? milliseconds(here.narrow) : "–";
    ms.wide.textContent = here ? milliseconds(here.wide) : "–";
    if (here) {
      const faster = here.wide.median_ms / here.narrow.median_ms;
      said.textContent += ` Measured: ${format(faster, 2)} times ${faster > 1 ? "as fast" : "as fast, so it is slower"}.`;
    }
    const crossing = crossed(measured);
    if (crossing) said.textContent += ` ${service.LIVE ? "On this machine" : "On that machine"} it stops paying near r = ${crossing}.`;
    drawChart(chart, r, measured);
    announce(said.textContent);
  }

  figure.append(
    element("div", { class: "controls" }, control.element, ...(health ? buttons : [])),
    element("div", { class: "volumes" },
      element("figure", { class: "part" }, end(), element("figcaption", {}, "256")),
      element("span", { class: "sign" }, "1×1"),
      element("figure", { class: "part" }, middle.element, width),
      element("span", { class: "sign" }, "4×4"),
      element("figure", { class: "part" }, end(), element("figcaption", {}, "256"))),
    table(rows), said, chart, note);
  update();
}

function table(rows) {
  const [head, ...body] = rows;
  const line = (row) => element("tr", {}, element("th", { scope: "row" }, row[0]), ...row.slice(1).map((value) => element("td", {}, value)));
  return element("div", { class: "wide" }, element("table", { class: "figures" },
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...body.map(line))));
}

const milliseconds = (timing) => `${format(timing.median_ms, 1)} (${format(timing.low_ms, 1)} to ${format(timing.high_ms, 1)})`;

const conditions = ({ narrow, shape, dtype, memory_format: order, threads, torch, processor }) =>
  `Milliseconds: median (20th to 80th percentile) of ${narrow.runs} runs in turn, ${shape.join("×")}, ${dtype}, ${order}, ${threads} threads, PyTorch ${torch}, ${processor}`
  + (service.LIVE ? "." : ", when this copy was written. Measuring on your machine needs nin serve.");

// The first r at which the measured bottleneck is no longer faster, between two measurements; null where it always is.
export function crossed(measured) {
  const points = [...measured].sort(([a], [b]) => a - b).map(([r, m]) => [r, m.narrow.median_ms / m.wide.median_ms]);
  for (let i = 1; i < points.length; i++) {
    const [[a, low], [b, high]] = [points[i - 1], points[i]];
    if (low < 1 && high >= 1) return Math.round(a + ((1 - low) / (high - low)) * (b - a));
  }
  return null;
}

// Share of the wide form: multiplications as a line, measured times as dots.
function drawChart(chart, r, measured) {
  const x = (value) => LEFT + ((RIGHT - LEFT) * value) / 256;
  const y = (share) => BOTTOM - ((BOTTOM - TOP) * share) / 1.3;
  const text = (value, px, py, options = {}) => svg("text", { x: px, y: py, ...options }, value);
  const share = narrowMacs(r) / WIDE_MACS;
  const dots = [...measured].map(([value, m]) => svg("circle", { class: "dot-narrow", cx: x(value), cy: y(Math.min(1.3, m.narrow.median_ms / m.wide.median_ms)), r: 5 }));
  chart.replaceChildren(
    ...[0, 0.5, 1].flatMap((value) => [
      svg("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }),
      text(`${value * 100} %`, LEFT - 8, y(value) + 4, { "text-anchor": "end" }),
    ]),
    svg("line", { class: "line wide-form", x1: LEFT, x2: RIGHT, y1: y(1), y2: y(1) }),
    text("256 → 4×4 → 256", LEFT + 6, y(1) - 8, { class: "label" }),
    svg("line", { class: "line narrow", x1: x(0), x2: x(256), y1: y(0), y2: y(narrowMacs(256) / WIDE_MACS) }),
    svg("line", { class: "now", x1: x(r), x2: x(r), y1: TOP, y2: BOTTOM }),
    svg("circle", { class: "dot-wide", cx: x(r), cy: y(share), r: 4 }),
    text(`${format(100 * share, 0)} % of the multiplications`, x(r) + (r > 150 ? -10 : 10), y(share) + (r > 150 ? 26 : 18), { "text-anchor": r > 150 ? "end" : "start", class: "label" }),
    ...dots,
    ...[64, 128, 192, 256].map((value) => text(value, x(value), BOTTOM + 18, { "text-anchor": "middle" })),
    text(dots.length ? "r; dots: measured time, as a share of the wide form’s" : "r", (LEFT + RIGHT) / 2, BOTTOM + 37, { "text-anchor": "middle" }));
  chart.setAttribute("aria-label", `With r = ${r} the bottleneck takes ${format(100 * share, 0)} % of the multiplications.`);
}
