// A field to draw a digit on, by pointing or by keys; what is drawn becomes 8×8 numbers, as the digits' own pictures did.

import { element, moved } from "./elements.js";

const FINE = 32; // the side of the field, in its own pixels: each number counts the ink of 4×4 of them
const SIDE = 8;
const PEN = 2; // radius of the pen
const STRIDE = 2; // of the arrow keys

// onDraw(pixels): 64 numbers from 0 to 1.
export function digitPad(onDraw) {
  const ink = new Uint8Array(FINE * FINE);
  const canvas = element("canvas", {
    class: "pad", width: FINE, height: FINE, tabindex: 0, role: "application", "aria-roledescription": "field to draw on",
    "aria-label": "Draw a digit: the arrow keys move the pen, the space bar lifts or lowers it",
  });
  const picture = new ImageData(FINE, FINE);
  let pen = [FINE / 2, FINE / 2];
  let down = false; // the pen of the keys

  function paint() {
    ink.forEach((on, i) => {
      const near = down && Math.abs(Math.floor(i / FINE) - pen[0]) < 2 && Math.abs((i % FINE) - pen[1]) < 2;
      picture.data.set(on ? [20, 20, 20, 255] : near ? [213, 94, 0, 255] : [255, 255, 255, 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }
  function dab([row, column]) {
    for (let r = Math.ceil(row - PEN); r <= row + PEN; r++) {
      for (let c = Math.ceil(column - PEN); c <= column + PEN; c++) {
        const inside = r >= 0 && r < FINE && c >= 0 && c < FINE;
        if (inside && Math.hypot(r - row, c - column) <= PEN) ink[r * FINE + c] = 1;
      }
    }
  }
  function lineTo(next) {
    const steps = Math.max(1, Math.ceil(Math.hypot(next[0] - pen[0], next[1] - pen[1])));
    for (let i = 1; i <= steps; i++) dab([0, 1].map((axis) => pen[axis] + ((next[axis] - pen[axis]) * i) / steps));
    pen = next;
    paint();
    onDraw(toDigit(ink));
  }
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientY - box.top) / box.height) * FINE, ((event.clientX - box.left) / box.width) * FINE];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pen = place(event);
    lineTo(pen);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && lineTo(place(event)));
  canvas.addEventListener("keydown", (event) => {
    const next = moved(event.key, ...pen.map(Math.round), FINE, FINE, STRIDE);
    if (!next && event.key !== " ") return;
    event.preventDefault();
    if (!next) down = !down;
    if (next && !down) pen = next;
    if (down) lineTo(next ?? pen);
    else paint();
  });
  const clear = () => {
    ink.fill(0);
    down = false;
    paint();
  };
  clear();
  const button = element("button", { type: "button", onclick: () => { clear(); onDraw(toDigit(ink)); } }, "Clear");
  return { element: element("div", {}, element("p", { class: "caption" }, "or draw one"), canvas, button), clear };
}

// The ink as high as the field and in its middle, whatever its size was; the ink of 4×4 pixels as one number.
function toDigit(ink) {
  const digit = new Float64Array(SIDE * SIDE);
  const rows = [];
  const columns = [];
  ink.forEach((on, i) => on && (rows.push(Math.floor(i / FINE)), columns.push(i % FINE)));
  if (!rows.length) return digit;
  const [top, bottom, left, right] = [Math.min(...rows), Math.max(...rows) + 1, Math.min(...columns), Math.max(...columns) + 1];
  const scale = Math.max((bottom - top) / FINE, (right - left) / FINE); // source pixels for one of the digit's
  const middle = (left + right) / 2;
  const centre = (top + bottom) / 2;
  for (let i = 0; i < FINE * FINE; i++) {
    const row = Math.floor(centre + (Math.floor(i / FINE) + 0.5 - FINE / 2) * scale);
    const column = Math.floor(middle + ((i % FINE) + 0.5 - FINE / 2) * scale);
    const on = row >= 0 && row < FINE && column >= 0 && column < FINE && ink[row * FINE + column];
    const cell = Math.floor(i / FINE / 4) * SIDE + Math.floor((i % FINE) / 4);
    if (on) digit[cell] += 1 / 16;
  }
  return digit;
}
