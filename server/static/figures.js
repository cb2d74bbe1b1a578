// SPDX-License-Identifier: Apache-2.0
// The figures: from two and more samples of /metrics to what the page shows of them.

import { $, DASH, show } from "./dom.js";
import { count, duration, rate, whole } from "./numbers.js";
import { histogram, minus, quantile, samples, sum } from "./prometheus.js";

const HISTORY_S = 300; // what the chart shows
const SHORT_S = 60; // and as long as there is no more
const RATE_S = 10; // rates are differences over so many seconds
const LATENCY_S = 60; // percentiles of the last minute; of all requests if there were none in it

// Newest name first; the first one that the server has counts.
const METRICS = {
  generated: ["vllm:generation_tokens_total"],
  prompted: ["vllm:prompt_tokens_total"],
  ended: ["vllm:request_success_total"], // by finished_reason, "abort" and "error" among them
  running: ["vllm:num_requests_running"],
  waiting: ["vllm:num_requests_waiting"],
  cache: ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"],
  hits: ["vllm:prefix_cache_hits_total"],
  queries: ["vllm:prefix_cache_queries_total"],
  left: ["pvq_server_disconnected_total"],
  rejected: ["pvq_server_rejected_total"],
  rejectedByEngine: ["vllm:admission_rejections_total"],
  cacheFacts: ["vllm:cache_config_info"],
  ttft: ["vllm:time_to_first_token_seconds_bucket"],
  perToken: [
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
  ],
  queue: ["vllm:request_queue_time_seconds_bucket"],
};
const COUNTERS = ["generated", "prompted", "ended"];
const LATENCIES = { ttft: "ttft", perToken: "per-token", queue: "queue" }; // metric: id of the table's row

let history = []; // of {time (s), counters, histograms}, oldest first
let cacheFacts = {}; // labels of vLLM's metric about the cache

/** Return the size of the KV cache in bytes; null if it is not known. */
export const cacheBytes = () => Number(cacheFacts.kv_cache_memory_bytes) || null;

/** Show what ``metrics`` say at ``time`` (seconds, from any beginning). */
export function take(metrics, time) {
  const values = (names) => samples(metrics, names);
  const now = { time, counters: {}, histograms: {} };
  for (const name of COUNTERS) now.counters[name] = sum(values(METRICS[name]));
  for (const name of Object.keys(LATENCIES)) now.histograms[name] = histogram(values(METRICS[name]));
  const last = history.at(-1);
  if (last && COUNTERS.some((name) => now.counters[name] < last.counters[name])) history = []; // a new engine
  history = [...history.filter((old) => time - old.time <= HISTORY_S), now];

  show("running", count(sum(values(METRICS.running))));
  show("waiting", count(sum(values(METRICS.waiting))));
  const ended = values(METRICS.ended);
  const because = (reason) => ended && sum(ended.filter(({ labels }) => labels.finished_reason === reason));
  show("left", count(sum(values(METRICS.left)))); // vLLM does not count all of these as aborted
  show("errors", count(because("error")));
  show("finished", count(ended && sum(ended) - because("abort") - because("error")));
  const rejected = values(METRICS.rejected)?.filter(({ labels }) => labels.reason !== "no_valid_key");
  const byEngine = values(METRICS.rejectedByEngine);
  show("refused", count(rejected || byEngine ? sum(rejected ?? []) + sum(byEngine ?? []) : null));
  const [hits, queries] = [sum(values(METRICS.hits)), sum(values(METRICS.queries))];
  show("cached", hits != null && queries ? `${((100 * hits) / queries).toFixed(0)}%` : DASH);
  const use = values(METRICS.cache);
  cacheFacts = values(METRICS.cacheFacts)?.[0].labels ?? {};
  showCache(use && sum(use) / use.length);
  for (const [id, name] of [["generated", "generated"], ["prompted", "prompted"], ["requests", "ended"]])
    show(id, rate(rateOf(name, history.length - 1)));
  for (const [name, row] of Object.entries(LATENCIES)) showLatency(name, row, now);
  draw(time);
}

/** Return how fast a counter rose in the RATE_S seconds before sample ``index``; null if that is unknown. */
function rateOf(name, index) {
  const now = history[index];
  const before = history.slice(0, index).find((old) => now.time - old.time <= RATE_S + 0.5);
  if (!before || now.counters[name] == null || before.counters[name] == null) return null;
  return (now.counters[name] - before.counters[name]) / (now.time - before.time);
}

function showCache(fraction) {
  const percent = fraction == null ? null : Math.min(100, Math.max(0, 100 * fraction));
  const tokens = Number(cacheFacts.kv_cache_size_tokens) || Number(cacheFacts.num_gpu_blocks) * Number(cacheFacts.block_size);
  const used = percent == null ? DASH : `${percent > 0 && percent < 10 ? percent.toFixed(1) : percent.toFixed(0)}%`;
  show("cache", percent != null && tokens ? `${used} of ${whole.format(tokens)} tokens` : used);
  $("cache-bar").style.width = `${percent ?? 0}%`;
  $("cache-meter").setAttribute("aria-valuenow", (percent ?? 0).toFixed(0));
  $("cache-meter").setAttribute("aria-valuetext", percent == null ? "unknown" : used);
}

function showLatency(name, row, now) {
  const all = now.histograms[name];
  const earlier = history.find((old) => now.time - old.time <= LATENCY_S).histograms[name];
  const recent = all && minus(all, earlier);
  const some = recent?.at(-1)?.[1] > 0;
  const buckets = some ? recent : all;
  $(row).querySelector("small").textContent = !buckets?.at(-1)?.[1] ? "" : some ? "last minute" : "since start";
  $(row).querySelectorAll("td").forEach((cell, index) => {
    cell.textContent = about(quantile([0.5, 0.9, 0.99][index], buckets), buckets);
  });
}

/** Return a quantile as text; of one in the first or last bucket only its bound is known. */
function about(seconds, buckets) {
  if (seconds === Infinity) return `> ${duration(buckets.at(-2)?.[0])}`;
  return seconds != null && seconds <= buckets[0][0] ? `< ${duration(buckets[0][0])}` : duration(seconds);
}

function draw(time) {
  const points = history.map((old, index) => [old.time, rateOf("generated", index)]).filter(([, value]) => value != null);
  const top = roundUp(Math.max(1, ...points.map(([, value]) => value)));
  const span = points.length && time - points[0][0] > SHORT_S ? HISTORY_S : SHORT_S;
  const path = points.map(([at, value]) => `${(300 * (1 - (time - at) / span)).toFixed(1)} ${(99 - (98 * value) / top).toFixed(1)}`);
  $("line").setAttribute("d", path.length > 1 ? `M${path.join("L")}` : "");
  const [first, last] = [path[0], path.at(-1)].map((point) => point?.split(" ")[0]);
  $("area").setAttribute("d", path.length > 1 ? `M${first} 100L${path.join("L")}L${last} 100Z` : "");
  show("chart-from", span === SHORT_S ? "1 minute ago" : "5 minutes ago");
  show("chart-top", points.length ? `${whole.format(top)} tokens/s` : "");
}

/** Return the next of 1, 2, 5, 10, 20, ... that is not below ``value``. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

/** Show that nothing is known. */
export function blank() {
  for (const figure of document.querySelectorAll("#generated, .figures dd")) figure.textContent = DASH;
  showCache(null);
  for (const row of Object.values(LATENCIES)) for (const cell of $(row).querySelectorAll("td")) cell.textContent = DASH;
}
