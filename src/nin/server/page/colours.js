// Choosing colours: a 1×1 filter over red, green and blue by hand, and a small network that learns one.

import { announce, calm, element, format, shade, slider } from "./elements.js";
import { ColourNetwork, HIDDEN } from "./colour-network.js";
import { loadPhoto, picture } from "./photo.js";
import { asset } from "./api-client.js";

const STEPS = 400;
const RADIUS = 1 / 16; // of the longer side: the circle whose colours are wanted
const NAMES = ["red", "green", "blue"];

export async function colours(figure) {
  const state = { photo: null, weights: [1, -0.5, -0.5], running: 0 };
  const said = element("p", { class: "said", "data-said": "" });
  const photo = picture({ label: "photo: choose the colour to be learned", onSelect: (row, column) => learn(row, column) });
  const result = element("canvas");
  result.setAttribute("role", "img");
  result.setAttribute("aria-label", "what comes out");
  const caption = element("figcaption", {}, "what the filter lets through");
  const units = element("div", { class: "units", hidden: true });
  const legend = element("p", { class: "quiet", hidden: true }, "Each unit’s weights for red (R), green (G) and blue (B): the bar’s height is the size, its colour the sign.");
  const bars = makeUnits(units);
  const sliders = NAMES.map((name, c) => slider({
    label: name, min: -2, max: 2, step: 0.05, value: state.weights[c], show: (v) => format(v, 2),
    onInput: (value) => { state.weights[c] = value; mix(); },
  }));
  const file = element("input", { type: "file", accept: "image/*" });
  file.addEventListener("change", () => file.files.length && open(file.files[0]));
  const problem = element("p", { class: "problem", hidden: true });

  figure.append(
    element("div", { class: "controls" }, ...sliders.map((s) => s.element), element("label", { class: "button" }, file, "A photo of yours")),
    problem,
    element("div", { class: "photos" },
      element("figure", { class: "part" }, element("figcaption", {}, "the photo: click a colour"), photo.element),
      element("figure", { class: "part" }, caption, element("div", { class: "picture" }, result))),
    said, legend, units);

  async function open(source) {
    stop();
    try {
      state.photo = await loadPhoto(source);
    } catch {
      problem.textContent = "The browser cannot read this file as an image.";
      problem.hidden = false;
      return;
    }
    problem.hidden = true;
    photo.draw(state.photo);
    photo.mark(state.photo.height >> 1, state.photo.width >> 1);
    mix();
  }

  // The filter of the sliders: relu(weights · colour), white where it is 1 or more.
  function mix() {
    stop();
    units.hidden = legend.hidden = true;
    caption.textContent = "what the filter lets through";
    const [r, g, b] = state.weights;
    paint(result, state.photo, (x, y, z) => Math.max(0, r * x + g * y + b * z));
    said.textContent = `relu(${format(r, 2)} · red + ${format(g, 2)} · green + ${format(b, 2)} · blue)`.replaceAll("+ −", "− ");
    announce(said.textContent);
  }

  function stop() {
    cancelAnimationFrame(state.running);
    state.running = 0;
  }

  function learn(row, column) {
    stop();
    const { data, width, height } = state.photo;
    const radius = Math.max(1, Math.round(Math.max(width, height) * RADIUS));
    photo.mark(row, column, 2 * radius);
    const { values, wanted } = examples(state.photo, row, column, radius);
    if (!wanted.includes(0)) return;
    const network = new ColourNetwork(values, wanted);
    const each = calm() ? STEPS : 4; // all at once where motion is not wanted
    const start = 4 * (row * width + column);
    units.hidden = legend.hidden = false;
    caption.textContent = "what the network picks out";
    const frame = () => {
      let loss = 0;
      for (let i = 0; i < each && network.steps < STEPS; i++) loss = network.step();
      paint(result, state.photo, (x, y, z) => network.predict(x, y, z));
      bars(network.parameters);
      const sure = network.predict(data[start] / 255, data[start + 1] / 255, data[start + 2] / 255);
      said.textContent = `Step ${network.steps} of ${STEPS}: loss ${format(loss, 3)}, the clicked pixel is wanted: ${format(100 * sure, 0)} %.`;
      if (network.steps < STEPS) state.running = requestAnimationFrame(frame);
      else announce(`${said.textContent} Done.`);
    };
    state.running = requestAnimationFrame(frame);
  }

  await open(await asset("flower.jpg"));
}

// Each pixel's red, green and blue from 0 to 1, and whether it is in the circle.
function examples({ data, width, height }, row, column, radius) {
  const values = new Float64Array(3 * width * height);
  const wanted = new Uint8Array(width * height);
  for (let p = 0; p < wanted.length; p++) {
    for (let c = 0; c < 3; c++) values[3 * p + c] = data[4 * p + c] / 255;
    wanted[p] = (Math.floor(p / width) - row) ** 2 + ((p % width) - column) ** 2 <= radius ** 2 ? 1 : 0;
  }
  return { values, wanted };
}

// Draws the photo as grey values: `predict` of each pixel's red, green and blue.
function paint(canvas, { data, width, height }, predict) {
  const out = new ImageData(width, height);
  for (let i = 0; i < data.length; i += 4) {
    out.data[i] = out.data[i + 1] = out.data[i + 2] = 255 * predict(data[i] / 255, data[i + 1] / 255, data[i + 2] / 255);
    out.data[i + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(out, 0, 0);
}

// The hidden layer: for each of the 8 units its weights for red, green and blue; returns what updates them.
function makeUnits(box) {
  const cells = Array.from({ length: HIDDEN }, () => NAMES.map(() => element("i", { class: "bar" })));
  box.append(...cells.map((bars, h) => element("div", {},
    element("p", { class: "caption" }, `unit ${h + 1}`),
    element("div", { class: "unit-box", role: "img" }, ...bars),
    element("div", { class: "unit-names", "aria-hidden": true }, ...NAMES.map((name) => element("span", { title: name }, name[0].toUpperCase()))))));
  return (parameters) => cells.forEach((bars, h) => {
    const weights = NAMES.map((_, c) => parameters[3 * h + c]);
    bars.forEach((bar, c) => {
      shade(bar, weights[c], 3);
      bar.style.height = `${Math.min(100, 12 + 30 * Math.abs(weights[c]))}%`;
      bar.style.minWidth = "0";
    });
    bars[0].parentElement.setAttribute("aria-label", NAMES.map((name, c) => `${name} ${format(weights[c], 1)}`).join(", "));
  });
}
