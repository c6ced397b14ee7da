// The classifier: pixel values in, tasks and labels out. Both passes run in ONNX Runtime, the rest is here.

import path from "node:path";
import ort from "onnxruntime-node";
import { checkFiles, readManifest } from "./bundle.js";
import { computeCores } from "./cores.js";
import { BundleError } from "./errors.js";
import { answer, gatesFromResiduals, headOf, selectTasks, softmax } from "./routing.js";
import { evidence, unsureRoutes } from "./verification.js";

const BATCH_SIZE = 32;
const TOP = 5;
const MAX_SETS = 64;
// Without this, int8 products saturate on x86 processors that lack VNNI.
const SESSION_OPTIONS = { logSeverityLevel: 3, extra: { session: { x64quantprecision: "1" } } };

export class Classifier {
  /** Check a bundle and load its graphs. */
  static async open(directory) {
    const manifest = readManifest(directory);
    await checkFiles(directory, manifest);
    const load = (pass) =>
      ort.InferenceSession.create(path.join(directory, manifest.passes[pass].file), SESSION_OPTIONS);
    return new Classifier(directory, manifest, await load("first_pass"), await load("second_pass"));
  }

  constructor(directory, manifest, firstPass, secondPass) {
    this.directory = directory;
    this.manifest = manifest;
    this.firstPass = firstPass;
    this.secondPass = secondPass;
    this.cores = new Map(); // of the sets seen last
  }

