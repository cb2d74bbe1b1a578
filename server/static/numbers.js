// SPDX-License-Identifier: Apache-2.0
// Numbers as text.

import { DASH } from "./dom.js";

export const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const rate = (value) =>
  value == null ? DASH : value >= 100 ? whole.format(value) : value.toFixed(value >= 10 || value === 0 ? 0 : value >= 1 ? 1 : 2);
export const count = (value) => (value == null ? DASH : whole.format(value));

/** Return a duration of ``seconds``: "83 ms", "1.24 s". */
export function duration(seconds) {
  if (seconds == null) return DASH;
  if (seconds >= 1) return `${seconds.toFixed(seconds >= 10 ? 0 : 2)} s`;
  return `${(seconds * 1000).toFixed(seconds >= 0.01 ? 0 : 1)} ms`;
}

export const bytes = (value) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(value, 1)) / 3));
  return `${(value / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
};
export const age = (seconds) => {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : "less than a minute";
};
