// Shrinking channels: 28×28×192 to 28×28×F.

import { announce, count, element, slider } from "./elements.js";
import { volume } from "./volume.js";

const SIDE = 28;
const DEPTH = 192;

const multiplications = (filters) => SIDE * SIDE * DEPTH * filters;
const parameters = (filters) => DEPTH * filters + filters;

export function shrinking(figure) {
  const block = { rows: SIDE, columns: SIDE, cell: 5.2, step: 0.72, cells: false, room: DEPTH };
  const before = volume({ ...block, depth: DEPTH, label: "input, 28×28×192" });
  const after = volume({ ...block, depth: 32, label: "output" });
  const caption = element("figcaption");
  const cells = Object.fromEntries(["depth", "macs", "parameters"].map((name) => [name, element("data")]));
  const row = (name, now, full) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, now), element("td", {}, full));
  const control = slider({ label: "filters:", min: 32, max: DEPTH, step: 1, value: 32, onInput: update });

  function update(filters) {
    after.setDepth(filters);
    caption.textContent = `output 28×28×${filters}`;
    after.element.setAttribute("aria-label", caption.textContent);
    for (const [name, value] of [["depth", SIDE * SIDE * filters], ["macs", multiplications(filters)], ["parameters", parameters(filters)]]) {
      cells[name].value = String(value);
      cells[name].textContent = count(value);
    }
    announce(`${filters} filters: ${count(multiplications(filters))} multiplications, ${count(parameters(filters))} parameters.`);
  }

  figure.append(
    element("div", { class: "controls" }, control.element),
    element("div", { class: "volumes" },
      element("figure", { class: "part" }, before.element, element("figcaption", {}, "image 28×28×192")),
      element("span", { class: "sign" }, "→"),
      element("figure", { class: "part" }, after.element, caption)),
    element("table", { class: "figures" },
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "it takes"), element("th", { scope: "col" }, "here"), element("th", { scope: "col" }, "with 192"))),
      element("tbody", {},
        row("multiplications, 28·28·192·F", cells.macs, count(multiplications(DEPTH))),
        row("parameters, 192·F + F", cells.parameters, count(parameters(DEPTH))),
        row("numbers in the output", cells.depth, count(SIDE * SIDE * DEPTH)))));
  update(32);
}
