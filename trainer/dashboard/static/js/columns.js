// The columns of the table: facts of a run, then what differs between the runs in view, then metrics.

import { age, date, duration, number, setting } from "./format.js";
import { common } from "./store.js";

const FACTS = {
  name: { title: "Name", width: 22 },
  state: { title: "State", width: 11 },
  step: { title: "Step", width: 13, numeric: true },
  best: { title: "Best", width: 11, numeric: true },
  created: { title: "Created", width: 9, numeric: true },
  duration: { title: "Duration", width: 9, numeric: true },
  attempts: { title: "Attempts", width: 9, numeric: true },
  world_size: { title: "Ranks", width: 7, numeric: true },
  strategy: { title: "Strategy", width: 10 },
  cluster: { title: "Cluster", width: 9 },
  slurm_job_id: { title: "Job", width: 9 },
  epoch: { title: "Epoch", width: 7, numeric: true },
  goodput: { title: "Goodput", width: 9, numeric: true },
  eta_s: { title: "Left", width: 8, numeric: true },
  rate: { title: "Rate", width: 10, numeric: true },
  checkpoints: { title: "Checkpoints", width: 11, numeric: true },
  id: { title: "Id", width: 10 },
  root: { title: "Root", width: 14 },
};
const FIRST = ["name", "state", "step"];
const LAST = ["created", "duration"];
const MOST_DIFFERING = 8;
const MOST_METRICS = 5;
const NEVER_DIFFERS = /^(name|runs_dir|hydra\b.*|tracking\.(run_name|notes|dir))$/;

// The value of a key as it is compared: a fact, a metric, or a setting by its key or the end of it.
export function plainValue(row, key) {
  if (key === "duration") return row.started ? (row.ended ?? Date.now() / 1000) - row.started : undefined;
  if (key === "best") return row.best?.value;
  if (key in FACTS) return row[key];
  if (row.metrics && key in row.metrics) return row.metrics[key];
  return configOf(row, fullKey(row, key));
}

export function configOf(row, key) {
  if (row.config && key in row.config) return row.config[key];
  if (row.without?.includes(key)) return undefined;
  return common()[key];
}

const endings = new Map();

function fullKey(row, key) {
  if (key in common() || key in (row.config ?? {})) return key;
  if (!endings.has(key)) {
    const found = Object.keys(common()).filter((one) => one.endsWith(`.${key}`));
    endings.set(key, found.length === 1 ? found[0] : key);
    if (endings.size > 500) endings.clear();
  }
  return endings.get(key) ?? key;
}

// Keys of the configuration with two or more values among these runs, those with the fewest values first.
export function differing(rows) {
  const seen = new Map();
  for (const row of rows) {
    for (const key of Object.keys(row.config ?? {})) if (!seen.has(key)) seen.set(key, null);
    for (const key of row.without ?? []) if (!seen.has(key)) seen.set(key, null);
  }
  const found = [];
  for (const key of seen.keys()) {
    if (NEVER_DIFFERS.test(key)) continue;
    const values = new Set();
    for (const row of rows) if (row.config) values.add(configOf(row, key));
    if (values.size > 1) found.push([key, values.size]);
  }
  return found.sort((a, b) => a[1] - b[1] || a[0].localeCompare(b[0])).map(([key]) => key);
}

// Names of metrics, those of validation first, then the loss, then all others.
export function metricNames(rows) {
  const names = new Set();
  for (const row of rows) for (const name of Object.keys(row.metrics ?? {})) names.add(name);
  return [...names].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}

export function rank(name) {
  if (name.startsWith("val")) return 0;
  if (/^train\/(loss|acc)/.test(name)) return 1;
  if (name.startsWith("test/")) return 2;
  if (/(_per_s|mfu|_ms|_seconds)$/.test(name)) return 4;
  if (/^(gpu|system|energy)/.test(name)) return 5;
  return 3;
}

