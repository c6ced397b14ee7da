"""The look of the report: one style sheet for screens of every width, dark rooms and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --panel: #ffffff; --ink: #1d2433; --soft: #5d6678; --line: #dfe2e8;
  --accent: #1f5fbf; --accent-soft: #dce8f8; --second: #c2571a; --third: #2f8a57; --grey: #a9b1be;
  --right: #1d7a48; --wrong: #b3261e; --wrong-soft: #fbe6e4; --on-accent: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12151b; --panel: #1a1f28; --ink: #e6e9ef; --soft: #9aa4b5; --line: #2d3441;
    --accent: #6ea8ff; --accent-soft: #223450; --second: #f0955a; --third: #63c58f; --grey: #667082;
    --right: #63c58f; --wrong: #ff8a80; --wrong-soft: #43211f; --on-accent: #0c1320;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 {
  font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; margin: 0 0 .5rem; letter-spacing: -.02em;
  text-wrap: balance;
}
h2 { font-size: 1.35rem; margin: 3.2rem 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .3rem 0 1rem; max-width: 46rem; }
.lead, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .88rem; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre {
  margin: 1rem 0 0; padding: .6rem .8rem; border-radius: 8px; background: var(--accent-soft); overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .86rem;
}
pre::before { content: "$ "; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.2rem 0 0; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; margin: 1.8rem 0 0; }
.tile, figure { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: .9rem 1.1rem 1rem; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
.tile span { color: var(--soft); font-size: .86rem; line-height: 1.35; display: block; }
figure { margin: 1rem 0 0; padding: 1rem; }
figcaption { margin-top: .6rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; margin: .8rem 0 0; border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; background: var(--panel); }
th, td { padding: .45rem .7rem; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: nowrap; position: sticky; left: 0; background: var(--panel); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
tr.summary td { font-weight: 650; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text.soft { fill: var(--soft); }
svg text.strong { fill: var(--on-accent); }
svg .cell { fill: var(--accent); }
svg .frame { fill: none; stroke: var(--line); }
.images { display: grid; grid-template-columns: repeat(8, 1fr); gap: .6rem; margin: .4rem 0 0; }
@media (max-width: 760px) { .images { grid-template-columns: repeat(4, 1fr); gap: .4rem; } }
.image {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .45rem; font-size: .75rem;
  line-height: 1.3; overflow-wrap: anywhere; border-top: 3px solid var(--right);
}
.image.wrong { border-top-color: var(--wrong); background: var(--wrong-soft); }
.image img {
  width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; border-radius: 5px;
  background: #8884; display: block; margin-bottom: .35rem;
}
.image b { color: var(--right); }
.image.wrong b { color: var(--wrong); }
.image span { color: var(--soft); display: block; }
@media print {
  :root { --paper: #fff; --panel: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  figure, .tile, .image, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .25rem .35rem; }
}
"""
