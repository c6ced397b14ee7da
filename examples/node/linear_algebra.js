// Symmetric matrices in Float64Array, row by row.

// Singular directions below this share of the largest count as absent; an eigenvalue is a square.
const RELATIVE_CUTOFF = 1e-4;
const CONVERGED = 1e-13; // off-diagonal share; the error of an eigenvalue is of the order of its square
const MAX_SWEEPS = 60;

/** A A^T of A with the given number of rows: [rows, rows]. */
export function gram(a, rows) {
  const columns = a.length / rows;
  const product = new Float64Array(rows * rows);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      for (let k = 0; k < columns; k++) sum += a[i * columns + k] * a[j * columns + k];
      product[i * rows + j] = sum;
      product[j * rows + i] = sum;
    }
  }
  return product;
}

/** left diag(s) right. */
export function scaledProduct(left, s, right, n) {
  const product = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < n; k++) {
      const factor = left[i * n + k] * s[k];
      if (factor === 0) continue;
      for (let j = 0; j < n; j++) product[i * n + j] += factor * right[k * n + j];
    }
  }
  return product;
}

/** matrix^(-1/2), eigenvalues below the cutoff left out (a pseudo-inverse). */
export function inverseSquareRoot(matrix, n) {
  const { values, vectors } = eigenSymmetric(matrix, n);
  const cutoff = RELATIVE_CUTOFF ** 2 * Math.max(...values);
  const roots = values.map((value) => (value > cutoff ? 1 / Math.sqrt(value) : 0));
  const transposed = new Float64Array(n * n);
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) transposed[j * n + i] = vectors[i * n + j];
  return scaledProduct(transposed, roots, vectors, n);
}

/**
 * Eigenvalues and eigenvectors (rows) by cyclic Jacobi rotations: each one makes an off-diagonal entry zero, and
 * sweeps over all of them converge quadratically.
 */
export function eigenSymmetric(matrix, n) {
  const a = Float64Array.from(matrix);
  const vectors = new Float64Array(n * n);
  for (let i = 0; i < n; i++) vectors[i * n + i] = 1;
  const small = CONVERGED * Math.sqrt(a.reduce((sum, value) => sum + value * value, 0));
  for (let sweep = 0; sweep < MAX_SWEEPS; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) off += a[p * n + q] ** 2;
    if (Math.sqrt(off) <= small) break;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) if (Math.abs(a[p * n + q]) > small / n) rotate(a, vectors, n, p, q);
    }
  }
  return { values: Float64Array.from({ length: n }, (_, i) => a[i * n + i]), vectors };
}

/** Rotate rows and columns p and q so that their entry becomes zero. */
function rotate(a, vectors, n, p, q) {
  const [row, other] = [p * n, q * n];
  const entry = a[row + q];
  const theta = (a[other + q] - a[row + p]) / (2 * entry);
  const tangent = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
  const cosine = 1 / Math.sqrt(tangent * tangent + 1);
  const sine = tangent * cosine;
  const [corner, opposite] = [a[row + p] - tangent * entry, a[other + q] + tangent * entry];
  for (let k = 0; k < n; k++) {
    const x = a[row + k];
    const y = a[other + k];
    a[row + k] = a[k * n + p] = cosine * x - sine * y;
    a[other + k] = a[k * n + q] = sine * x + cosine * y;
    const v = vectors[row + k];
    const w = vectors[other + k];
    vectors[row + k] = cosine * v - sine * w;
    vectors[other + k] = sine * v + cosine * w;
  }
  a[row + p] = corner;
  a[other + q] = opposite;
  a[row + q] = 0;
  a[other + p] = 0;
}
