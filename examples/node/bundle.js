// The bundle: manifest.json, checked files, and the arrays that lie raw in them. See docs/formats.md.

import { createHash } from "node:crypto";
import { createReadStream, closeSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import path from "node:path";
import { BundleError } from "./errors.js";

const FORMAT = "mass-bundle";
const SCHEMA_VERSION = 3;
const MAX_MANIFEST_BYTES = 64 << 20;
const ITEM_BYTES = { int8: 1, float16: 2, float32: 4, float64: 8 };

/** Read and check manifest.json of a bundle directory. */
export function readManifest(directory) {
  const file = path.join(directory, "manifest.json");
  let manifest;
  try {
    if (statSync(file).size > MAX_MANIFEST_BYTES) throw new Error(`larger than ${MAX_MANIFEST_BYTES} bytes`);
    manifest = JSON.parse(readFileSync(file, "utf8"));
  } catch (error) {
    throw new BundleError(`${file}: cannot be read (${error.message}); give the directory that mass export wrote.`);
  }
  if (manifest?.format !== FORMAT) throw new BundleError(`${file}: not the manifest of a ${FORMAT}.`);
  if (manifest.schema_version !== SCHEMA_VERSION) {
    throw new BundleError(
      `${file}: schema version ${manifest.schema_version}, this program reads ${SCHEMA_VERSION}; export the bundle ` +
        "with a mass-export that writes it.",
    );
  }
  if ((manifest.preprocess.dtype ?? "float32") !== "float32") {
    throw new BundleError(`${file}: its graphs take bytes, this program feeds float32; export it with --input float32.`);
  }
  for (const name of Object.keys(manifest.files)) {
    if (!isPlainName(name)) throw new BundleError(`${file}: unsafe file name ${JSON.stringify(name)}.`);
  }
  for (const pass of Object.values(manifest.passes)) {
    if (!Object.hasOwn(manifest.files, pass.file)) throw new BundleError(`${file}: ${pass.file} is not listed.`);
  }
  for (const matrix of manifest.matrices) {
    for (const array of [matrix.u_t, matrix.s, matrix.vh, matrix.u_scale, matrix.vh_scale]) {
      if (array) requireInside(array, manifest, `${file}: matrix ${matrix.name}`);
    }
  }
  return manifest;
}

/** Compare every listed file with its size and sha256; all problems are named at once. */
export async function checkFiles(directory, manifest) {
  const problems = [];
  for (const [name, expected] of Object.entries(manifest.files)) {
    const file = path.join(directory, name);
    const found = statSync(file, { throwIfNoEntry: false });
    if (!found?.isFile()) problems.push(`${name} is missing`);
    else if (found.size !== expected.bytes) {
      problems.push(`${name} has ${found.size} bytes, expected ${expected.bytes}`);
    } else if ((await sha256(file)) !== expected.sha256) {
      problems.push(`${name} was changed (its sha256 differs from the manifest's)`);
    }
  }
  if (problems.length) {
    throw new BundleError(`${directory}: ${problems.join("; ")}. Copy or export the bundle again.`);
  }
}

/**
 * Read one row (of a task) of a stored array [T, ..].
 * @returns {Float64Array} its values, widened
 */
export function readRow(directory, array, row) {
  const length = array.shape.slice(1).reduce((a, b) => a * b, 1);
  const bytes = Buffer.alloc(length * ITEM_BYTES[array.dtype]);
  const handle = openSync(path.join(directory, array.file), "r");
  try {
    const start = array.offset + row * (array.stride ?? bytes.length);
    for (let done = 0; done < bytes.length; ) {
      const read = readSync(handle, bytes, done, bytes.length - done, start + done);
      if (!read) throw new BundleError(`${array.file}: ends before byte ${start + bytes.length}.`);
      done += read;
    }
  } finally {
    closeSync(handle);
  }
  const values = new Float64Array(length);
  const read = READERS[array.dtype];
  for (let i = 0; i < length; i++) values[i] = read(bytes, i);
  return values;
}

const READERS = {
  int8: (bytes, i) => bytes.readInt8(i),
  float16: (bytes, i) => halfFromBits(bytes.readUInt16LE(2 * i)),
  float32: (bytes, i) => bytes.readFloatLE(4 * i),
  float64: (bytes, i) => bytes.readDoubleLE(8 * i),
};

function halfFromBits(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

function isPlainName(name) {
  return name !== "" && name !== "." && name !== ".." && name !== "manifest.json" && !/[/\\:\p{C}]/u.test(name);
}

function requireInside(array, manifest, where) {
  const item = ITEM_BYTES[array.dtype];
  const entry = array.shape.slice(1).reduce((a, b) => a * b, item);
  const stride = array.stride ?? entry;
  const bytes = entry && array.shape[0] ? (array.shape[0] - 1) * stride + entry : 0;
  const inside =
    array.offset >= 0 && stride >= entry && array.offset + bytes <= (manifest.files[array.file]?.bytes ?? -1);
  if (!item || !inside) throw new BundleError(`${where}: an array of ${array.dtype} lies outside ${array.file}.`);
}

async function sha256(file) {
  const hash = createHash("sha256");
  for await (const block of createReadStream(file)) hash.update(block);
  return hash.digest("hex");
}
