// Decodes the arrays of the API: {shape, values}, float32 in base64; in an export {shape, scale, values}, whole numbers
// of 16 bits that are multiplied by the scale.

export function numbers({ shape, scale, values }) {
  const { buffer } = bytes(values);
  return { shape, values: scale === undefined ? new Float32Array(buffer) : Float32Array.from(new Int16Array(buffer), (share) => share * scale) };
}

export const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export const weightsOf = ({ weight, bias }) => ({ weight: numbers(weight), bias: bias && numbers(bias) });

export const spectrumOf = ({ mean, directions, variances, ...rest }) => ({ mean: numbers(mean), directions: numbers(directions), variances: numbers(variances), ...rest });
