// A small image as a grid of cells, of which one is chosen by pointing, by touch, or by the arrow keys.

import { element, format, moved, shade } from "./elements.js";

let made = 0;

export function pixelGrid({ rows, columns, label, kind = "", onSelect = () => {} }) {
  const name = `grid${made++}`;
  const cells = [];
  const lines = Array.from({ length: rows }, (_, row) =>
    element("div", { role: "row" }, ...Array.from({ length: columns }, (_, column) => {
      const cell = element("div", { role: "gridcell", id: `${name}-${row}-${column}` });
      cell.place = [row, column];
      cells.push(cell);
      return cell;
    })));
  const grid = element("div", { class: `grid ${kind}`, role: "grid", tabindex: 0, "aria-label": label }, ...lines);
  grid.style.gridTemplateColumns = `repeat(${columns}, auto)`;
  let chosen = null;

  const choose = (row, column) => {
    if (chosen) chosen.classList.remove("chosen");
    chosen = cells[row * columns + column];
    chosen.classList.add("chosen");
    grid.setAttribute("aria-activedescendant", chosen.id);
  };
  const point = (event) => {
    const place = event.target.place;
    if (place) onSelect(...place);
  };
  grid.addEventListener("pointerover", point);
  grid.addEventListener("pointerdown", point);
  grid.addEventListener("keydown", (event) => {
    const next = moved(event.key, ...(chosen?.place ?? [0, 0]), rows, columns);
    if (!next) return;
    event.preventDefault();
    onSelect(...next);
  });

  // Shows the values; with digits given as text too, else as each cell's name.
  const show = (values, limit, digits = null) => {
    cells.forEach((cell, i) => {
      shade(cell, values[i], limit);
      if (digits === null) cell.setAttribute("aria-label", format(values[i], 2));
      else {
        cell.textContent = format(values[i], digits);
        cell.classList.toggle("long", cell.textContent.length > 4); // −27.0
      }
      cell.dataset.value = values[i];
    });
  };
  // Marks the cells within a square around the chosen one.
  const near = (row, column, reach) => {
    for (const cell of cells) {
      const [r, c] = cell.place;
      cell.classList.toggle("near", Math.abs(r - row) <= reach && Math.abs(c - column) <= reach);
    }
  };
  return { element: grid, cells, choose, show, near };
}
