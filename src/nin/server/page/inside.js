// Look inside a served network: images, layers, channels, and the numbers at a pixel; two runs beside each other.

import { channel, drawMap, mostAlike } from "./feature-maps.js";
import { checkbox, element, format } from "./elements.js";
import { ImageView } from "./image-view.js";
import { largest } from "./maths.js";
import { NarrowingPanel } from "./narrowing-panel.js";
import { ServedNetwork, channelsOf } from "./served-network.js";
import { tracePixel } from "./pixel-trace.js";
import * as server from "./api-client.js";

const MOST_CHANNELS = 256; // maps shown of one layer

export async function inside(figure, words, { beside }) {
  const networks = await Promise.all((beside ? [0, 1] : [0]).map(ServedNetwork.open));
  words.replaceChildren(...networks.flatMap((one, i) => (i ? [element("br"), one.words] : [one.words])));
  const { samples, reason } = await readSamples(words);
  const shown = new Inside(networks, samples);
  if (reason) figure.append(element("p", { class: "quiet" }, reason));
  figure.append(shown.element);
  if (!samples.length) return;
  await Promise.all(networks.map(async (one) => {
    one.dead = await server.dead(one.run).catch(() => null);
  }));
  await shown.views[0].openSample(samples, 0);
}

class Inside {
  constructor(networks, samples) {
    const [network] = networks;
    Object.assign(this, { network, samples, layer: network.layers.length - 1, channel: 0, place: [0.5, 0.5], turn: 0 });
    this.beside = networks.length > 1;
    this.views = this.beside
      ? networks.map((one, i) => this.makeView(one, `run ${nameOf(networks, i)}`, i ? null : samples))
      : [this.makeView(network, "image A", samples)];
    this.panels = element("div", { class: "looks" }, ...this.views.map((view) => this.panel(view)));
    this.layerButtons = network.layers.map((layer, i) => this.layerButton(layer, i));
    this.title = element("h3");
    this.status = element("p", { class: "said", role: "status", hidden: true });
    this.channels = element("div", { class: "looks" });
    this.paths = element("div", { class: "looks", "data-paths": "" });
    this.narrowed = new NarrowingPanel((rebuilt) => this.redraw(rebuilt));
    this.block = element("div", { class: "block", hidden: true },
      element("h3", {}, "Layer by layer"), this.layerRows(), this.title, this.status, this.channels, element("div", { class: "block" }, this.paths), this.narrowed.element);
    this.offered = [samples, "test images"];
    this.found = element("span", { class: "quiet", role: "status" });
    const wrong = checkbox(`Show ${this.beside ? `the mistakes of ${this.views[0].name}` : "its mistakes"}`, false, (on) => this.showMistakes(on));
    const compare = this.beside ? null : checkbox("Compare with a second image", false, (on) => this.compare(on));
    const above = element("div", { class: "controls" }, compare, samples.length ? wrong : null, this.found);
    this.element = element("div", {}, above, this.beside ? this.views[0].chooser : null, this.panels, this.block);
  }

  makeView(network, name, samples) {
    return new ImageView(network, name, samples, {
      onChange: (view) => this.opened(view),
      onPlace: (place) => {
        this.place = place;
        this.point();
      },
    });
  }

  panel(view) {
    if (!this.beside) return element("div", {}, view.chooser, view.element);
    return element("div", {}, element("h3", {}, view.name), view.element);
  }

  // The layers, a row for each block.
  layerRows() {
    const rows = new Map();
    this.network.layers.forEach(({ block }, i) => rows.set(block, [...(rows.get(block) ?? []), this.layerButtons[i]]));
    return element("div", { role: "group", "aria-label": "layers" }, ...[...rows.values()].map((buttons) => element("div", { class: "layers" }, ...buttons)));
  }

  layerButton(layer, index) {
    const choose = () => {
      this.stop();
      Object.assign(this, { layer: index, channel: 0 });
      this.update();
    };
    return element("button", { type: "button", "aria-pressed": "false", onclick: choose }, layer.name, element("small", {}, channelsOf(layer)));
  }

  // What is still being computed for the layer shown is of no use any more.
  stop() {
    server.stopLayers();
    for (const view of this.views) {
      view.outputs.forgetPending();
      view.network.requests.forgetPending();
    }
  }

  // Offers the test images that the network is wrong on instead of some of each class.
  async showMistakes(on) {
    this.wanted = on;
    let said = "";
    let offered = [this.samples, "test images"];
    if (on) {
      this.found.textContent = "The test images are being classified …";
      try {
        this.mistakes ??= await server.mistakes(this.network.run);
        const { images, wrong, samples } = this.mistakes;
        if (wrong) offered = [samples, `mistakes: ${samples.length === wrong ? "all" : `${samples.length} of the`} ${wrong} among ${images} test images, the surest first`, "mistake"];
        else said = `There are none among the ${images} test images looked at.`;
      } catch (error) {
        said = error.message;
      }
    }
    if (this.wanted !== on) return; // clicked again meanwhile
    this.found.textContent = said;
    this.offered = offered;
    for (const view of this.views) if (view.chooser) view.offer(...offered);
  }

  // The second view follows the first where two runs are beside each other.
  async opened(view) {
    const [first, second] = this.views;
    if (this.block.hidden) this.channel = this.network.model.classes.indexOf(view.prediction.label); // the map that counts most
    if (this.beside && view === first) await second.open(first.image);
    else await this.update();
  }

  async compare(on) {
    if (on) {
      this.views.push(this.makeView(this.network, "image B", this.samples));
      this.views[1].offer(...this.offered);
      this.panels.append(this.panel(this.views[1]));
      if (this.samples.length > 1) await this.views[1].openSample(this.samples, 1);
    } else this.views.splice(1).forEach((gone) => gone.element.parentElement.remove());
    await this.update();
  }

