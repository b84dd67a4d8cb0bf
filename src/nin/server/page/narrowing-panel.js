// One layer narrowed to r directions: a slider for r, the variance kept, the cost, and the layer's maps.

import { channel, drawMap } from "./feature-maps.js";
import { announce, checkbox, count, element, format, number, setNumber, slider, svg } from "./elements.js";
import { largest } from "./maths.js";
import { coordinates, macs, narrowMacs, rebuild, stopsPaying, varianceKept } from "./low-rank.js";
import { LIVE } from "./api-client.js";

const [WIDE, HIGH, LEFT, TOP, BOTTOM] = [420, 176, 58, 14, 138];

export class NarrowingPanel {
  // onRebuilt(output) to show all maps narrowed, onRebuilt(null) to show them as they are.
  constructor(onRebuilt) {
    this.onRebuilt = onRebuilt;
    this.element = element("div", { class: "block", hidden: true, "data-narrowed": "" });
    this.turn = 0;
  }

  // Shows the layer of a view; its image or layer may be another than before.
  async open(view, index, filter) {
    const layer = view.network.layers[index];
    if (this.view === view && this.index === index && this.image === view.image) return this.choose(filter);
    const turn = (this.turn += 1);
    this.element.hidden = true;
    Object.assign(this, { view, index, layer, filter, image: view.image });
    this.onRebuilt(null);
    if (layer.kind !== "convolution") return;
    const asked = [view.network.spectrum(index), view.sums(index), view.layer(index)];
    const found = await Promise.all(asked).catch(() => null);
    if (turn !== this.turn || !found) return; // another layer meanwhile, or no test images to compute components on
    [this.spectrum, this.sums, this.output] = found;
    this.z = coordinates(this.sums, this.spectrum);
    this.fractions = varianceKept(this.spectrum);
    this.rank = Math.max(1, Math.min(stopsPaying(layer) - 1, this.fractions.findIndex((fraction) => fraction >= 0.95)));
    this.build();
  }

  // Shows nothing until another layer is opened.
  close() {
    this.turn += 1;
    this.view = null;
    this.element.hidden = true;
  }

  choose(filter) {
    this.filter = filter;
    if (!this.element.hidden) this.draw();
  }

  build() {
    const { layer, spectrum } = this;
    this.chart = svg("svg", { class: "chart", viewBox: `0 0 ${WIDE} ${HIGH}`, width: WIDE, height: HIGH, role: "img" });
    this.maps = ["as it is", "narrowed", "difference"].map((name) => ({ name, canvas: element("canvas", { role: "img" }) }));
    this.share = number(0, 1, { "data-kept": "" });
    this.cost = number(0, 0, { "data-macs": "" });
    this.said = element("p", { class: "said" });
    this.right = element("p", { class: "quiet", "data-right": "" });
    this.all = checkbox("Show all maps above this way", false, () => this.draw());
    const control = slider({ label: "r, channels between:", min: 1, max: layer.channels, value: this.rank, onInput: (value) => { this.rank = value; this.draw(); } });
    control.input.addEventListener("change", () => this.count());
    const k = layer.kernel_size;
    this.element.replaceChildren(
      element("h3", {}, "How it would look narrowed"),
      element("p", { class: "quiet" }, `${layer.in_channels} → ${k}×${k} → ${layer.channels} becomes ${layer.in_channels} → ${k}×${k} → r → 1×1 → ${layer.channels}, through the r directions in which the layer’s sums vary most on ${spectrum.images} test images. nin narrow does this to all layers, and weighs the directions by what later layers make of them.`),
      element("div", { class: "controls" }, control.element, this.all),
      element("div", { class: "row narrowed" }, this.chart, element("div", { class: "trio" }, ...this.maps.map(({ name, canvas }) => element("figure", { class: "part" }, element("figcaption", {}, name), canvas)))),
      this.said, this.right);
    this.element.hidden = false;
    this.draw();
    this.count();
  }

  draw() {
    const { layer, rank, spectrum } = this;
    const rebuilt = rebuild(this.z, this.sums.shape, spectrum, rank, layer.activation);
    const [, height, width] = rebuilt.shape;
    const [before, after] = [channel(this.output, this.filter), channel(rebuilt, this.filter)];
    const limit = largest(before);
    const shown = [before, after, Float64Array.from(before, (value, p) => value - after[p])];
    this.maps.forEach(({ name, canvas }, i) => {
      drawMap(canvas, shown[i], height, width, limit);
      canvas.setAttribute("aria-label", `the chosen channel ${name}, at most ${format(largest(shown[i]), 2)}`);
    });
    const [whole, narrow] = [macs(layer, spectrum.pixels), narrowMacs(layer, spectrum.pixels, rank)];
    setNumber(this.share, 100 * this.fractions[rank], 1);
    setNumber(this.cost, narrow, 0);
    const times = narrow < whole ? `${format(whole / narrow, 2)} times fewer than ${count(whole)}` : `no fewer than ${count(whole)}`;
    this.said.replaceChildren(`${rank} of ${layer.channels} directions keep `, this.share, " % of the variance and take ", this.cost, ` multiplications, ${times}. It stops paying at r = ${stopsPaying(layer)}.`);
    announce(this.said.textContent);
    this.drawChart();
    this.onRebuilt(this.all.querySelector("input").checked ? rebuilt : null);
  }

  drawChart() {
    const { fractions, rank, layer } = this;
    const x = (r) => LEFT + ((WIDE - LEFT - 8) * r) / layer.channels;
    const y = (fraction) => BOTTOM - (BOTTOM - TOP) * fraction;
    const ends = stopsPaying(layer);
    this.chart.replaceChildren(
      ...[0, 0.5, 1].flatMap((fraction) => [
        svg("line", { class: "axis", x1: LEFT, x2: WIDE - 8, y1: y(fraction), y2: y(fraction) }),
        svg("text", { x: LEFT - 6, y: y(fraction) + 4, "text-anchor": "end" }, `${100 * fraction} %`)]),
      svg("rect", { class: "paying", x: x(0), y: TOP, width: x(Math.min(ends, layer.channels)) - x(0), height: BOTTOM - TOP }),
      svg("polyline", { class: "line narrow", points: fractions.map((fraction, r) => `${x(r)},${y(fraction)}`).join(" ") }),
      svg("line", { class: "now", x1: x(rank), x2: x(rank), y1: TOP, y2: BOTTOM }),
      svg("circle", { class: "dot-narrow", cx: x(rank), cy: y(fractions[rank]), r: 4 }),
      svg("text", { x: (LEFT + WIDE) / 2, y: BOTTOM + 18, "text-anchor": "middle" }, "r; grey: it takes fewer multiplications"));
    this.chart.setAttribute("aria-label", `Share of the variance kept, for r from 0 to ${layer.channels}: ${format(100 * fractions[rank], 1)} % with ${rank}.`);
  }

  // How many test images are right, asked for when the slider has come to rest.
  async count() {
    const { rank, turn } = this;
    if (!LIVE) {
      this.right.textContent = "How many test images stay right is counted where the page is served: nin serve.";
      return;
    }
    this.right.textContent = "counting …";
    const answer = await this.view.network.narrowed(this.index, rank).catch((error) => error);
    if (turn !== this.turn || rank !== this.rank) return;
    const { right, right_before: before, images } = answer;
    this.right.textContent = answer instanceof Error ? `This could not be counted: ${answer.message}` : `With this layer narrowed and all others as they are, ${right} of ${images} test images looked at are right; ${before} without.`;
  }
}
