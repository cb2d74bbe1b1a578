// SPDX-License-Identifier: Apache-2.0
// Prometheus' text format and its histograms.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Return a Map from the metric's name to its samples {labels, value}; lines that are none are left out. */
export function parseMetrics(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels = "", number] = SAMPLE.exec(line) ?? [];
    if (!name) continue;
    const value = number === "+Inf" ? Infinity : Number(number);
    if (Number.isNaN(value)) continue;
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push({ labels: Object.fromEntries([...labels.matchAll(LABEL)].map((m) => [m[1], m[2]])), value });
  }
  return metrics;
}

/** Return the samples of the first of ``names`` that ``metrics`` has; null if it has none. */
export const samples = (metrics, names) => names.map((name) => metrics.get(name)).find((found) => found?.length) ?? null;

/** Return the sum of ``found`` samples; null for null. */
export const sum = (found) => found && found.reduce((total, { value }) => total + value, 0);

/** Return the histogram [[upper bound, cumulative count], ...] in rising order, engines added; null if missing. */
export function histogram(found) {
  if (!found) return null;
  const counts = new Map();
  for (const { labels, value } of found) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/** Return the q-quantile of a cumulative histogram, linear within a bucket; null if it is empty.
 *  Infinity stands for "above the largest bound". */
export function quantile(q, buckets) {
  const total = buckets?.at(-1)?.[1];
  if (!total) return null;
  const rank = q * total;
  const index = buckets.findIndex(([, count]) => count >= rank);
  const [upper, count] = buckets[index];
  const [lower, before] = index ? buckets[index - 1] : [0, 0];
  if (upper === Infinity || count === before) return upper;
  return lower + ((upper - lower) * (rank - before)) / (count - before);
}

/** Return the histogram of what came between two of them. */
export const minus = (later, earlier) =>
  later.map(([bound, count], index) => [bound, count - (earlier?.[index]?.[1] ?? 0)]);
