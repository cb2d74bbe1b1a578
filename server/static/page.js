// SPDX-License-Identifier: Apache-2.0
// The page: asks the server every two seconds and shows what it says of itself. Everything comes from /metrics (Prometheus
// text), /ready, /pvq/info and /v1/models; a figure whose metric is missing is a dash.

import { $, show } from "./dom.js";
import { blank, take } from "./figures.js";
import { forgetModel, showModel, showReadiness, showState } from "./model.js";
import { parseMetrics } from "./prometheus.js";
import { setUpPrompt } from "./prompt.js";
import { Refused, Unreachable, get, hasKey, json, keepKey, readiness } from "./server.js";

const POLL_MS = 2000;
const INFO_MS = 60_000; // model and quantization change only with a restart

let toldAt = -Infinity; // when the model was last asked for, ms
let locked = false; // the server has refused the key, or its absence: nothing guarded is asked for again until a new one comes

/** Go on with another key, or none. */
function unlock(value) {
  keepKey(value);
  $("forget").hidden = !value;
  if (!value) forgetModel();
  locked = false;
  toldAt = -Infinity;
  poll();
}

function askForKey() {
  locked = true;
  show("key-error", hasKey() ? "The server refuses this key." : "");
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

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  unlock($("key").value);
  $("key").value = "";
});
$("forget").addEventListener("click", () => unlock(null));
$("forget").hidden = !hasKey();
setUpPrompt(askForKey);
pollForever();
