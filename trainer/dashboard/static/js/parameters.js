// How settings go with a result: numbers, without drawing anything.

import { configOf, differing, plainValue } from "./columns.js";

const MOST_AXES = 10;
const FEWEST = 4;

// The result of each run (the best checkpoint's value where the metric is that one's, else the last), and the settings
// that differ.
export function points(rows, metric) {
  const known = rows
    .map((row) => ({ row, result: resultOf(row, metric) }))
    .filter((one) => Number.isFinite(one.result));
  return { known, keys: distinctKeys(known.map((one) => one.row)) };
}

// The settings that differ, without those that split the runs in the same way as one before.
export function distinctKeys(rows) {
  const seen = new Set();
  const keys = [];
  for (const key of differing(rows)) {
    const values = rows.map((row) => configOf(row, key));
    const classes = new Map();
    const pattern = values
      .map((value) => {
        if (!classes.has(value)) classes.set(value, classes.size);
        return classes.get(value);
      })
      .join();
    if (seen.has(pattern) || values.some((value) => typeof value === "string" && value.length > 200)) continue;
    seen.add(pattern);
    keys.push(key);
  }
  return keys;
}

function resultOf(row, metric) {
  if (row.best && row.best.metric === metric) return row.best.value;
  const value = plainValue(row, metric);
  return typeof value === "number" ? value : NaN;
}

// Share of the variance of the result that a setting alone explains: the squared rank correlation of a number, the
// correlation ratio of a choice, both corrected for what chance explains with so many runs. From 0 to 1.
export function importance(known, key) {
  const pairs = known
    .map((one) => [configOf(one.row, key), one.result])
    .filter(([value]) => value !== undefined && value !== null);
  if (pairs.length < FEWEST) return null;
  const results = ranks(pairs.map(([, result]) => result));
  const numeric = isNumeric(pairs.map(([value]) => value));
  const [explained, freedom] = numeric
    ? [correlation(ranks(pairs.map(([value]) => value)), results) ** 2, 1]
    : [
        ratio(
          pairs.map(([value]) => value),
          results,
        ),
        new Set(pairs.map(([value]) => value)).size - 1,
      ];
  const left = pairs.length - freedom - 1;
  if (left <= 0 || Number.isNaN(explained)) return null;
  return {
    share: Math.max(0, 1 - ((1 - explained) * (pairs.length - 1)) / left),
    sign: numeric ? Math.sign(correlation(ranks(pairs.map(([value]) => value)), results)) : 0,
  };
}

export function isNumeric(values) {
  return (
    values.every((value) => typeof value === "number" || value === null || value === undefined) &&
    new Set(values).size > 2
  );
}

// A scale from 0 to 1: numbers by their value, or their logarithm if they span two decades, choices evenly.
export function scaleOf(values) {
  const usable = values.filter((value) => value !== undefined && value !== null);
  if (isNumeric(usable) || (usable.length && usable.every((value) => typeof value === "number"))) {
    const [low, high] = usable.reduce(
      ([least, most], value) => [Math.min(least, value), Math.max(most, value)],
      [Infinity, -Infinity],
    );
    const log = low > 0 && high / low >= 50;
    const of = log ? Math.log : (value) => value;
    const span = of(high) - of(low) || 1;
    return {
      at: (value) => (value === undefined || value === null ? null : (of(value) - of(low)) / span),
      ticks: low === high ? [low] : [low, log ? Math.sqrt(low * high) : (low + high) / 2, high],
      log,
      invert: (place) => (log ? Math.exp(of(low) + place * span) : low + place * span),
    };
  }
  const choices = [...new Set(usable.map(String))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  return {
    at: (value) =>
      value === undefined || value === null
        ? null
        : choices.length < 2
          ? 0.5
          : choices.indexOf(String(value)) / (choices.length - 1),
    ticks: choices,
    choices: true,
  };
}

export function mostImportant(known, keys) {
  const found = keys.map((key) => ({ key, found: importance(known, key) }));
  found.sort((a, b) => (b.found?.share ?? -1) - (a.found?.share ?? -1));
  return { all: found, axes: found.slice(0, MOST_AXES).map((one) => one.key) };
}

function ranks(values) {
  const order = values.map((value, place) => [value, place]).sort((a, b) => a[0] - b[0]);
  const found = new Array(values.length);
  for (let start = 0; start < order.length;) {
    let end = start;
    while (end < order.length && order[end][0] === order[start][0]) end++;
    for (let place = start; place < end; place++) found[order[place][1]] = (start + end - 1) / 2;
    start = end;
  }
  return found;
}

function correlation(a, b) {
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [meanA, meanB] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  a.forEach((value, place) => {
    ab += (value - meanA) * (b[place] - meanB);
    aa += (value - meanA) ** 2;
    bb += (b[place] - meanB) ** 2;
  });
  return ab / Math.sqrt(aa * bb);
}

function ratio(groups, values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const sums = new Map();
  groups.forEach((group, place) => {
    const one = sums.get(group) ?? [0, 0];
    sums.set(group, [one[0] + values[place], one[1] + 1]);
  });
  const between = [...sums.values()].reduce((sum, [total, count]) => sum + count * (total / count - mean) ** 2, 0);
  return between / values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
}
