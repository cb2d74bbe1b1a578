// SPDX-License-Identifier: Apache-2.0
// The box to try a prompt: sends it and shows the answer as it is streamed.

import { $, show } from "./dom.js";
import { duration, rate, whole } from "./numbers.js";
import { headers } from "./server.js";

let running = null; // AbortController of the answer that is coming
let onRefused = () => {}; // what to do when the server asks for another key

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
    onRefused();
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

/** Make the box work; ``askForKey`` is called when the server refuses the key. */
export function setUpPrompt(askForKey) {
  onRefused = askForKey;
  $("try").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) send();
  });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === $("prompt")) $("try").requestSubmit();
  });
}
