// Unsure routes: where the two best tasks of a top-1 router are close, both are run and their heads decide.

import { headOf, sum } from "./routing.js";

/**
 * Rows of a batch whose route is unsure, with their candidates.
 * @param {Float32Array[]} residuals of each image. [B] of [T]
 * @param {object} router of the manifest
 * @param {number[]} allowed indices, ascending
 * @returns {{row: number, first: number, second: number}[]} in the order of the rows
 */
export function unsureRoutes(residuals, router, allowed) {
  if (!(router.verify_margin > 0) || router.mode !== "top1" || allowed.length < 2) return [];
  const routes = residuals.map((scores, row) => {
    const [first, second] = [...allowed].sort((a, b) => scores[a] - scores[b]); // stable
    return { row, first, second, margin: scores[second] - scores[first] };
  });
  const unsure = routes.filter((route) => route.margin < router.verify_margin);
  const most = Math.floor(router.verify_budget * residuals.length);
  const kept = unsure.length > most ? unsure.sort((a, b) => a.margin - b.margin).slice(0, most) : unsure;
  return kept.sort((a, b) => a.row - b.row);
}

/** How well a task fits: its head's log confidence on its own model, less the router's weighted score. */
export function evidence(logits, task, score, prior) {
  const head = headOf(logits, task);
  const largest = Math.max(...head);
  return -Math.log(sum(head.map((value) => Math.exp(value - largest)))) - prior * score;
}
