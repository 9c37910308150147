// Keys, and what the filter understands.

import { h } from "./dom.js";

const KEYS = [
  ["/", "filter the runs"],
  ["m", "add a metric"],
  ["↑ ↓ or j k", "move in the table; with Shift also select"],
  ["Space", "show the run in the charts, or hide it; with Shift all up to it"],
  ["Enter", "open the run"],
  ["[ ]", "smooth less, more"],
  ["l", "logarithmic y axis"],
  ["0", "whole range of the charts"],
  ["Esc", "back to the runs"],
];
const CHART = [
  ["← →", "read the next point; with Shift ten at once; Home, End"],
  ["↑ ↓", "read another line"],
  ["+ − 0", "zoom in, out, whole range"],
  ["t", "show the values as a table"],
];
const FILTER = [
  ["resnet", "in the name, id, state, reason or a setting"],
  ["state=failed,dead", "equal to one of them; * is any text; != not equal; ~ contains"],
  ["lr>0.001", "a setting by its key, or the end of it"],
  ["val/acc>=0.9", "the last value of a metric"],
  ['name="two words"', "quotes around blanks; all terms must hold"],
];

export function help() {
  const rows = (pairs) =>
    h(
      "table",
      {},
      h(
        "tbody",
        {},
        pairs.map(([keys, text]) => h("tr", {}, h("td", {}, h("kbd", {}, keys)), h("td", {}, text))),
      ),
    );
  const dialog = h(
    "dialog",
    { "aria-label": "Keys and filter", onclose: () => dialog.remove() },
    h("h2", {}, "Keys"),
    rows(KEYS),
    h("h2", {}, "In a chart"),
    rows(CHART),
    h("h2", {}, "Filter"),
    rows(FILTER),
    h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close() }, "Close")),
  );
  document.body.append(dialog);
  dialog.showModal();
}
