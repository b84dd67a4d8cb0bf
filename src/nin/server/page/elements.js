// Making and filling elements. Text is always set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) made.setAttribute(name, String(value));
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const formats = [0, 1, 2, 3].map((digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));

// With up to three digits after the point.
export function format(value, digits = 2) {
  const text = formats[digits].format(Math.abs(value));
  return value < 0 && Number(text.replaceAll(",", "")) !== 0 ? `−${text}` : text;
}

export const count = (value) => Math.round(value).toLocaleString("en");

// A number on the page, with all its digits for programs: <data value="0.123456789">0.12</data>
export function number(value = 0, digits = 2, attributes = {}) {
  const made = element("data", attributes);
  setNumber(made, value, digits);
  return made;
}

export function setNumber(made, value, digits = 2) {
  made.value = String(value);
  made.textContent = format(value, digits);
  return made;
}

// Orange for positive, blue for negative, the more the larger; ink stays readable on it.
export function tint(value, limit, most = 0.62) {
  const share = Math.min(1, Math.abs(value) / limit) * most;
  return value > 0 ? `rgb(213 94 0 / ${share})` : `rgb(0 114 178 / ${share})`;
}

export function shade(cell, value, limit) {
  cell.style.backgroundImage = `linear-gradient(${tint(value, limit)} 0 0)`;
}

// Says something to those who do not see the figures, once it has come to rest.
let waiting = 0;
let silent = false;
export const silence = (on) => {
  silent = on;
};
export function announce(text) {
  clearTimeout(waiting);
  if (silent) return;
  waiting = setTimeout(() => {
    document.getElementById("live").textContent = text;
  }, 400);
}

export function slider({ label, min, max, step = 1, value, show = (v) => v, onInput }) {
  const output = element("output", {}, String(show(value)));
  const input = element("input", { type: "range", min, max, step, value, "aria-label": label });
  const update = () => {
    output.textContent = show(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    update();
    onInput(Number(input.value));
  });
  update();
  const set = (next) => {
    input.value = next;
    update();
  };
  return { element: element("label", { class: "control" }, element("span", {}, `${label} `, output), input), input, output, set };
}

export function checkbox(label, checked, onChange) {
  const input = element("input", { type: "checkbox", checked });
  input.addEventListener("change", () => onChange(input.checked));
  return element("label", { class: "control check" }, input, label);
}

// Where an arrow key leads on a picture of rows × columns; null for other keys.
export function moved(key, row, column, rows, columns, stride = 1) {
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key] ?? [];
  if (down === undefined) return null;
  const within = (value, size) => Math.min(size - 1, Math.max(0, value));
  return [within(row + down * stride, rows), within(column + right * stride, columns)];
}

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Whether the screen is a phone's; the same width is in figures.css.
export const narrow = () => matchMedia("(max-width: 34rem)").matches;
