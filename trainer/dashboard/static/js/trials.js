// The trials of a sweep in the form of rows, so that they are drawn as runs are.

import { rowOf } from "./store.js";

const OVER = ["finished", "failed", "pruned", "stopped"];

export function trialRows(table) {
  return table.trials.map((trial) => ({
    key: trial.run ?? `trial-${trial.number}`,
    hasRun: Boolean(trial.run && rowOf(trial.run)),
    name: trial.name || `trial ${trial.number}`,
    id: trial.name ? `trial ${trial.number}` : "",
    state: OVER.includes(trial.state) ? trial.state : (rowOf(trial.run)?.state ?? trial.state),
    reason: trial.reason,
    created: -trial.number,
    config: Object.fromEntries(Object.entries(trial.parameters).map(([key, text]) => [plainKey(key), plain(text)])),
    without: [],
    metrics: Object.fromEntries(table.metrics.map((name, place) => [name, trial.values[place]])),
  }));
}

// The importance that the sweep's own analysis gives, where it gives one.
export function withImportance(found, table, metric) {
  if (metric !== table.metrics[0] || !Object.keys(table.importance).length) return found;
  const shares = new Map(Object.entries(table.importance).map(([key, share]) => [plainKey(key), share]));
  const all = found.all
    .map((one) => ({
      ...one,
      found: shares.has(one.key) ? { sign: one.found?.sign ?? 0, share: shares.get(one.key) } : null,
    }))
    .sort((a, b) => (b.found?.share ?? -1) - (a.found?.share ?? -1));
  return { all, axes: found.axes };
}

export function betterOf(table, metric) {
  return table.directions[table.metrics.indexOf(metric)] === "minimize" ? "min" : "max";
}

function plainKey(key) {
  return key.replace(/^\++/, "");
}

function plain(text) {
  const value = Number(text);
  return text.trim() !== "" && Number.isFinite(value) ? value : text;
}
