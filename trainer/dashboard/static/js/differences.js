// What differs in the configuration of some runs.

import { configOf, differing } from "./columns.js";
import { variable } from "./colors.js";
import { h } from "./dom.js";
import { setting } from "./format.js";

const MOST_RUNS = 12;

export function differences(rows) {
  const shown = rows.slice(0, MOST_RUNS);
  const keys = differing(shown);
  if (shown.length < 2)
    return h("p", { class: "note" }, "Select two or more runs to see what differs in their configuration.");
  if (!keys.length) return h("p", { class: "note" }, `The configuration of these ${shown.length} runs is the same.`);
  return h(
    "table",
    { class: "plain" },
    h("caption", { class: "unseen" }, "Settings that differ"),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "col" }, "Setting"),
        shown.map((row) =>
          h(
            "th",
            { scope: "col" },
            h("i", { class: "swatch", style: { background: variable(row.key) } }),
            " ",
            row.name,
            h("small", {}, ` ${row.id}`),
          ),
        ),
      ),
    ),
    h(
      "tbody",
      {},
      keys.map((key) =>
        h(
          "tr",
          {},
          h("th", { scope: "row", class: "mono" }, key),
          shown.map((row) => h("td", {}, setting(configOf(row, key)))),
        ),
      ),
    ),
    rows.length > MOST_RUNS
      ? h(
          "tfoot",
          {},
          h("tr", {}, h("td", { class: "note", colspan: MOST_RUNS + 1 }, `and ${rows.length - MOST_RUNS} more runs`)),
        )
      : null,
  );
}