  get seen() {
    return this.views.filter(({ image }) => image);
  }

  async update() {
    const { seen, network } = this;
    if (!seen.length) return;
    this.block.hidden = false;
    const turn = (this.shown = this.turn += 1);
    const layer = network.layers[this.layer];
    this.layerButtons.forEach((button, i) => button.setAttribute("aria-pressed", i === this.layer));
    const silent = network.dead?.channels[this.layer] ?? [];
    this.title.textContent = `${layer.name}: ${channelsOf(layer)}`
      + (network.dead ? `, ${silent.length} dead on all of ${network.dead.images} test images` : "");
    for (const view of seen) view.index = view.network.layerAt(layer.place);
    // what is shown of another layer goes at once: the numbers of a large one take seconds
    this.channels.replaceChildren();
    this.paths.replaceChildren();
    this.narrowed.close();
    this.say("This layer is being computed …");
    try {
      const drawn = await Promise.all(seen.map((view) => this.channelMaps(view)));
      if (turn !== this.turn) return; // another layer was chosen meanwhile
      this.channels.replaceChildren(...drawn);
      await this.choose(this.channel);
      if (turn === this.shown) this.say("");
    } catch (error) {
      if (turn === this.shown) this.say(`This layer could not be shown: ${error.message}`);
    }
  }

  // What is being done, where it takes a while; nothing where all is shown.
  say(words) {
    this.status.textContent = words;
    this.status.hidden = !words;
    this.block.setAttribute("aria-busy", words.endsWith("…"));
  }

  async channelMaps(view) {
    const { network, index } = view;
    if (index < 0) return element("p", { class: "quiet" }, `${view.name} has no layer that stands for this one.`);
    const output = await view.layer(index);
    const limit = largest(output.values);
    const count = Math.min(MOST_CHANNELS, output.shape[0]);
    const silent = new Set(network.dead?.channels[index] ?? []);
    view.canvases = Array.from({ length: count }, () => element("canvas"));
    const maps = view.canvases.map((canvas, c) => {
      drawMap(canvas, channel(output, c), output.shape[1], output.shape[2], limit);
      const name = index === network.layers.length - 1 ? network.model.classes[c] : String(c + 1);
      return element("button", {
        type: "button", "data-channel": c, "aria-pressed": "false", "aria-label": `${view.name}, channel ${name}${silent.has(c) ? ", dead" : ""}`,
        onclick: () => this.choose(c, view),
      }, canvas, silent.has(c) ? `${name} ✕` : name);
    });
    view.note = element("p", { class: "quiet" });
    return element("div", {}, element("p", { class: "caption" }, caption(view, output, count)), view.note, element("div", { class: "channels" }, ...maps));
  }

  // Chooses a channel of one view, and in the others the same, or the most correlated one where the layers differ.
  async choose(chosen, from = this.views[0]) {
    if (from === this.views[0]) this.channel = chosen;
    from.channel = chosen;
    const outputs = await Promise.all(this.seen.map((view) => (view.index < 0 ? null : view.layer(view.index))));
    const base = outputs[this.seen.indexOf(from)];
    this.seen.forEach((view, i) => {
      if (!outputs[i]) return;
      const other = view !== from && outputs[i].shape[0] !== base.shape[0];
      const alike = other ? mostAlike(base, chosen, outputs[i]) : { channel: chosen };
      view.channel = alike.channel;
      view.note.textContent = other ? `channel ${alike.channel + 1} is most like the chosen one on this image: correlation ${format(alike.correlation, 2)}` : "";
    });
    this.seen.forEach((view, i) => {
      for (const button of this.channels.children[i]?.querySelectorAll("button") ?? []) button.setAttribute("aria-pressed", Number(button.dataset.channel) === view.channel);
    });
    await this.point();
    const [first] = this.seen;
    if (first.index >= 0) await this.narrowed.open(first, first.index, first.channel);
  }

  // Draws the first view's maps narrowed, or as they are.
  async redraw(rebuilt) {
    const [first] = this.seen;
    if (!first?.canvases || first.index < 0) return;
    const output = await first.layer(first.index);
    const limit = largest(output.values);
    const shown = rebuilt ?? output;
    if (shown.shape[0] < first.canvases.length) return;
    first.canvases.forEach((canvas, c) => drawMap(canvas, channel(shown, c), shown.shape[1], shown.shape[2], limit));
  }

  async point() {
    for (const view of this.seen) view.show(this.place);
    const turn = (this.turn += 1);
    const traced = await Promise.all(this.seen.map((view) => (view.index < 0 ? element("p") : tracePixel(view, view.index, view.channel, this.place))));
    if (turn === this.turn) this.paths.replaceChildren(...traced);
  }
}

function caption(view, output, count) {
  const [channels, height, width] = output.shape;
  const inner = view.network.innerChannels(view.network.layers[view.index].place);
  return `${view.name}, ${height}×${width} pixels${count < channels ? `, the first ${count}` : ""}`
    + (inner.length ? `, ${channels} channels by way of ${inner.join(" and ")}` : "");
}

// The folder's name, and which of the two it is where both have the same.
function nameOf(networks, i) {
  const names = networks.map(({ model }) => model.run);
  return names[0] === names[1] ? `${names[i]} (${i + 1})` : names[i];
}

// The run's test images; they may still be being read from their files.
async function readSamples(words) {
  const waiting = element("span", {}, " Its test images are being read …");
  words.append(waiting);
  for (;;) {
    const answer = await server.samples();
    if (answer.state !== "reading") {
      waiting.remove();
      return answer;
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}
