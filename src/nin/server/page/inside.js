// Look inside the network that is served: images, layers, channels, and the numbers at a pixel.

import { channel, drawMap } from "./contributions.js";
import { checkbox, count, element, format } from "./elements.js";
import { Look } from "./look.js";
import { largest } from "./maths.js";
import { tracePath } from "./path.js";
import * as server from "./server.js";

const MOST_CHANNELS = 256; // maps shown of one layer

export async function inside(figure, words) {
  const model = await server.model();
  const accuracy = model.test_accuracy === null ? "" : ` It is right on ${format(100 * model.test_accuracy, 1)} % of its test images.`;
  words.textContent = `${model.run}: ${model.name}, ${count(model.parameters)} parameters, ${count(model.macs)} multiply-accumulates for an image.${accuracy}`;
  const { samples, reason } = await readSamples(words);
  const layers = element("div", { class: "layers", role: "group", "aria-label": "layers" });
  const channels = element("div", { class: "looks" });
  const paths = element("div", { class: "looks", "data-paths": "" });
  const title = element("h3");
  const block = element("div", { class: "block", hidden: true }, element("h3", {}, "Layer by layer"), layers, title, channels, element("div", { class: "block" }, paths));
  const state = { layer: Math.max(0, model.layers.length - 1), channel: 0, place: [0.5, 0.5], dead: null, turn: 0 };

  const look = (name) => new Look(model, name, samples, { onChange: update, onPlace: (place) => { state.place = place; point(); } });
  const looks = [look("A")];
  const panels = element("div", { class: "looks" }, looks[0].element);
  const compare = checkbox("Compare with a second image", false, async (on) => {
    if (on && looks.length < 2) {
      looks.push(look("B"));
      panels.append(looks[1].element);
      if (samples.length > 1) await looks[1].openSample(samples, 1);
    } else if (!on) looks.splice(1).forEach((gone) => gone.element.remove());
    update();
  });
  const buttons = model.layers.map((layer, i) => element("button", {
    type: "button", "aria-pressed": "false", onclick: () => { Object.assign(state, { layer: i, channel: 0 }); update(); },
  }, layer.name, element("small", {}, channelsOf(layer))));
  layers.append(...buttons);
  if (reason) figure.append(element("p", { class: "quiet" }, reason));
  figure.append(element("div", { class: "controls" }, compare), panels, block);

  async function update() {
    const seen = looks.filter(({ image }) => image);
    if (!seen.length || !model.layers.length) return;
    block.hidden = false;
    const turn = (state.turn += 1);
    const layer = model.layers[state.layer];
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === state.layer));
    const silent = state.dead?.channels[state.layer] ?? [];
    title.textContent = `${layer.name}: ${channelsOf(layer)}`
      + (state.dead ? `, ${silent.length} dead on all of ${state.dead.images} test images` : "");
    const drawn = await Promise.all(seen.map((one) => channelMaps(one, layer, silent)));
    if (turn !== state.turn) return; // another layer was chosen meanwhile
    channels.replaceChildren(...drawn);
    await point();
  }

  async function channelMaps(one, layer, silent) {
    const output = await one.layer(state.layer);
    const limit = largest(output.values);
    const shown = Math.min(MOST_CHANNELS, output.shape[0]);
    const last = state.layer === model.layers.length - 1;
    const maps = Array.from({ length: shown }, (_, c) => {
      const canvas = element("canvas");
      drawMap(canvas, channel(output, c), output.shape[1], output.shape[2], limit);
      const name = last ? model.classes[c] : String(c + 1);
      return element("button", {
        type: "button", "data-channel": c, "aria-pressed": c === state.channel, "aria-label": `image ${one.name}, channel ${name}${silent.includes(c) ? ", dead" : ""}`,
        onclick: () => { state.channel = c; choose(); },
      }, canvas, silent.includes(c) ? `${name} ✕` : name);
    });
    return element("div", {}, element("p", { class: "caption" }, `image ${one.name}, ${output.shape[1]}×${output.shape[2]} pixels${shown < output.shape[0] ? `, the first ${shown}` : ""}`), element("div", { class: "channels" }, ...maps));
  }

  function choose() {
    for (const button of channels.querySelectorAll("button")) button.setAttribute("aria-pressed", Number(button.dataset.channel) === state.channel);
    point();
  }

  async function point() {
    const seen = looks.filter(({ image }) => image);
    for (const one of seen) one.show(state.place);
    if (!model.layers.length) return;
    const turn = (state.turn += 1);
    const traced = await Promise.all(seen.map((one) => tracePath(model, one, state.layer, state.channel, state.place)));
    if (turn === state.turn) paths.replaceChildren(...traced);
  }

  if (samples.length) {
    state.dead = model.has_maps ? await server.dead().catch(() => null) : null;
    await looks[0].openSample(samples, 0);
  }
}

const channelsOf = ({ channels }) => (channels === 1 ? "1 channel" : `${channels} channels`);

// The run's test images; they may still be being read from their files.
async function readSamples(words) {
  const text = words.textContent;
  for (;;) {
    const answer = await server.samples();
    if (answer.state !== "reading") {
      words.textContent = text;
      return answer;
    }
    words.textContent = `${text} Its test images are being read …`;
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}
