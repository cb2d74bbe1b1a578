// SPDX-License-Identifier: Apache-2.0
// The elements of the page, by their ids.

export const DASH = "–"; // for a figure that is not known

export const $ = (id) => document.getElementById(id);

/** Let the element ``id`` say ``text``; the same text again is no change, which a screen reader would announce. */
export function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}
