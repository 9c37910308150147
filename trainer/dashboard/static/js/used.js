// What a run has used: energy, money and CO2 in all, what its plan expected, the devices and the power of each node.

import { h } from "./dom.js";
import { duration, number } from "./format.js";

export function usedParts(details) {
  const bill = details.facts.bill ?? {};
  const sums = [
    ["GPU hours", bill.gpu_hours],
    ["CPU core hours", bill.cpu_core_hours],
    ["Energy", bill.energy_kwh, "kWh"],
    ["Cost", bill.cost, bill.currency ?? ""],
    ["CO2", bill.co2_kg, "kg"],
  ].filter(([, value]) => value);
  const parts = [];
  const reasons = [...new Set(Object.values(bill.reasons ?? {}))];
  if (sums.length || details.nodes.length) {
    parts.push(
      h(
        "section",
        { class: "sheet" },
        h("h2", {}, "Used"),
        h(
          "ul",
          { class: "legend" },
          sums.map(([name, value, unit]) => h("li", {}, name, h("b", {}, `${number(value, 4)} ${unit ?? ""}`.trim()))),
        ),
        reasons.map((reason) => h("p", { class: "note" }, reason)),
      ),
    );
  }
  if (details.plan.length) parts.push(h("section", { class: "sheet" }, h("h2", {}, "Plan"), planTable(details.plan)));
  if (details.nodes.length)
    parts.push(h("section", { class: "sheet" }, h("h2", {}, "Nodes"), nodesTable(details.nodes)));
  return parts;
}

function planTable(rows) {
  const cell = (text, place) => (place ? h("td", {}, text) : h("th", { scope: "row" }, text));
  return h(
    "table",
    { class: "plain" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["", "Planned", "Measured", "Difference"].map((name) => h("th", { scope: "col" }, name)),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((row) => h("tr", {}, row.map(cell))),
    ),
  );
}

function nodesTable(nodes) {
  const names = [...new Set(nodes.flatMap((node) => Object.keys(node.joules)))];
  const head = [
    "Attempt",
    "Node",
    "Host",
    "Devices",
    "Held for",
    ...names.map((name) => `${name} power`),
    ...names.map((name) => `${name} energy`),
  ];
  return h(
    "table",
    { class: "plain" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        head.map((name) => h("th", { scope: "col" }, name)),
      ),
    ),
    h(
      "tbody",
      {},
      nodes.map((node) =>
        h(
          "tr",
          {},
          [
            node.attempt,
            node.node,
            node.host ?? "",
            `${node.devices} ${node.device}`,
            duration(node.seconds),
            ...names.map((name) =>
              node.watts[name] === undefined ? (node.missing[name] ?? "") : `${number(node.watts[name], 4)} W`,
            ),
            ...names.map((name) =>
              node.joules[name] === undefined ? "" : `${number(node.joules[name] / 3.6e6, 4)} kWh`,
            ),
          ].map((text) => h("td", {}, String(text))),
        ),
      ),
    ),
  );
}
