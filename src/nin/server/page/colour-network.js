// A 1×1 network 3 → 8 → 1 that learns to classify colours: ReLU, sigmoid, and Adam, in float64.

import { normals, random } from "./maths.js";

export const HIDDEN = 8;
const LEARNING_RATE = 0.03;
const BATCH_SIZE = 256; // pixels of each class in a step

export class ColourNetwork {
  // colours: (pixels, 3), from 0 to 1; wanted: 1 where a pixel's colour is wanted.
  constructor(colours, wanted, seed = 1) {
    this.draw = random(seed);
    this.colours = colours;
    this.places = [[], []];
    wanted.forEach((yes, p) => this.places[yes].push(p));
    // weights of the hidden layer (8, 3), its biases, weights of the last, its bias
    this.parameters = Float64Array.from([...normals(3 * HIDDEN, this.draw, 1.2), ...new Float64Array(HIDDEN), ...normals(HIDDEN, this.draw, 0.5), 0]);
    this.moments = [new Float64Array(this.parameters.length), new Float64Array(this.parameters.length)];
    this.steps = 0;
  }

  // The probability that a colour is wanted; red, green and blue are centred first.
  predict(r, g, b, hidden = null) {
    const w = this.parameters;
    let z = w[5 * HIDDEN];
    for (let h = 0; h < HIDDEN; h++) {
      const a = w[3 * h] * (r - 0.5) + w[3 * h + 1] * (g - 0.5) + w[3 * h + 2] * (b - 0.5) + w[3 * HIDDEN + h];
      const value = a > 0 ? a : 0;
      if (hidden) hidden[h] = value;
      z += w[4 * HIDDEN + h] * value;
    }
    return 1 / (1 + Math.exp(-z));
  }

  // One step of Adam on as many wanted as unwanted pixels; returns the mean loss.
  step() {
    const w = this.parameters;
    const gradient = new Float64Array(w.length);
    const hidden = new Float64Array(HIDDEN);
    let loss = 0;
    for (let i = 0; i < 2 * BATCH_SIZE; i++) {
      const wanted = i % 2;
      const places = this.places[wanted];
      const p = 3 * places[Math.floor(this.draw() * places.length)];
      const colour = [this.colours[p], this.colours[p + 1], this.colours[p + 2]];
      const predicted = this.predict(...colour, hidden);
      loss -= Math.log(Math.max(1e-12, wanted ? predicted : 1 - predicted)) / (2 * BATCH_SIZE);
      const error = (predicted - wanted) / (2 * BATCH_SIZE);
      gradient[5 * HIDDEN] += error;
      for (let h = 0; h < HIDDEN; h++) {
        gradient[4 * HIDDEN + h] += error * hidden[h];
        if (hidden[h] > 0) {
          const back = error * w[4 * HIDDEN + h];
          for (let c = 0; c < 3; c++) gradient[3 * h + c] += back * (colour[c] - 0.5);
          gradient[3 * HIDDEN + h] += back;
        }
      }
    }
    this.adam(gradient);
    return loss;
  }

  adam(gradient) {
    const [first, second] = this.moments;
    this.steps += 1;
    for (let i = 0; i < gradient.length; i++) {
      first[i] = 0.9 * first[i] + 0.1 * gradient[i];
      second[i] = 0.999 * second[i] + 0.001 * gradient[i] * gradient[i];
      const size = (first[i] / (1 - 0.9 ** this.steps)) / (Math.sqrt(second[i] / (1 - 0.999 ** this.steps)) + 1e-8);
      this.parameters[i] -= LEARNING_RATE * size;
    }
  }
}