  /**
   * Classify normalised images.
   * @param {{data: Float32Array, shape: number[]}} pixelValues [B, 3, H, W]
   * @param {string[]} [names] of the tasks that may answer, all if not given; with one there is no first pass
   * @returns {Promise<object[]>} what `python -m runtime --json` prints, and the set and whether it was verified
   */
  async predict(pixelValues, names) {
    const { data, shape } = pixelValues;
    const wanted = [3, ...this.manifest.preprocess.image_size];
    if (shape.length !== 4 || wanted.some((size, i) => shape[i + 1] !== size)) {
      throw new BundleError(`pixel_values: expected shape [B, ${wanted.join(", ")}], got [${shape.join(", ")}].`);
    }
    if (!data.every(Number.isFinite)) throw new BundleError("pixel_values: NaN or infinity.");
    const allowed = names ? this.#indices(names) : [...this.manifest.tasks.keys()];
    const known = names?.length === 1;
    const size = data.length / shape[0];
    const predictions = [];
    for (let start = 0; start < shape[0]; start += BATCH_SIZE) {
      const count = Math.min(BATCH_SIZE, shape[0] - start);
      const images = Array.from({ length: count }, (_, i) => data.subarray((start + i) * size, (start + i + 1) * size));
      predictions.push(...(await this.#predictBatch(images, allowed, known)));
    }
    return predictions;
  }

  async #predictBatch(images, allowed, known) {
    const { router, tasks } = this.manifest;
    if (known) {
      const gates = Float32Array.from(tasks, (_, i) => (i === allowed[0] ? 1 : 0));
      const logits = await this.#secondPass(images, images.map(() => allowed), images.map(() => gates));
      return logits.map((values) => this.#prediction(values, gates, allowed, null, undefined, false));
    }
    const found = await this.firstPass.run({ pixel_values: this.#tensor(images) });
    const residuals = rows(found.residuals, tasks.length);
    const gates = residuals.map((row) => gatesFromResiduals(row, router, allowed));
    const orders = gates.map((row) => selectTasks(row, router));
    const logits = await this.#secondPass(images, orders, gates);
    const unsure = unsureRoutes(residuals, router, allowed);
    const others = await this.#secondPass(
      unsure.map(({ row }) => images[row]),
      unsure.map(({ second }) => [second]),
      unsure.map(({ row }) => gates[row]),
    );
    unsure.forEach(({ row, first, second }, i) => {
      const value = (values, task) => evidence(values, tasks[task], residuals[row][task], router.verify_prior);
      if (value(others[i], second) > value(logits[row], first)) {
        logits[row] = others[i];
        orders[row] = [second];
      }
    });
    const verified = new Set(unsure.map(({ row }) => row));
    return logits.map((values, row) =>
      this.#prediction(values, gates[row], orders[row], residuals[row], found.unknown?.data[row], verified.has(row)),
    );
  }

  /** Logits of every head for each image: one run for each distinct set, which is given once (S = 1). */
  async #secondPass(images, orders, gates) {
    const { compose, router, tasks } = this.manifest;
    const byGates = compose === "sum" && router.sum_weights === "gates";
    const groups = new Map();
    orders.forEach((order, row) => {
      const set = [...order].sort((a, b) => a - b);
      const key = byGates && set.length > 1 ? `${set} of ${row}` : `${set}`;
      if (!groups.has(key)) groups.set(key, { set, members: [] });
      groups.get(key).members.push(row);
    });
    const logits = new Array(images.length);
    for (const { set, members } of groups.values()) {
      const kept = set.map((task) => (byGates && set.length > 1 ? gates[members[0]][task] : 1));
      const total = kept.reduce((a, b) => a + b, 0);
      const feeds = {
        pixel_values: this.#tensor(members.map((row) => images[row])),
        slots: new ort.Tensor("int64", BigInt64Array.from(set, BigInt), [1, set.length]),
        weights: new ort.Tensor("float32", Float32Array.from(kept, (weight) => weight / total), [1, set.length]),
      };
      if (compose === "tsvm") Object.assign(feeds, this.#coresOf(set));
      const found = await this.secondPass.run(feeds);
      rows(found.logits, tasks.at(-1).stop).forEach((values, i) => (logits[members[i]] = values));
    }
    return logits;
  }

  #coresOf(set) {
    const key = set.join();
    if (!this.cores.has(key)) {
      const feeds = {};
      for (const [name, { side, values }] of computeCores(this.directory, this.manifest.matrices, set)) {
        feeds[name] = new ort.Tensor("float32", values, [1, side, side]);
      }
      this.cores.set(key, feeds);
      if (this.cores.size > MAX_SETS) this.cores.delete(this.cores.keys().next().value);
    }
    return this.cores.get(key);
  }

  #prediction(logits, gates, order, residuals, unknown, verified) {
    const { router, tasks } = this.manifest;
    const { task: index } = answer(logits, tasks, order, router.head_choice);
    const task = tasks[index];
    const head = headOf(logits, task);
    const scores = softmax(head);
    const best = [...head.keys()].sort((a, b) => head[b] - head[a]).slice(0, TOP);
    const alternatives = best.map((i) => ({ task: task.name, label: task.classes[i], score: scores[i] }));
    const named = (values) => Object.fromEntries(tasks.map(({ name }, i) => [name, values[i]]));
    const judged = unknown !== undefined && router.unknown_threshold !== null;
    return {
      ...alternatives[0],
      alternatives,
      gates: named(gates),
      residuals: residuals && named(residuals),
      unknown: unknown ?? null,
      is_unknown: judged ? unknown > router.unknown_threshold : null,
      selected: order.map((i) => tasks[i].name),
      verified,
    };
  }

  #tensor(images) {
    const data = new Float32Array(images.length * images[0].length);
    images.forEach((image, i) => data.set(image, i * image.length));
    return new ort.Tensor("float32", data, [images.length, 3, ...this.manifest.preprocess.image_size]);
  }

  #indices(names) {
    const known = this.manifest.tasks.map((task) => task.name);
    const strange = names.filter((name, i) => !known.includes(name) || names.indexOf(name) !== i);
    if (strange.length || !names.length) {
      throw new BundleError(`tasks: unknown or repeated: ${strange.join(", ")}; this bundle has ${known.join(", ")}.`);
    }
    return names.map((name) => known.indexOf(name)).sort((a, b) => a - b);
  }
}

function rows(tensor, width) {
  return Array.from({ length: tensor.dims[0] }, (_, i) => tensor.data.slice(i * width, (i + 1) * width));
}
