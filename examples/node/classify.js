#!/usr/bin/env node
// Classify pictures with a bundle: node classify.js BUNDLE [--task NAME].. FILE..  Prints one line of JSON for each.

import { parseArgs } from "node:util";
import { Classifier } from "./classifier.js";
import { BundleError } from "./errors.js";
import { pixelValuesFromFile } from "./images.js";

const USAGE = "usage: node classify.js BUNDLE [--task NAME].. FILE..   (FILE: .png, or .npy of pixel_values [B, 3, H, W])";

async function main() {
  let parsed;
  try {
    parsed = parseArgs({ allowPositionals: true, options: { task: { type: "string", multiple: true } } });
  } catch (error) {
    parsed = { positionals: [], reason: error.message };
  }
  const [bundle, ...files] = parsed.positionals;
  if (!files.length) {
    console.error([parsed.reason, USAGE].filter(Boolean).join("\n"));
    return 2;
  }
  const classifier = await Classifier.open(bundle);
  for (const image of files) {
    const pixelValues = pixelValuesFromFile(image, classifier.manifest.preprocess);
    for (const found of await classifier.predict(pixelValues, parsed.values.task)) {
      console.log(JSON.stringify({ image, ...found }));
    }
  }
  return 0;
}

try {
  process.exitCode = await main();
} catch (error) {
  if (!(error instanceof BundleError)) throw error;
  console.error(`Error: ${error.message}`);
  process.exitCode = 1;
}
