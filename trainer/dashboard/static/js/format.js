// Numbers, times and sizes as a person reads them.

const UNITS = [
  ["d", 86400],
  ["h", 3600],
  ["m", 60],
  ["s", 1],
];

export function number(value, digits = 5) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value === "string") return value;
  if (typeof value === "boolean") return String(value);
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(digits - 2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}

// 3d 4h, 12m 5s, 0.4s
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "";
  if (seconds < 0) return `-${duration(-seconds)}`;
  if (seconds < 10) return `${Number(seconds.toFixed(1))}s`;
  let left = Math.round(seconds);
  const parts = [];
  for (const [unit, size] of UNITS) {
    const count = Math.floor(left / size);
    left -= count * size;
    if (count || parts.length) parts.push(`${count}${unit}`);
    if (parts.length === 2) break;
  }
  return parts.filter((part, place) => place === 0 || !part.startsWith("0")).join(" ");
}

export function age(time, now) {
  if (!time) return "";
  const seconds = Math.max(0, now - time);
  for (const [unit, size] of UNITS) if (seconds >= size) return `${Math.floor(seconds / size)}${unit} ago`;
  return "now";
}

export function date(time) {
  if (!time) return "";
  const at = new Date(time * 1000);
  const two = (part) => String(part).padStart(2, "0");
  const day = [at.getFullYear(), two(at.getMonth() + 1), two(at.getDate())].join("-");
  return `${day} ${[at.getHours(), at.getMinutes(), at.getSeconds()].map(two).join(":")}`;
}

export function bytes(count) {
  if (count === null || count === undefined) return "";
  let value = count;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return `${Number(value.toPrecision(3))} ${unit}`;
    value /= 1000;
  }
  return `${Number(value.toPrecision(3))} TB`;
}

const SHORT = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

export function plural(count, word) {
  return `${number(count)} ${word}${count === 1 ? "" : "s"}`;
}

// 3 of 7 runs
export function share(some, all, word) {
  return some === all ? plural(all, word) : `${number(some)} of ${plural(all, word)}`;
}

// Labels of an axis: 10k, 1.5M, 0.002
export function tick(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  for (const [unit, letter] of SHORT) if (size >= unit) return `${Number((value / unit).toPrecision(6))}${letter}`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(Number(value.toPrecision(6)));
}

export function onAxis(axis, value) {
  if (axis === "time") return duration(value);
  if (axis === "date") return date(value);
  return number(value, 7);
}

export const AXES = {
  step: "step",
  time: "time since the start",
  date: "date",
  epoch: "epoch",
  samples: "samples",
  tokens: "tokens",
};

// A value of a configuration.
export function setting(value) {
  if (value === undefined) return "—";
  if (value === null) return "null";
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(8))) : String(value);
}
