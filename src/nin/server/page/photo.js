// A photo on a canvas that a place can be chosen on; it never leaves the browser.

import { element, moved } from "./elements.js";

const MOST = 320; // pixels of the longer side that are computed with

export async function loadPhoto(source) {
  const bitmap = await createImageBitmap(source);
  const scale = Math.min(1, MOST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

// The picture with a marker. onSelect(row, column) where pressed; onHover where pointed at.
export function picture({ label, onSelect = () => {}, onHover = null, square = false }) {
  const canvas = element("canvas");
  const marker = element("span", { class: `marker${square ? " square" : ""}`, hidden: true });
  const box = element("div", { class: "picture", role: "application", tabindex: 0, "aria-label": label, "aria-roledescription": "picture, the arrow keys move, Enter chooses" }, canvas, marker);
  let place = [0, 0];
  const at = (event) => {
    const frame = canvas.getBoundingClientRect();
    const within = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
    return [within((event.clientY - frame.top) / frame.height, canvas.height), within((event.clientX - frame.left) / frame.width, canvas.width)];
  };
  const mark = (row, column, size = null) => {
    place = [row, column];
    marker.hidden = false;
    marker.style.left = `${(100 * (column + 0.5)) / canvas.width}%`;
    marker.style.top = `${(100 * (row + 0.5)) / canvas.height}%`;
    if (size !== null) {
      marker.style.width = `${(100 * size) / canvas.width}%`;
      marker.style.height = "auto"; // as wide as high, whatever the photo's shape
      marker.style.aspectRatio = "1";
    }
  };
  const draw = (image) => {
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  box.addEventListener("pointerdown", (event) => onSelect(...at(event)));
  if (onHover) box.addEventListener("pointermove", (event) => onHover(...at(event)));
  box.addEventListener("keydown", (event) => {
    const stride = onHover ? 1 : Math.max(1, Math.round(canvas.width / 32));
    const next = moved(event.key, ...place, canvas.height, canvas.width, stride);
    if (next) {
      event.preventDefault();
      mark(...next);
      (onHover ?? (() => {}))(...next);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onSelect(...place);
    }
  });
  return { element: box, canvas, draw, mark };
}
