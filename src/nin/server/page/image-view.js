// The view of one image: its choice, the network's prediction, and the map of each class over it.

import { drawMap, pixelAt } from "./feature-maps.js";
import { announce, element, format, number, setNumber } from "./elements.js";
import { largest } from "./maths.js";
import { picture } from "./photo.js";
import { Requests } from "./requests.js";
import * as server from "./api-client.js";

const TOP = 4; // classes listed

export class ImageView {
  // network: that classifies the image. samples: the run's test images to choose from; null where another view chooses.
  // onChange(view) after another image was chosen, onPlace(place) when another pixel is pointed at.
  constructor(network, name, samples, { onChange, onPlace }) {
    Object.assign(this, { network, name, onChange, image: null, outputs: new Requests(), prediction: null, shownMap: null, place: [0.5, 0.5], channel: 0 });
    const makePicture = (label) => picture({ label, square: true, onSelect: (r, c) => this.point(r, c, onPlace), onHover: (r, c) => this.point(r, c, onPlace) });
    this.picture = makePicture(`${name}, as the network sees it`);
    this.overlay = makePicture(`map of a class over ${name}`);
    this.overlay.canvas.classList.add("under");
    this.map = element("canvas", { class: "over" });
    this.overlay.canvas.after(this.map);
    this.classes = element("select", { "aria-label": `class of the map over ${name}` }, ...network.model.classes.map((label, i) => element("option", { value: i }, label)));
    this.classes.addEventListener("change", () => this.drawClass());
    this.value = number(0, 3, { "data-map-value": "" });
    this.list = element("dl", { class: "answer" });
    this.problem = element("p", { class: "problem", role: "alert", hidden: true });
    this.truth = element("p", { class: "quiet" });
    this.choices = [];
    this.element = element("div", { class: "look" }, this.problem, this.body());
    this.chooser = samples && this.makeChooser(samples);
  }

  makeChooser(samples) {
    this.offered = element("fieldset", { class: "choices" });
    this.offer(samples, "test images");
    return element("div", {}, server.LIVE ? this.opener() : null, samples.length ? this.offered : null);
  }

  // Offers test images to choose from; kind is what each of them is.
  offer(samples, name, kind = "test image") {
    this.choices = samples.map((sample, i) => element("button", {
      type: "button", class: "choice", "aria-pressed": "false", "aria-label": `${kind} ${i + 1}, a ${sample.label}`,
      onclick: () => this.openSample(samples, i),
    }, element("img", { src: sample.image, alt: "" })));
    this.offered.replaceChildren(element("legend", {}, name), ...this.choices);
  }

  // Where an image of the visitor's is opened, or dropped.
  opener() {
    const open = (files) => files.length && this.open({ blob: files[0], label: null, sample: -1, pressed: -1 });
    const file = element("input", { type: "file", accept: "image/*" });
    file.addEventListener("change", () => open(file.files));
    const drop = element("div", { class: "drop row" }, element("label", { class: "button" }, file, `Open ${this.name.startsWith("image") ? this.name : "an image"}`), element("span", { class: "quiet" }, "or drop one here"));
    const over = (on) => (event) => {
      event.preventDefault();
      drop.classList.toggle("over", on);
    };
    drop.addEventListener("dragover", over(true));
    drop.addEventListener("dragleave", over(false));
    drop.addEventListener("drop", (event) => {
      over(false)(event);
      open(event.dataTransfer.files);
    });
    return drop;
  }

  body() {
    const caption = element("div", { class: "row" }, element("label", { class: "quiet" }, "evidence for ", this.classes), element("span", { class: "quiet" }, "here: ", this.value));
    this.note = element("p", { class: "quiet", "data-map-note": "", hidden: true });
    this.shown = element("div", { hidden: true },
      element("div", { class: "photos" },
        element("div", { class: "part" }, this.picture.element, this.truth),
        element("div", { class: "part" }, this.overlay.element, caption, this.note)),
      this.list);
    return this.shown;
  }

  async openSample(samples, index) {
    const bytes = Uint8Array.from(atob(samples[index].image.split(",")[1]), (letter) => letter.charCodeAt(0));
    await this.open({ blob: new Blob([bytes], { type: "image/png" }), label: samples[index].label, sample: samples[index].place ?? index, pressed: index });
  }

