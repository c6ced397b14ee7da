/** What this program reports in one line: the bundle, an image or a setting is not what was expected. */
export class BundleError extends Error {}
