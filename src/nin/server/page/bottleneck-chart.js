// Multiplications of the bottleneck, where it stops paying, and the chart of both with the measured times.

import { format, svg } from "./elements.js";

const PIXELS = 28 * 28;
const [LEFT, RIGHT, TOP, BOTTOM] = [80, 616, 14, 230]; // of the chart, in its own units

export const WIDE_MACS = PIXELS * 256 * 256 * 16;
export const narrowMacs = (r) => PIXELS * (256 * r + r * 256 * 16);
// 256·r·17 < 256·256·16
export const STOPS_PAYING = Math.ceil((256 * 16) / 17);

// The r at which the measured bottleneck is no longer faster, interpolated; null where it always is. Times that scatter
// are left out.
export function measuredCrossing(measured) {
  const points = [...measured].filter(([, m]) => m.is_steady).sort(([a], [b]) => a - b).map(([r, m]) => [r, m.narrow.median_ms / m.wide.median_ms]);
  for (let i = 1; i < points.length; i++) {
    const [[a, low], [b, high]] = [points[i - 1], points[i]];
    if (low < 1 && high >= 1) return Math.round(a + ((1 - low) / (high - low)) * (b - a));
  }
  return null;
}

// As fractions of the form without bottleneck: multiplications as a line, measured times as dots.
export function drawChart(chart, r, measured) {
  const x = (value) => LEFT + ((RIGHT - LEFT) * value) / 256;
  const y = (fraction) => BOTTOM - ((BOTTOM - TOP) * fraction) / 1.3;
  const text = (value, px, py, options = {}) => svg("text", { x: px, y: py, ...options }, value);
  const fraction = narrowMacs(r) / WIDE_MACS;
  const early = r <= 128;
  const dots = [...measured].map(([value, m]) => svg("circle", { class: m.is_steady ? "dot-narrow" : "dot-narrow busy", cx: x(value), cy: y(Math.min(1.3, m.narrow.median_ms / m.wide.median_ms)), r: 5 }));
  chart.replaceChildren(
    ...[0, 0.5, 1].flatMap((value) => [
      svg("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }),
      text(`${value * 100} %`, LEFT - 8, y(value) + 4, { "text-anchor": "end" }),
    ]),
    svg("line", { class: "line wide-form", x1: LEFT, x2: RIGHT, y1: y(1), y2: y(1) }),
    text("256 → 4×4 → 256", early ? RIGHT : LEFT + 6, TOP + 16, { "text-anchor": early ? "end" : "start", class: "label" }),
    svg("line", { class: "line narrow", x1: x(0), x2: x(256), y1: y(0), y2: y(narrowMacs(256) / WIDE_MACS) }),
    svg("line", { class: "now", x1: x(r), x2: x(r), y1: TOP, y2: BOTTOM }),
    svg("circle", { class: "dot-wide", cx: x(r), cy: y(fraction), r: 4 }),
    ...dots,
    // under the line, on the side where the dashed line is not
    text(`${format(100 * fraction, 0)} % of the multiplications`, early ? RIGHT : x(40), BOTTOM - 10, { "text-anchor": early ? "end" : "start", class: "label" }),
    ...[64, 128, 192, 256].map((value) => text(value, x(value), BOTTOM + 18, { "text-anchor": "middle" })),
    text(dots.length ? "r; dots: measured time, as a share of the wide form’s" : "r", (LEFT + RIGHT) / 2, BOTTOM + 46, { "text-anchor": "middle" }));
  chart.setAttribute("aria-label", `With r = ${r} the bottleneck takes ${format(100 * fraction, 0)} % of the multiplications.`);
}