export function defaultColumns(rows) {
  const settings = differing(rows)
    .slice(0, MOST_DIFFERING)
    .map((key) => `config:${key}`);
  const metrics = metricNames(rows)
    .filter((name) => rank(name) < 4)
    .slice(0, MOST_METRICS)
    .map((name) => `metric:${name}`);
  const roots = new Set(rows.map((row) => row.root)).size > 1 ? ["root"] : [];
  return [...FIRST, ...roots, ...metrics, ...settings, ...LAST];
}

export function allColumns(rows) {
  return [
    ...Object.keys(FACTS),
    ...metricNames(rows).map((name) => `metric:${name}`),
    ...differing(rows).map((key) => `config:${key}`),
    ...Object.keys(common())
      .filter((key) => !NEVER_DIFFERS.test(key))
      .map((key) => `config:${key}`),
  ].filter((name, place, all) => all.indexOf(name) === place);
}

export function describe(name, rows) {
  if (name.startsWith("metric:")) {
    const title = name.slice(7);
    return {
      name,
      title,
      width: Math.min(18, Math.max(9, title.length + 2)),
      numeric: true,
      cell: (row) => number(row.metrics?.[title]),
      value: (row) => row.metrics?.[title],
    };
  }
  if (name.startsWith("config:")) {
    const key = name.slice(7);
    const longest = rows
      .slice(0, 200)
      .reduce((most, row) => Math.max(most, setting(configOf(row, key)).length), key.length);
    const numeric = rows.slice(0, 50).every((row) => typeof (configOf(row, key) ?? 0) === "number");
    return {
      name,
      title: key,
      short: shortened(key),
      width: Math.min(20, Math.max(7, Math.min(longest, shortened(key).length + 2) + 1)),
      numeric,
      cell: (row) => setting(configOf(row, key)),
      value: (row) => configOf(row, key),
    };
  }
  const fact = FACTS[name];
  return fact && { name, ...fact, cell: (row) => shown(row, name), value: (row) => plainValue(row, name) };
}

// optimizer.lr as lr, unless it has one part
export function shortened(key) {
  const parts = key.split(".");
  return parts.length > 1 ? parts.slice(-1)[0] : key;
}

function shown(row, name) {
  const now = Date.now() / 1000;
  if (name === "step")
    return row.step === null || row.step === undefined
      ? ""
      : number(row.step) + (row.max_steps ? ` / ${number(row.max_steps)}` : "");
  if (name === "best") return number(row.best?.value);
  if (name === "created") return age(row.created, now);
  if (name === "duration") return duration(plainValue(row, "duration"));
  if (name === "eta_s") return duration(row.eta_s);
  if (name === "goodput")
    return row.goodput === null || row.goodput === undefined ? "" : `${(100 * row.goodput).toFixed(1)}%`;
  if (name === "rate") return row.rate ? `${number(row.rate, 4)} ${row.rate_unit ?? ""}` : "";
  return number(row[name]);
}

export function explain(row, name) {
  if (name === "created") return date(row.created);
  if (name === "state") return row.reason ?? "";
  if (name === "best" && row.best) return `${row.best.metric} at step ${row.best.step}`;
  return "";
}

export function sorted(rows, sort) {
  const down = sort.startsWith("-");
  const name = down ? sort.slice(1) : sort;
  const column = describe(name, rows);
  if (!column) return rows;
  const keyed = rows.map((row) => [column.value(row), row]);
  keyed.sort(
    ([a, rowA], [b, rowB]) => compare(a, b, down) || rowB.created - rowA.created || (rowA.key < rowB.key ? -1 : 1),
  );
  return keyed.map(([, row]) => row);
}

// What is not known comes last in both directions.
function compare(a, b, down) {
  const [noneA, noneB] = [isNone(a), isNone(b)];
  if (noneA || noneB) return noneA - noneB;
  const order =
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -order : order;
}

function isNone(value) {
  return value === undefined || value === null || value === "" || Number.isNaN(value) || value === "nan";
}
