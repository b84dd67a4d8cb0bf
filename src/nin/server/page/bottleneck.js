// The bottleneck: 256 → 1×1 → r → 4×4 → 256 beside 256 → 4×4 → 256, counted, and measured by the server on request.

import { announce, count, element, format, slider, svg } from "./elements.js";
import { STOPS_PAYING, WIDE_MACS, measuredCrossing, drawChart, narrowMacs } from "./bottleneck-chart.js";
import * as service from "./api-client.js";
import { volume } from "./volume.js";

const MEASURED = [16, 48, 64, 96, 144, 192, 224, 256];

export function bottleneck(figure, { health }) {
  let r = 64;
  const measured = new Map(); // r -> the server's measurement
  const middle = volume({ rows: 14, columns: 14, cell: 6, step: 0.34, cells: false, room: 256, depth: r, label: "r channels" });
  const end = () => volume({ rows: 14, columns: 14, cell: 6, step: 0.34, cells: false, depth: 256, label: "256 channels" }).element;
  const form = element("span");
  const width = element("figcaption");
  const data = { macs: element("data") };
  const ms = { narrow: element("span", {}, "–"), wide: element("span", {}, "–") };
  const chart = svg("svg", { class: "chart", viewBox: "0 0 640 284", width: 640, height: 284, role: "img" });
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
      note.textContent = conditions(measured.get(value)) + ([...measured.values()].every(({ is_steady: steady }) => steady) ? "" : BUSY);
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
      said.textContent += ` Measured: ${format(faster, 2)} times ${faster > 1 ? "as fast" : "as fast, so it is slower"}${here.is_steady ? "" : ", on a busy machine: not to be relied on"}.`;
    }
    const crossing = measuredCrossing(measured);
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

const BUSY = " Hollow dots: their times scattered by more than 20 % for as long as was waited, as something else ran on the machine. Measure again when it rests.";

const conditions = ({ narrow, shape, dtype, memory_format: order, threads, torch, processor }) =>
  `Milliseconds: median (20th to 80th percentile) of ${narrow.runs} runs in turn, ${shape.join("×")}, ${dtype}, ${order}, ${threads} threads, PyTorch ${torch}, ${processor}`
  + (service.LIVE ? "." : ", when this copy was written. Measuring on your machine needs nin serve.");
