// A stack of channels as a block: the front is one channel, the depth goes back to the right.

import { moved, svg, tint } from "./elements.js";

const path = (points) => `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}Z`;

// Top, side and front, and the edges of the channels between.
function drawFaces(wide, high, depth, step) {
  const back = depth * step;
  const drawn = [
    svg("path", { class: "face", d: path([[0, 0], [back, -back], [wide + back, -back], [wide, 0]]) }),
    svg("path", { class: "face", d: path([[wide, 0], [wide + back, -back], [wide + back, high - back], [wide, high]]) }),
    svg("path", { class: "face", d: path([[0, 0], [wide, 0], [wide, high], [0, high]]) }),
  ];
  const every = Math.max(1, Math.ceil(2.2 / step)); // edges nearer than this run together
  for (let i = every; i < depth; i += every) {
    const b = i * step;
    drawn.push(svg("polyline", { class: "layer", fill: "none", points: `${b},${-b} ${wide + b},${-b} ${wide + b},${high - b}` }));
  }
  return drawn;
}

// cell: side of a pixel, step: how far back a channel lies, both in the drawing's units. room: the depth that the drawing
// leaves room for; without it the drawing grows with the block.
export function volume({ rows, columns, depth, cell, step, label, cells = true, onSelect = null, room = null }) {
  const root = svg("svg", { class: "volume", role: onSelect ? "application" : "img", "aria-label": label, tabindex: onSelect ? 0 : null });
  if (onSelect) root.setAttribute("aria-roledescription", "block of numbers, the arrow keys choose a pixel");
  const faces = svg("g");
  const front = svg("g");
  const overlay = svg("g");
  root.append(faces, front, overlay);
  const high = rows * cell;
  const wide = columns * cell;
  let chosen = [0, 0];
  const rects = [];
  if (cells) {
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const rect = svg("rect", { class: "cell", x: column * cell, y: row * cell, width: cell, height: cell, fill: "var(--cell)" });
        const colour = svg("rect", { class: "cell", x: column * cell, y: row * cell, width: cell, height: cell });
        rects.push(colour);
        front.append(rect, colour);
      }
    }
  }
  const margin = 3;
  const size = () => {
    const back = (room ?? depth) * step;
    const box = [-margin, -back - margin, wide + back + 2 * margin, high + back + 2 * margin];
    root.setAttribute("viewBox", box.join(" "));
    root.setAttribute("width", box[2]);
    root.setAttribute("height", box[3]);
  };
  const setDepth = (value) => {
    depth = value;
    faces.replaceChildren(...drawFaces(wide, high, depth, step));
    size();
  };
  // Draws the column of a pixel through the block, or the part of it from one channel to another.
  const highlight = (row, column, from = 0, to = depth) => {
    chosen = [row, column];
    const [x, y, a, b] = [column * cell, row * cell, from * step, to * step];
    const square = (o) => [[x + o, y - o], [x + cell + o, y - o], [x + cell + o, y + cell - o], [x + o, y + cell - o]];
    const [f, g] = [square(a), square(b)];
    const outline = [f[3], f[0], g[0], g[1], g[2], f[2]];
    overlay.replaceChildren(
      svg("path", { class: "ghost", d: path(outline) }),
      svg("path", { class: "column", d: path(outline) }),
      svg("path", { class: "column", d: path(f) }),
    );
  };
  const show = (values, limit) => rects.forEach((rect, i) => rect.setAttribute("fill", tint(values[i], limit, 0.85)));
  if (onSelect) {
    const point = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(root.getScreenCTM().inverse());
      const [row, column] = [Math.floor(place.y / cell), Math.floor(place.x / cell)];
      if (row >= 0 && row < rows && column >= 0 && column < columns) onSelect(row, column);
    };
    root.addEventListener("pointermove", point);
    root.addEventListener("pointerdown", point);
    root.addEventListener("keydown", (event) => {
      const next = moved(event.key, ...chosen, rows, columns);
      if (!next) return;
      event.preventDefault();
      onSelect(...next);
    });
  }
  setDepth(depth);
  return { element: root, setDepth, highlight, show };
}
