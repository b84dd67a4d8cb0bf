// Decodes the arrays of the API: {shape, values}, float32 in base64.

export function numbers({ shape, values }) {
  return { shape, values: new Float32Array(bytes(values).buffer) };
}

export const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export const weightsOf = ({ weight, bias }) => ({ weight: numbers(weight), bias: bias && numbers(bias) });

export const spectrumOf = ({ mean, directions, variances, ...rest }) => ({ mean: numbers(mean), directions: numbers(directions), variances: numbers(variances), ...rest });
