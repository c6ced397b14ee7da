// Residuals to gates, gates to sets of tasks, heads' logits to answers; one image at a time, in double precision.

const STD_EPSILON = 1e-6;

/**
 * Weights of the tasks that may answer; they sum to 1, the others' are 0.
 * @param {ArrayLike<number>} residuals lower matches better. [T]
 * @param {object} router of the manifest
 * @param {number[]} allowed indices, ascending
 * @returns {Float32Array} [T]
 */
export function gatesFromResiduals(residuals, router, allowed) {
  const scores = allowed.map((task) => -residuals[task]);
  const gates = new Float32Array(residuals.length);
  const set = (values) => allowed.forEach((task, i) => (gates[task] = values[i]));
  if (router.mode === "top1") {
    const best = firstLargest(scores);
    set(scores.map((_, i) => (i === best ? 1 : 0)));
  } else if (router.mode === "weighted") {
    set(softmax(scores.map((score) => score / router.temperature)));
  } else {
    const mean = sum(scores) / scores.length;
    const squares = sum(scores.map((score) => (score - mean) ** 2));
    const deviation = scores.length > 1 ? Math.sqrt(squares / (scores.length - 1)) : 0;
    set(softmax(scores.map((score) => (score - mean) / (deviation + STD_EPSILON) / router.temperature)));
  }
  return gates;
}

/**
 * Tasks whose gate is greater than the threshold; the largest alone where none is.
 * @returns {number[]} indices in the order in which their heads compete
 */
export function selectTasks(gates, router) {
  const byGate = [...gates.keys()].sort((a, b) => gates[b] - gates[a]); // stable: ties to the lowest index
  const threshold = Math.fround(router.threshold);
  const passes = (task) => router.mode !== "top1" && gates[task] > threshold;
  const kept = [...gates.keys()].filter((task) => passes(task) || task === byGate[0]);
  const cut = router.mode === "topk" && kept.length > router.max_tasks;
  return cut ? byGate.slice(0, router.max_tasks) : kept;
}

/**
 * Let the heads of a set compete.
 * @param {ArrayLike<number>} logits of every head. [sum C]
 * @param {object[]} tasks of the manifest
 * @param {number[]} order of the set; of equal bids the first wins
 * @returns {{task: number, index: number}} the task that answers and its class
 */
export function answer(logits, tasks, order, headChoice) {
  const bids = order.map((task) => {
    const head = headOf(logits, tasks[task]);
    return headChoice === "max" ? Math.max(...head) : sum(head) / head.length;
  });
  const task = order[firstLargest(bids)];
  return { task, index: firstLargest(headOf(logits, tasks[task])) };
}

/** Logits of one task's head, as plain numbers. */
export function headOf(logits, task) {
  return Array.from(logits.subarray(task.start, task.stop));
}

export function softmax(values) {
  const largest = Math.max(...values);
  const exponentials = values.map((value) => Math.exp(value - largest));
  const total = sum(exponentials);
  return exponentials.map((value) => value / total);
}

export function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function firstLargest(values) {
  return values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
}
