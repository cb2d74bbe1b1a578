// SPDX-License-Identifier: Apache-2.0
// Asks the server, with the API key, which lives in the tab's session storage.

const TIMEOUT_MS = 8000;
const KEY_NAME = "pvq-api-key";

/** The server asks for another key. */
export class Refused extends Error {}

/** The server does not answer. */
export class Unreachable extends Error {}

let key = null;
try {
  key = sessionStorage.getItem(KEY_NAME);
} catch {
  // storage is switched off: the key lives as long as the page
}

export const hasKey = () => Boolean(key);

/** Go on with the key ``value``; null: with none. */
export function keepKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // as above
  }
}

export const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Fetch ``path`` with the key; Refused if the server wants another one, Unreachable if it does not answer. */
export async function get(path) {
  const options = { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) };
  const answer = await fetch(path, options).catch(() => {
    throw new Unreachable();
  });
  if (answer.status === 401) throw new Refused();
  return answer;
}

/** Return the JSON value of an answer; null if it is an error or none. */
export const json = async (answer) => (answer.ok ? await answer.json().catch(() => null) : null);

/** Return {ready, reason}. */
export async function readiness() {
  for (const path of ["ready", "pvq/ready"]) {
    const answer = await get(path);
    if (answer.status === 404) continue;
    const body = (await answer.json().catch(() => null)) ?? {};
    return { ready: answer.ok, reason: answer.ok ? "" : body.reason || body.error?.message || `status ${answer.status}` };
  }
  return { ready: (await get("health")).ok, reason: "" };
}
