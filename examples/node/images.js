// Inputs: normalised pixel values from a numpy file, or a PNG picture of the model's size.

import { readFileSync } from "node:fs";
import { PNG } from "pngjs";
import { BundleError } from "./errors.js";

/**
 * Pixel values of a file.
 * @param {string} file a `.npy` of float32 [B, 3, H, W], or a `.png`
 * @param {object} preprocess of the manifest
 * @returns {{data: Float32Array, shape: number[]}} [B, 3, H, W]
 */
export function pixelValuesFromFile(file, preprocess) {
  let bytes;
  try {
    bytes = readFileSync(file);
  } catch (error) {
    throw new BundleError(`${file}: cannot be read (${error.message}).`);
  }
  return file.endsWith(".npy") ? fromNumpy(bytes, file) : fromPng(bytes, file, preprocess);
}

/** Format 1.0 or 2.0 of numpy.save: a magic number, a header that is a Python dictionary, the values. */
function fromNumpy(bytes, file) {
  const version = bytes[6];
  const start = version === 1 ? 10 : 12;
  const end = start + (version === 1 ? bytes.readUInt16LE(8) : bytes.readUInt32LE(8));
  const header = bytes.toString("latin1", start, end);
  const shape = /'shape': \(([\d, ]*)\)/.exec(header)?.[1].split(",").filter((size) => size.trim()).map(Number);
  const isPlain = bytes.toString("latin1", 1, 6) === "NUMPY" && /'descr': '<f4'/.test(header);
  if (!isPlain || !/'fortran_order': False/.test(header) || !shape) {
    throw new BundleError(`${file}: expected a float32 array in C order that numpy.save wrote.`);
  }
  const count = shape.reduce((a, b) => a * b, 1);
  if (bytes.length !== end + 4 * count) {
    throw new BundleError(`${file}: ${bytes.length - end} bytes of values, expected ${4 * count}.`);
  }
  return { data: Float32Array.from({ length: count }, (_, i) => bytes.readFloatLE(end + 4 * i)), shape };
}

/** Divide by 255, normalise, channels first; each step in single precision, as the Python runtime does it. */
function fromPng(bytes, file, { image_size: [height, width], mean, std }) {
  let picture;
  try {
    picture = PNG.sync.read(bytes);
  } catch (error) {
    throw new BundleError(`${file}: not a PNG file, or damaged (${error.message}).`);
  }
  if (picture.height !== height || picture.width !== width) {
    throw new BundleError(
      `${file}: ${picture.width} x ${picture.height} pixels, expected ${width} x ${height}; resize it first, as the ` +
        "manifest's preprocess says.",
    );
  }
  if (picture.depth > 8 || picture.transColor) {
    throw new BundleError(`${file}: expected 8 bits a channel and no transparent colour; convert it first.`);
  }
  const [scale, data] = [Math.fround(255), new Float32Array(3 * height * width)];
  for (let channel = 0; channel < 3; channel++) {
    const [centre, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    for (let i = 0; i < height * width; i++) {
      const value = Math.fround(picture.data[4 * i + channel] / scale); // RGBA; alpha is ignored
      data[channel * height * width + i] = Math.fround(value - centre) / spread;
    }
  }
  return { data, shape: [1, 3, height, width] };
}
