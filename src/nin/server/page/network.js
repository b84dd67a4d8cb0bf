// A network that is looked into: what it is made of, its weights and its layers' spectra, each asked for once.

import { count, format } from "./elements.js";
import * as server from "./server.js";

export class Network {
  // run: 0, or 1 for the one beside it.
  constructor(run, model) {
    Object.assign(this, { run, model, layers: model.layers, dead: null, asked: new Map() });
  }

  static async open(run) {
    return new Network(run, await server.model(run));
  }

  once(name, ask) {
    if (!this.asked.has(name)) this.asked.set(name, ask());
    return this.asked.get(name);
  }

  weights(layer) {
    return this.once(`weights ${layer}`, () => server.weights(layer, this.run));
  }

  spectrum(layer) {
    return this.once(`spectrum ${layer}`, () => server.spectrum(layer, this.run));
  }

  narrowed(layer, rank) {
    return this.once(`narrowed ${layer} ${rank}`, () => server.narrowed(layer, rank, this.run));
  }

  // The layer that stands for the one of another network at that place; -1 where there is none.
  layerAt(place) {
    return this.layers.findIndex((layer) => layer.place === place);
  }

  // The channels that a narrowed layer goes through on the way to its own.
  way(place) {
    return this.layers.filter((layer) => layer.place.startsWith(`${place}, part `)).map(({ channels }) => channels);
  }

  get words() {
    const { run, name, parameters, macs, test_accuracy: right } = this.model;
    return `${run}: ${name}, ${count(parameters)} parameters, ${count(macs)} multiply-accumulates for an image.`
      + (right === null ? "" : ` It is right on ${format(100 * right, 1)} % of its test images.`);
  }
}

export const channelsOf = ({ channels }) => (channels === 1 ? "1 channel" : `${channels} channels`);
