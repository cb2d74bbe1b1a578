// SPDX-License-Identifier: Apache-2.0
// What the server is doing and what it serves.

import { $, DASH, show } from "./dom.js";
import { cacheBytes } from "./figures.js";
import { age, bytes, whole } from "./numbers.js";

/** Show the state: "ready", "waiting" or "failed", its name, and a sentence if there is more to say. */
export function showState(state, name, reason = "") {
  $("state").dataset.state = state;
  show("state-name", name); // only a change is announced
  show("reason", reason);
  $("reason").hidden = !reason;
}

/** Show what readiness() returned. */
export function showReadiness({ ready, reason }) {
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

/** Show what /pvq/info and /v1/models say; either may be null. */
export function showModel(info, models) {
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
    ["KV cache", cacheBytes() && bytes(cacheBytes())],
    ["Versions", Object.entries(info.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["Started", info.uptime_s == null ? null : `${age(info.uptime_s)} ago`],
  ]);
}

/** Show that the model is not known: the server asks for a key. */
export const forgetModel = () => showFacts([["Model", null]]);

function showFacts(rows) {
  $("facts").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }));
    row.append(Object.assign(document.createElement("dd"), { textContent: value || DASH }));
    return row;
  }));
}
