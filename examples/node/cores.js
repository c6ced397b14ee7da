// Cores: the small matrices M that turn stacked low-rank bases into the TSV-M merge of a set of tasks,
// delta = U M VH with M = (U^T U)^(-1/2) diag(S) (VH VH^T)^(-1/2). A core depends on the set alone.

import { readRow } from "./bundle.js";
import { gram, inverseSquareRoot, scaledProduct } from "./linear_algebra.js";

/**
 * Cores of one set.
 * @param {string} directory of the bundle
 * @param {object[]} matrices of its manifest
 * @param {number[]} tasks indices, ascending
 * @returns {Map<string, {side: number, values: Float32Array}>} second-pass input -> core [side, side]
 */
export function computeCores(directory, matrices, tasks) {
  const cores = new Map();
  for (const matrix of matrices) cores.set(matrix.core, computeCore(directory, matrix, tasks));
  return cores;
}

function computeCore(directory, matrix, tasks) {
  const stacked = (array) => (array ? concatenated(tasks.map((task) => readRow(directory, array, task))) : null);
  const s = stacked(matrix.s); // [K*R]
  const side = s.length;
  const [leftScale, rightScale] = [stacked(matrix.u_scale), stacked(matrix.vh_scale)];
  let core;
  if (tasks.length === 1 || s.every((value) => value === 0)) {
    core = new Float64Array(side * side);
    for (let i = 0; i < side; i++) core[i * side + i] = s[i];
  } else {
    const left = scaledRows(stacked(matrix.u_t), leftScale, side); // [K*R, D_out]
    const right = scaledRows(stacked(matrix.vh), rightScale, side); // [K*R, D_in]
    core = scaledProduct(
      inverseSquareRoot(gram(left, side), side),
      s,
      inverseSquareRoot(gram(right, side), side),
      side,
    );
  }
  if (leftScale) {
    // int8: the graph multiplies bare steps, so that cores carry the scales of their rows.
    for (let i = 0; i < side; i++) for (let j = 0; j < side; j++) core[i * side + j] *= leftScale[i] * rightScale[j];
  }
  return { side, values: Float32Array.from(core) };
}

function concatenated(parts) {
  const whole = new Float64Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function scaledRows(values, scales, rows) {
  if (!scales) return values;
  const columns = values.length / rows;
  return values.map((value, i) => value * scales[Math.floor(i / columns)]);
}
