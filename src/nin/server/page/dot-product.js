// The dot product of step 2 at the chosen pixel: its values, the filter's weights, products and sum, by channel.

import { announce, element, format, number, setNumber, shade, slider } from "./elements.js";
import { largest } from "./maths.js";
import { CHANNELS, outputs, state, sum, values, weights } from "./layer-state.js";

export function makeDotProduct() {
  const rows = ["values", "weights", "products", "sum so far"].map((name) => {
    const cells = Array.from({ length: CHANNELS }, (_, channel) => {
      const data = number();
      const cell = element("td", {}, data);
      cell.addEventListener("pointerover", () => showChannel(channel));
      return { cell, data };
    });
    return { line: element("tr", {}, element("th", { scope: "row" }, name), ...cells.map(({ cell }) => cell)), cells, name };
  });
  const result = { sum: number(0, 3, { "data-sum": "" }), relu: number(0, 3, { "data-relu": "" }) };
  const where = element("span", { class: "quiet" });
  const said = element("p", { class: "said quiet" });
  let channel = 0;
  const channels = slider({ label: "look at channel", min: 1, max: CHANNELS, value: 1, onInput: (value) => showChannel(value - 1) });

  function showChannel(next) {
    for (const { cells } of rows) {
      cells[channel].cell.classList.remove("chosen");
      cells[next].cell.classList.add("chosen");
    }
    channel = next;
    channels.set(channel + 1);
    showTerm();
  }
  function showTerm() {
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
    where.textContent = `It lands in map ${state.filter + 1} of ${state.filters}, row ${state.row + 1}, column ${state.column + 1}. `
      + `All filters at this pixel: ${outputs().slice(0, 8).map((value) => format(value, 1)).join(", ")}${state.filters > 8 ? ", …" : ""}.`;
    showTerm();
    announce(`Pixel in row ${state.row + 1}, column ${state.column + 1}, filter ${state.filter + 1}: the sum is ${format(z, 3)}, after the ReLU ${format(Math.max(0, z), 3)}.`);
  }
  showChannel(0);
  const table = element("table", { class: "strip", "data-strip": "", "aria-label": "The chosen pixel's 32 values, the filter's weights, their products, and the sum so far" },
    element("tbody", {}, ...rows.map(({ line }) => line)));
  const sums = element("p", { class: "sum" }, "all 32 added up: ", result.sum, " → ReLU → ", result.relu, where);
  return { element: element("div", {}, table, sums, element("div", { class: "row" }, channels.element, said)), update };
}
