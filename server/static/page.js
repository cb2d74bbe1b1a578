// SPDX-License-Identifier: Apache-2.0
// Shows what the server says of itself and sends it a prompt. Everything comes from /metrics (Prometheus text),
// /ready, /pvq/info and /v1/models; a figure whose metric is missing is a dash.

const POLL_MS = 2000;
const INFO_MS = 60_000; // model and quantization change only with a restart
const TIMEOUT_MS = 8000;
const HISTORY_S = 300; // what the chart shows
const RATE_S = 10; // rates are differences over so many seconds
const LATENCY_S = 60; // percentiles of the last minute; of all requests if there were none in it
const KEY_NAME = "pvq-api-key";
const DASH = "–";

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

const $ = (id) => document.getElementById(id);
const show = (id, text) => {
  if ($(id).textContent !== text) $(id).textContent = text;
};

// ---- Prometheus text ----

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

const samples = (metrics, names) => names.map((name) => metrics.get(name)).find((found) => found?.length) ?? null;
const sum = (found) => found && found.reduce((total, { value }) => total + value, 0);

/** Return the histogram [[upper bound, cumulative count], ...] in rising order, engines added; null if missing. */
function histogram(found) {
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

const minus = (later, earlier) =>
  later.map(([bound, count], index) => [bound, count - (earlier?.[index]?.[1] ?? 0)]);

// ---- numbers as text ----

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const rate = (value) =>
  value == null ? DASH : value >= 100 ? whole.format(value) : value.toFixed(value >= 10 || value === 0 ? 0 : value >= 1 ? 1 : 2);
const count = (value) => (value == null ? DASH : whole.format(value));

/** Return a duration of ``seconds``: "83 ms", "1.24 s". */
export function duration(seconds) {
  if (seconds == null) return DASH;
  if (seconds >= 1) return `${seconds.toFixed(seconds >= 10 ? 0 : 2)} s`;
  return `${(seconds * 1000).toFixed(seconds >= 0.01 ? 0 : 1)} ms`;
}

const bytes = (value) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(value, 1)) / 3));
  return `${(value / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
};
const age = (seconds) => {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : "less than a minute";
};

// ---- asking the server ----

class Refused extends Error {}
class Unreachable extends Error {}

let key = null;
try {
  key = sessionStorage.getItem(KEY_NAME);
} catch {
  // storage is switched off: the key lives as long as the page
}

function keep(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // as above
  }
  $("forget").hidden = !value;
}

/** Go on with another key, or none. */
function unlock(value) {
  keep(value);
  if (!value) showFacts([["Model", null]]);
  locked = false;
  toldAt = -Infinity;
  poll();
}

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Fetch ``path`` with the key; Refused if the server wants another one, Unreachable if it does not answer. */
async function get(path) {
  const options = { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) };
  const answer = await fetch(path, options).catch(() => {
    throw new Unreachable();
  });
  if (answer.status === 401) throw new Refused();
  return answer;
}

const json = async (answer) => (answer.ok ? await answer.json().catch(() => null) : null);

/** Return {ready, reason}. */
async function readiness() {
  for (const path of ["ready", "pvq/ready"]) {
    const answer = await get(path);
    if (answer.status === 404) continue;
    const body = (await answer.json().catch(() => null)) ?? {};
    return { ready: answer.ok, reason: answer.ok ? "" : body.reason || body.error?.message || `status ${answer.status}` };
  }
  return { ready: (await get("health")).ok, reason: "" };
}

// ---- what is on the page ----

let history = []; // of {time (s), counters, histograms}, oldest first
let toldAt = -Infinity; // when the model was last asked for, ms
let facts = {}; // of the cache, from /metrics
let locked = false; // the server has refused the key, or its absence: nothing guarded is asked for again until a new one comes

function take(metrics, time) {
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
  showCache(use && sum(use) / use.length);
  facts = values(METRICS.cacheFacts)?.[0].labels ?? {};
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
  const tokens = Number(facts.kv_cache_size_tokens) || Number(facts.num_gpu_blocks) * Number(facts.block_size);
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
  const path = points.map(([at, value]) => `${(300 * (1 - (time - at) / HISTORY_S)).toFixed(1)} ${(99 - (98 * value) / top).toFixed(1)}`);
  $("line").setAttribute("d", path.length > 1 ? `M${path.join("L")}` : "");
  const [first, last] = [path[0], path.at(-1)].map((point) => point?.split(" ")[0]);
  $("area").setAttribute("d", path.length > 1 ? `M${first} 100L${path.join("L")}L${last} 100Z` : "");
  show("chart-top", points.length ? `${whole.format(top)} tokens/s` : "");
}

/** Return the next of 1, 2, 5, 10, 20, ... that is not below ``value``. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

function blank() {
  for (const figure of document.querySelectorAll("#generated, .figures dd")) figure.textContent = DASH;
  showCache(null);
  for (const row of Object.values(LATENCIES)) for (const cell of $(row).querySelectorAll("td")) cell.textContent = DASH;
}

function showState(state, name, reason = "") {
  $("state").dataset.state = state;
  show("state-name", name); // only a change is announced
  show("reason", reason);
  $("reason").hidden = !reason;
}

function showReadiness({ ready, reason }) {
  const because = reason ? `: ${reason}.` : ".";
  if (ready) showState("ready", "Ready");
  else if (/fail|dead|died/i.test(reason)) showState("failed", "Failed", `The engine cannot answer${because}`);
  else if (/load/i.test(reason)) showState("waiting", "Loading", `The server will take requests soon${because}`);
  else if (/drain|shutting/i.test(reason)) showState("waiting", "Draining", `The server takes no new requests${because}`);
  else showState("waiting", "Not ready", `The server takes no requests now${because}`);
}

/** Return [path, value] of the plain values in ``config``, two levels deep; lists and tables are left out. */
function plain(config, path = []) {
  return Object.entries(config ?? {}).flatMap(([name, value]) => {
    const here = [...path, name.replaceAll("_", " ")];
    if (value && typeof value === "object") return path.length || Array.isArray(value) ? [] : plain(value, here);
    return value == null || name === "quant_method" ? [] : [[here.join(" "), String(value)]];
  });
}

function showModel(info, models) {
  const names = models?.data?.map((model) => model.id) ?? info?.served_names ?? [];
  if (names.length) {
    show("name", names[0]);
    document.title = `${names[0]} · pvq serve`;
  }
  const select = $("model");
  if (names.join("\n") !== [...select.options].map((option) => option.value).join("\n"))
    select.replaceChildren(...names.map((name) => new Option(name, name)));
  $("model-label").hidden = names.length < 2;
  if (!info) return;
  showFacts([
    ["Model", info.model],
    ["Architecture", info.architectures?.join(", ")],
    ["Context", info.max_model_len_tokens && `${whole.format(info.max_model_len_tokens)} tokens`],
    ["Data type", info.dtype],
    ["Weights on disk", info.weight_bytes && bytes(info.weight_bytes)],
    ["Quantization", info.quantization || "none"],
    ...plain(info.quantization_config).map(([name, value]) => [name[0].toUpperCase() + name.slice(1), value]),
    ["KV cache", Number(facts.kv_cache_memory_bytes) ? bytes(Number(facts.kv_cache_memory_bytes)) : null],
    ["Versions", Object.entries(info.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["Started", info.uptime_s == null ? null : `${age(info.uptime_s)} ago`],
  ]);
}

function showFacts(rows) {
  $("facts").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }));
    row.append(Object.assign(document.createElement("dd"), { textContent: value || DASH }));
    return row;
  }));
}

function askForKey() {
  locked = true;
  show("key-error", key ? "The server refuses this key." : "");
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  if (document.activeElement === document.body) $("key").focus();
}

async function poll() {
  try {
    const [state, metrics] = await Promise.all([readiness(), get("metrics")]);
    const text = metrics.ok ? await metrics.text() : "";
    if (text) take(parseMetrics(text), performance.now() / 1000);
    else blank();
    showReadiness(state);
    if (state.ready && !locked && performance.now() - toldAt > INFO_MS) {
      const info = await get("pvq/info").then(json);
      showModel(info, await get("v1/models").then(json));
      $("key-form").hidden = true;
      if (info) toldAt = performance.now();
    }
  } catch (error) {
    if (error instanceof Refused) askForKey();
    else if (error instanceof Unreachable) {
      showState("failed", "Unreachable", "The server does not answer. This page goes on trying.");
      blank();
      toldAt = -Infinity;
    } else console.error(error); // the next poll may do better
  }
}

async function pollForever() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resume) => setTimeout(resume, POLL_MS));
  }
}

// ---- a prompt ----

let running = null; // AbortController of the answer that is coming

/** Yield the data of each server-sent event. */
async function* events(body) {
  let rest = "";
  for await (const piece of readable(body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + piece).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

/** Yield the chunks of ``stream``; not every browser can iterate over one itself. */
async function* readable(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return one sentence for an answer that is not 200. */
async function complaint(answer) {
  if (answer.status === 401) {
    askForKey();
    return "The server asks for a valid key.";
  }
  const body = await answer.json().catch(() => null);
  const detail = body?.error?.message ?? body?.message ?? (typeof body?.detail === "string" ? body.detail : "");
  const wait = answer.headers.get("Retry-After");
  return `The server answered ${answer.status}${detail ? `: ${detail}` : "."}${wait ? ` Try again in ${wait} s.` : ""}`;
}

function outcome(text, failed = false) {
  $("outcome").classList.toggle("error", failed);
  show("outcome", text);
}

async function send() {
  const chat = $("mode").value === "chat";
  const prompt = $("prompt").value;
  const body = {
    model: $("model").value || undefined,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  running = new AbortController();
  const { signal } = running;
  $("send").disabled = true;
  $("stop").disabled = false;
  $("text").textContent = $("thought").textContent = "";
  $("answer").hidden = false;
  $("answer").setAttribute("aria-busy", "true"); // read aloud once, when it is whole
  outcome("Waiting for the first token …");
  const began = performance.now();
  let first, finish, usage, complete = false;
  try {
    const answer = await fetch(chat ? "v1/chat/completions" : "v1/completions", {
      method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
    if (!answer.ok) throw new Error(await complaint(answer));
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message ?? "The server could not finish the answer.");
      usage = part.usage ?? usage;
      const [choice] = part.choices ?? [];
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const text = choice.delta?.content ?? choice.text ?? "";
      const thought = choice.delta?.reasoning ?? choice.delta?.reasoning_content ?? "";
      if (!text && !thought) continue;
      if (first === undefined) outcome("Answering …");
      first ??= performance.now();
      append(text, thought);
    }
    if (!complete) throw new Error("The connection ended before the answer was complete.");
    outcome(summary(usage, finish, began, first));
  } catch (error) {
    if (signal.aborted) outcome("Stopped.");
    else outcome(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
  } finally {
    running = null;
    $("answer").setAttribute("aria-busy", "false");
    $("answer").hidden = !$("text").textContent && !$("thought").textContent;
    $("send").disabled = false;
    if (document.activeElement === $("stop") || document.activeElement === document.body) $("send").focus();
    $("stop").disabled = true;
  }
}

function append(text, thought) {
  const box = $("answer");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  if (thought) $("thought").append(thought);
  if (text) $("text").append(text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function summary(usage, finish, began, first) {
  const end = performance.now();
  if (first === undefined) return "The answer is empty.";
  const tokens = usage?.completion_tokens;
  const parts = [`First token after ${duration((first - began) / 1000)}`];
  if (tokens) parts.unshift(`${whole.format(tokens)} ${tokens === 1 ? "token" : "tokens"} in ${duration((end - began) / 1000)}`);
  if (tokens > 1) parts.push(`then ${rate((tokens - 1) / ((end - first) / 1000))} tokens/s`);
  if (finish === "length") parts.push("cut off at the limit of tokens");
  return `${parts.join(", ").replace(", First", ", first")}.`;
}

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) send();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === $("prompt")) $("try").requestSubmit();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  unlock($("key").value);
  $("key").value = "";
});
$("forget").addEventListener("click", () => unlock(null));
$("forget").hidden = !key;
pollForever();