  async open(image) {
    try {
      const prediction = await server.predict(image, this.network.run);
      Object.assign(this, { image, prediction, outputs: new Requests() });
    } catch (error) {
      this.problem.textContent = `This image could not be read: ${error.message}`;
      this.problem.hidden = false;
      return;
    }
    this.problem.hidden = true;
    this.shown.hidden = false;
    this.choices.forEach((button, i) => button.setAttribute("aria-pressed", i === image.pressed));
    this.truth.textContent = image.label === null ? "an image of yours" : `it is: ${image.label}`;
    this.showPrediction();
    await this.showPicture();
    announce(`${this.name}: ${predictionWords(this.prediction)}`);
    await this.onChange(this);
  }

  // A layer's activations on the image, requested once; and its sums, before the activation.
  layer(index) {
    return this.once(index, () => server.activations(this.image, index, this.network.run));
  }

  sums(index) {
    return this.once(`sums ${index}`, () => server.sums(this.image, index, this.network.run));
  }

  once(name, request) {
    return this.outputs.once(name, request);
  }

  showPrediction() {
    const ranked = Object.entries(this.prediction.probabilities).sort(([, a], [, b]) => b - a).slice(0, TOP);
    this.list.replaceChildren(...ranked.flatMap(([label, share], i) => {
      const bar = element("i");
      bar.style.width = `${100 * share}%`;
      return [
        element("dt", { class: i ? "" : "first" }, label),
        element("dd", { class: "bar", "aria-hidden": "true" }, bar),
        element("dd", {}, number(100 * share, 1, { "data-confidence": label }), " %"),
      ];
    }));
    this.classes.value = String(this.network.model.classes.indexOf(this.prediction.label));
  }

  async showPicture() {
    const { shape: [channels, height, width], values } = await this.layer(0);
    const image = new ImageData(width, height);
    const { mean, std } = this.network.model;
    for (let p = 0; p < height * width; p++) {
      for (let c = 0; c < 3; c++) {
        const from = Math.min(c, channels - 1);
        image.data[4 * p + c] = Math.round(255 * (values[from * height * width + p] * std[from] + mean[from]));
      }
      image.data[4 * p + 3] = 255;
    }
    for (const shown of [this.picture, this.overlay]) {
      shown.draw(image);
      shown.canvas.classList.toggle("pixelated", width <= 64);
    }
    await this.drawClass();
    this.show(this.place);
  }

  // The map of the class that is chosen: {shape: [1, h, w], values, limit}; null where it can be neither made nor approximated.
  async classMap() {
    const [chosen, { maps }, { no_maps_reason: reason }] = [Number(this.classes.value), this.prediction, this.network.model];
    if (!reason) return { shape: [1, maps[chosen].length, maps[chosen][0].length], values: maps[chosen].flat(), limit: largest(maps.flat(2)) };
    this.note.hidden = false;
    this.note.textContent = `An approximation, by Grad-CAM, as there are no exact maps: ${reason}.`;
    try {
      const map = await this.once(`class ${chosen}`, () => server.approximateMap(this.image, chosen, this.network.run));
      return { ...map, limit: 1 };
    } catch (error) {
      this.note.textContent = `There are no exact maps: ${reason}. Nor an approximation: ${error.message}.`;
      return null;
    }
  }

  async drawClass() {
    const [image, chosen] = [this.image, this.classes.value];
    const map = await this.classMap();
    if (image !== this.image || chosen !== this.classes.value) return; // another was chosen meanwhile
    this.shownMap = map;
    if (map) drawMap(this.map, [...map.values], map.shape[1], map.shape[2], map.limit);
    else this.map.getContext("2d").clearRect(0, 0, this.map.width, this.map.height);
    this.show(this.place);
  }

  point(row, column, onPlace) {
    onPlace([(row + 0.5) / this.picture.canvas.height, (column + 0.5) / this.picture.canvas.width]);
  }

  show(place) {
    this.place = place;
    if (!this.prediction) return;
    const [row, column] = pixelAt({ shape: [0, this.picture.canvas.height, this.picture.canvas.width] }, place);
    this.picture.mark(row, column);
    this.overlay.mark(row, column);
    if (!this.shownMap) return;
    const [r, c] = pixelAt(this.shownMap, place);
    setNumber(this.value, this.shownMap.values[r * this.shownMap.shape[2] + c], 3);
  }
}

const predictionWords = ({ label, confidence }) => `${label}, ${format(100 * confidence, 1)} % sure`;
