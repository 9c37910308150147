// The time of a run: a bar by class, attempts and events on one line of time.

import { h, svg } from "./dom.js";
import { date, duration, number, plural } from "./format.js";

const CLASSES = {
  train: "--line-2",
  data: "--line-4",
  validate: "--line-0",
  save: "--line-5",
  redone: "--line-1",
  hang: "--line-6",
  down: "--rest",
  queue: "--grid",
  start: "--line-10",
  import: "--line-8",
  build: "--line-3",
  first_step: "--line-9",
  finish: "--line-7",
};
const MOST_EVENTS = 400;
const [LEFT, ROW] = [78, 26];
let WIDTH = 1000;

// As wide as the page, so that the text keeps its size.
export function measure(width) {
  WIDTH = Math.max(360, Math.min(1800, Math.round(width) - 60));
}

export function ledgerBar(ledger) {
  if (!ledger) return h("p", { class: "note" }, "No rank has written a heartbeat yet.");
  const parts = Object.entries(ledger.seconds).filter(([, seconds]) => seconds > 0);
  const total = parts.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  let at = 0;
  const said = parts.map(([name, seconds]) => `${name} ${duration(seconds)}`).join(", ");
  const bars = parts.map(([name, seconds]) => {
    const width = (WIDTH * seconds) / total;
    const bar = svg(
      "rect",
      { x: at, y: 0, width: Math.max(width - 1, 0.5), height: 22, rx: 2, fill: `var(${CLASSES[name] ?? "--rest"})` },
      svg("title", {}, `${name} ${duration(seconds)}`),
    );
    at += width;
    return bar;
  });
  const share = (value) => (value === null || value === undefined ? "not known" : `${(100 * value).toFixed(1)}%`);
  return h(
    "div",
    {},
    svg(
      "svg",
      {
        class: "gantt",
        viewBox: `0 0 ${WIDTH} 22`,
        preserveAspectRatio: "none",
        height: "22",
        role: "img",
        "aria-label": said,
      },
      bars,
    ),
    h(
      "ul",
      { class: "legend" },
      parts
        .sort((a, b) => b[1] - a[1])
        .map(([name, seconds]) =>
          h(
            "li",
            {},
            h("i", { class: "swatch", style: { background: `var(${CLASSES[name] ?? "--rest"})` } }),
            name,
            h("b", {}, duration(seconds)),
            h("small", {}, `${((100 * seconds) / total).toFixed(seconds / total < 0.1 ? 1 : 0)}%`),
          ),
        ),
    ),
    h(
      "p",
      { class: "note" },
      `Wall time ${duration(ledger.wall_s)}; training ${share(ledger.effective)} of it, `,
      `${share(ledger.goodput)} without the queue.`,
    ),
  );
}

export function timeline(details) {
  const { attempts } = details;
  const events = details.events.slice(-MOST_EVENTS);
  if (!attempts.length && !events.length) return h("p", { class: "note" }, "Nothing has happened yet.");
  const now = Date.now() / 1000;
  const ends = attempts
    .map((one) => [one.began, one.ended ?? now])
    .flat()
    .filter(Boolean);
  const times = [...ends, ...events.map((event) => event.time)];
  const [first, last] = [Math.min(...times), Math.max(...times, Math.min(...times) + 1)];
  const toX = (time) => LEFT + ((WIDTH - LEFT - 12) * (time - first)) / (last - first);
  const height = ROW * (attempts.length + 1) + 22;
  const bars = attempts.map((one, row) => attemptBar(one, row * ROW, toX, now));
  const y = attempts.length * ROW;
  const marks = events.map((event) =>
    svg(
      "circle",
      { cx: toX(event.time), cy: y + 12, r: 4, fill: `var(${mood(event.event)})`, "fill-opacity": "0.85" },
      svg("title", {}, `${date(event.time)} ${event.event} ${told(event)}`),
    ),
  );
  const ticks = Array.from({ length: 6 }, (_, place) => first + ((last - first) * place) / 5);
  const grid = ticks.map((time, place) => [
    svg("line", { x1: toX(time), x2: toX(time), y1: 0, y2: height - 18 }),
    svg(
      "text",
      { x: toX(time), y: height - 4, "text-anchor": place === 0 ? "start" : place === 5 ? "end" : "middle" },
      place === 0 ? date(time) : `+${duration(time - first) || "0s"}`,
    ),
  ]);
  return h(
    "div",
    {},
    svg(
      "svg",
      {
        class: "gantt",
        viewBox: `0 0 ${WIDTH} ${height}`,
        role: "img",
        "aria-label": [
          `${plural(attempts.length, "attempt")} and ${plural(events.length, "event")}`,
          `from ${date(first)} to ${date(last)}; the tables below list them`,
        ].join(" "),
      },
      grid,
      bars,
      svg("text", { x: 0, y: y + 16 }, "events"),
      marks,
    ),
    attempts.length ? attemptsTable(attempts) : null,
    h(
      "details",
      {},
      h(
        "summary",
        {},
        `${events.length} events${details.events_left_out ? ` of ${events.length + details.events_left_out}` : ""}`,
      ),
      h(
        "table",
        { class: "plain" },
        h(
          "tbody",
          {},
          [...events]
            .reverse()
            .map((event) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, date(event.time)),
                h("td", {}, event.event),
                h("td", {}, told(event)),
              ),
            ),
        ),
      ),
    ),
  );
}

