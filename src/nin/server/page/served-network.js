// A network of the server: its layers, and their weights and principal components, each requested once.

import { count, format } from "./elements.js";
import { Requests } from "./requests.js";
import * as server from "./api-client.js";

export class ServedNetwork {
  // run: 0, or 1 for the one beside it.
  constructor(run, model) {
    Object.assign(this, { run, model, layers: model.layers, dead: null, requests: new Requests() });
  }

  static async open(run) {
    return new ServedNetwork(run, await server.model(run));
  }

  once(name, request) {
    return this.requests.once(name, request);
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

  // The index of the layer at that place, by which another network's layer is found; -1 where there is none.
  layerAt(place) {
    return this.layers.findIndex((layer) => layer.place === place);
  }

  // The channels between the factors of a narrowed layer.
  innerChannels(place) {
    return this.layers.filter((layer) => layer.place.startsWith(`${place}, part `)).map(({ channels }) => channels);
  }

  get words() {
    const { run, name, parameters, macs, test_accuracy: right, unfinished } = this.model;
    return `${run}: ${name}, ${count(parameters)} parameters, ${count(macs)} multiply-accumulates for an image.`
      + (unfinished ? ` Its training has not ended: it is that of ${unfinished}.` : "")
      + (right === null ? "" : ` It is right on ${format(100 * right, 1)} % of its test images.`);
  }
}

export const channelsOf = ({ channels }) => (channels === 1 ? "1 channel" : `${channels} channels`);
