// What the look inside asks the server for.

async function json(answer) {
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof value.detail === "string" ? value.detail : `the server answered ${answer.status}`);
  return value;
}

const send = (path, image) => fetch(path, { method: "POST", body: image, headers: { "Content-Type": image.type || "application/octet-stream" } }).then(json);

function numbers({ shape, values }) {
  const bytes = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0));
  return { shape, values: new Float32Array(bytes.buffer) };
}

export const model = () => fetch("api/model").then(json);
export const samples = () => fetch("api/samples").then(json);
export const dead = () => fetch("api/dead").then(json);
export const predict = (image, maps) => send(`api/predict?maps=${maps}`, image).then(({ predictions }) => predictions[0]);
export const activations = (image, layer) => send(`api/layers/${layer}/activations`, image).then(numbers);

export async function weights(layer) {
  const { weight, bias } = await fetch(`api/layers/${layer}/weights`).then(json);
  return { weight: numbers(weight), bias: bias && numbers(bias) };
}
