// One channel: the source note's 6×6 image times a weight.

import { announce, checkbox, element, format, slider } from "./elements.js";
import { pixelGrid } from "./pixel-grid.js";
import { relu } from "./maths.js";

const IMAGE = [
  1, 2, 3, 6, 5, 8,
  3, 5, 5, 1, 3, 4,
  2, 1, 3, 4, 9, 3,
  4, 7, 8, 5, 7, 9,
  1, 5, 3, 7, 4, 8,
  5, 4, 9, 8, 3, 5,
];

export function oneChannel(figure) {
  let weight = 2;
  let cut = true;
  let place = [0, 0];
  const select = (row, column) => {
    place = [row, column];
    update();
  };
  const before = pixelGrid({ rows: 6, columns: 6, label: "the image, 6×6", onSelect: select });
  const after = pixelGrid({ rows: 6, columns: 6, label: "the output, 6×6", onSelect: select });
  const shown = element("output", {}, "2.0");
  const said = element("p", { class: "said", "data-said": "" });
  const control = slider({
    label: "weight", min: -3, max: 3, step: 0.1, value: weight, show: (v) => format(v, 1),
    onInput: (value) => { weight = value; update(); },
  });
  control.output.hidden = true;
  const relus = checkbox("ReLU", cut, (on) => { cut = on; update(); });

  function update() {
    const result = IMAGE.map((value) => (cut ? relu(weight * value) : weight * value));
    before.show(IMAGE, 27, 0);
    after.show(result, 27, Number.isInteger(weight) ? 0 : 1);
    before.choose(...place);
    after.choose(...place);
    shown.textContent = format(weight, 1);
    const value = IMAGE[place[0] * 6 + place[1]];
    const product = weight * value;
    said.textContent = `${value} × ${format(weight, 1)} = ${format(product, 1)}`
      + (cut && product < 0 ? ", and the ReLU makes it 0." : ".");
    announce(said.textContent);
  }

  figure.append(
    element("div", { class: "equation" },
      before.element,
      element("div", { class: "weight" }, "times", shown, control.element, relus),
      element("span", { class: "sign", "aria-hidden": "true" }, "="),
      after.element),
    said);
  update();
}