function attemptBar(one, y, toX, now) {
  const [began, ended] = [one.began, one.ended ?? now];
  const label = svg("text", { x: 0, y: y + 16, class: "strong" }, `attempt ${one.attempt}`);
  if (!began) return label;
  let at = toX(began);
  const scale = (toX(ended) - at) / Math.max(ended - began, 1e-9);
  const parts = Object.entries(one.spent)
    .filter(([, seconds]) => seconds > 0)
    .map(([name, seconds]) => {
      const width = seconds * scale;
      const part = svg(
        "rect",
        { x: at, y: y + 4, width: Math.max(0.5, width), height: 16, fill: `var(${CLASSES[name] ?? "--line-7"})` },
        svg("title", {}, `${name} ${duration(seconds)}`),
      );
      at += width;
      return part;
    });
  const whole = svg("rect", {
    x: toX(began),
    y: y + 4,
    width: Math.max(2, toX(ended) - toX(began)),
    height: 16,
    fill: "var(--rest)",
    "fill-opacity": "0.35",
  });
  return [label, whole, ...parts];
}

function attemptsTable(attempts) {
  return h(
    "table",
    { class: "plain" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["Attempt", "Began", "Took", "Steps", "End", "Host", "Reason"].map((name) => h("th", { scope: "col" }, name)),
      ),
    ),
    h(
      "tbody",
      {},
      attempts.map((one) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, String(one.attempt)),
          h("td", {}, date(one.began)),
          h("td", {}, one.began && one.ended ? duration(one.ended - one.began) : ""),
          h(
            "td",
            {},
            one.step === null || one.step === undefined ? "" : `${number(one.first_step ?? 0)} – ${number(one.step)}`,
          ),
          h("td", {}, one.outcome ?? "active"),
          h("td", {}, one.host ?? ""),
          h(
            "td",
            {},
            one.reason,
            one.where ? h("div", { class: "mono" }, one.where) : null,
            one.lines.length
              ? h("details", {}, h("summary", {}, "last lines"), h("pre", {}, one.lines.join("\n")))
              : null,
          ),
        ),
      ),
    ),
  );
}

function mood(name) {
  if (
    [
      "failed",
      "hang",
      "hung",
      "not_finite",
      "node_lost",
      "out_of_memory",
      "checkpoint_failed",
      "checkpoint_skipped",
    ].includes(name)
  )
    return "--bad";
  if (["straggler", "loss_spike", "stop_requested", "preempted", "requeued"].includes(name)) return "--warm";
  return name === "checkpoint" ? "--line-5" : name === "finished" ? "--good" : "--cool";
}

function told(event) {
  return Object.entries(event)
    .filter(
      ([name, value]) => !["event", "time"].includes(name) && value !== "" && !(Array.isArray(value) && !value.length),
    )
    .map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : number(value)}`)
    .join(", ");
}
