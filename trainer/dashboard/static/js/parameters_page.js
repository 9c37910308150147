// Runs of a sweep, or any others: parallel coordinates, the importance of each setting, and a table.

import { configOf, metricNames, rank } from "./columns.js";
import { getJson } from "./api.js";
import { announce, h, onFrame, svg } from "./dom.js";
import { filtered } from "./filter.js";
import { number, setting, share } from "./format.js";
import { mostImportant, points, scaleOf } from "./parameters.js";
import { allRows } from "./store.js";
import { state } from "./table.js";
import { betterOf, trialRows, withImportance } from "./trials.js";
import { show, view } from "./view.js";

const [TOP, BOTTOM, HEIGHT] = [34, 22, 360];
const MOST_LINES = 2000;
const MOST_ROWS = 200;
const REFRESH_MS = 3000;
const SMALLER_IS_BETTER = /loss|error|perplexity|ppl|mse|mae|rmse|wer|cer|fid/i;

export class ParametersPage {
  constructor() {
    this.limits = new Map(); // axis to the part of it that is chosen
    this.filter = h("input", {
      type: "search",
      id: "filter",
      placeholder: "Filter: name~sweep state=finished",
      "aria-label": "Filter the runs",
      spellcheck: "false",
      autocomplete: "off",
      oninput: () => show({ q: this.filter.value }),
    });
    this.sweep = h("select", {
      "aria-label": "Sweep",
      onchange: (event) => {
        this.limits.clear();
        show({ sweep: event.target.value, m: null });
      },
    });
    this.sweepLabel = h("label", { hidden: true }, "of", this.sweep);
    this.trials = null; // of the chosen sweep
    this.metric = h("select", { "aria-label": "Result", onchange: (event) => show({ m: [event.target.value] }) });
    this.count = h("span", { class: "note", role: "status", id: "count" });
    this.clear = h(
      "button",
      {
        type: "button",
        hidden: true,
        onclick: () => {
          this.limits.clear();
          this.draw();
        },
      },
      "All values",
    );
    this.chart = h("div", { class: "parallel" });
    this.importance = h("div", {});
    this.table = h("div", {});
    this.element = h(
      "div",
      { class: "runpage" },
      h(
        "div",
        { class: "bar" },
        h("div", { class: "filter" }, this.filter),
        this.sweepLabel,
        h("label", {}, "result", this.metric),
        this.count,
        this.clear,
      ),
      h(
        "div",
        { class: "stack" },
        h(
          "section",
          { class: "sheet" },
          h("h2", {}, "Parallel coordinates"),
          h(
            "p",
            { class: "note" },
            "Drag over an axis to choose a part of it, or use the arrow keys on it. Darker lines have better results.",
          ),
          this.chart,
        ),
        h("section", { class: "sheet" }, h("h2", {}, "Importance"), this.importance),
        h("section", { class: "sheet" }, h("h2", {}, "Runs"), this.table),
      ),
    );
    this.later = onFrame(() => this.render());
    this.observer = new ResizeObserver(() => this.rendered && this.draw());
    this.observer.observe(this.chart);
    this.loadSweeps();
  }

  async loadSweeps() {
    try {
      const { sweeps } = await getJson("/api/sweeps");
      this.sweepLabel.hidden = !sweeps.length;
      this.sweep.replaceChildren(
        h("option", { value: "" }, "all runs"),
        ...sweeps.map((one) => h("option", { value: one.key }, one.name)),
      );
      this.sweep.value = view.sweep;
    } catch {
      this.sweepLabel.hidden = true; // the banner says why
    }
  }

  // Asks for the trials of the chosen sweep, which change while it runs.
  async loadTrials() {
    const key = view.sweep;
    if (!key || (this.trials?.key === key && Date.now() - this.loadedAt < REFRESH_MS)) return;
    this.loadedAt = Date.now();
    try {
      const table = await getJson(`/api/sweeps/${encodeURIComponent(key)}`);
      if (key !== view.sweep) return;
      this.trials = { key, table };
      this.later();
    } catch (error) {
      this.trials = { key, table: null, problem: error.message };
      this.later();
    }
  }

  title() {
    return "Parameters";
  }

  changed() {
    this.later();
  }

  render() {
    this.loadTrials();
    const table = view.sweep && this.trials?.key === view.sweep ? this.trials.table : null;
    const rows = filtered(table ? trialRows(table) : view.sweep ? [] : allRows(), view.q);
    this.sweep.value = view.sweep;
    if (document.activeElement !== this.filter) this.filter.value = view.q;
    const names = table ? table.metrics : metricNames(rows);
    const metric = names.includes(view.m?.[0])
      ? view.m[0]
      : ((table ? names[0] : bestMetric(rows)) ?? names.find((name) => rank(name) < 2) ?? names[0]);
    const wanted = JSON.stringify([names, metric]);
    if (wanted !== this.namesOf) {
      this.namesOf = wanted;
      this.metric.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
      this.metric.value = metric ?? "";
    }
    const { known, keys } = points(rows, metric);
    this.span = null;
    const important = mostImportant(known, keys);
    const better = table ? betterOf(table, metric) : betterIs(rows, metric);
    this.data = { metric, known, keys, ...(table ? withImportance(important, table, metric) : important), better };
    this.rendered = true;
    this.draw();
    this.drawImportance();
  }

  draw() {
    const { known, metric, axes } = this.data;
    const chosen = known.filter((one) => this.isChosen(one));
    const count = `${share(chosen.length, known.length, "run")} with ${metric ?? "a result"}`;
    if (this.count.textContent !== count) this.count.textContent = count;
    this.clear.hidden = this.limits.size === 0;
    this.drawLines(known.slice(0, MOST_LINES), axes, metric);
    this.drawTable(chosen, axes, metric);
  }

  isChosen(one) {
    for (const [axis, [low, high]] of this.limits) {
      const at = this.scales?.get(axis)?.at(this.valueOf(one, axis));
      if (at === null || at === undefined || at < low - 1e-9 || at > high + 1e-9) return false;
    }
    return true;
  }

  valueOf(one, axis) {
    return axis === "" ? one.result : configOf(one.row, axis);
  }

  drawLines(known, keys, metric) {
    const axes = [...keys, ""]; // the last is the result
    if (known.length < 2 || !keys.length) {
      this.chart.replaceChildren(
        h("p", { class: "note" }, "Two or more runs with a result, and a setting in which they differ, are needed."),
      );
      return;
    }
    const width = Math.max(this.chart.clientWidth, axes.length * 90, 320);
    const toX = (place) => 60 + ((width - 130) * place) / (axes.length - 1);
    const toY = (share) => HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
    this.scales = new Map(axes.map((axis) => [axis, scaleOf(known.map((one) => this.valueOf(one, axis)))]));
    const lines = known
      .map((one) => ({ one, good: this.goodness(one) }))
      .sort((a, b) => a.good - b.good)
      .map(({ one, good }) => {
        const path = axes
          .map((axis, place) => {
            const at = this.scales.get(axis).at(this.valueOf(one, axis));
            return at === null ? null : `${toX(place).toFixed(1)},${toY(at).toFixed(1)}`;
          })
          .filter(Boolean)
          .join(" ");
        return svg(
          "polyline",
          {
            points: path,
            class: this.isChosen(one) ? "line" : "line off",
            "stroke-opacity": (0.15 + 0.75 * good).toFixed(2),
          },
          svg("title", {}, `${one.row.name} ${one.row.id}: ${number(one.result)}`),
        );
      });
    const drawn = svg(
      "svg",
      {
        class: "gantt",
        width,
        height: HEIGHT,
        viewBox: `0 0 ${width} ${HEIGHT}`,
        role: "group",
        "aria-label": `Parallel coordinates of ${known.length} runs`,
      },
      lines,
      axes.map((axis, place) => this.axis(axis, toX(place), toY, axis === "" ? metric : axis)),
    );
    const focused = document.activeElement?.closest?.("[data-axis]")?.dataset.axis;
    this.chart.replaceChildren(drawn);
    if (focused !== undefined) this.chart.querySelector(`[data-axis="${CSS.escape(focused)}"]`)?.focus();
  }

  axis(axis, x, toY, title) {
    const scale = this.scales.get(axis);
    const ticks =
      scale.choices && scale.ticks.length > 12
        ? scale.ticks.filter((_, place) => place % Math.ceil(scale.ticks.length / 12) === 0)
        : scale.ticks;
    const limits = this.limits.get(axis);
    const short = title.split(".").at(-1);
    const box = svg("rect", {
      x: x - 14,
      y: TOP - 6,
      width: 28,
      height: HEIGHT - TOP - BOTTOM + 12,
      class: "grab",
      "data-axis": axis,
      tabindex: "0",
      role: "slider",
      "aria-orientation": "vertical",
      "aria-label": `${title}: chosen part`,
      "aria-valuemin": "0",
      "aria-valuemax": "100",
      "aria-valuenow": limits ? Math.round(50 * (limits[0] + limits[1])) : 50,
      "aria-valuetext": limits ? this.said(scale, limits) : "all values",
      onpointerdown: (event) => this.drag(event, axis, toY),
      onkeydown: (event) => this.onAxisKey(event, axis),
      ondblclick: () => {
        this.limits.delete(axis);
        this.draw();
      },
    });
    return svg(
      "g",
      { class: "axis" },
      svg("line", { x1: x, x2: x, y1: toY(0), y2: toY(1) }),
      svg(
        "text",
        { x, y: 14, "text-anchor": "middle", class: "strong" },
        short.length > 16 ? `${short.slice(0, 15)}…` : short,
        svg("title", {}, title),
      ),
      ticks.map((value) =>
        svg("text", { x: x + 5, y: toY(scale.at(value)) + 4 }, clipped(scale.choices ? value : number(value, 3))),
      ),
      limits
        ? svg("rect", {
            x: x - 5,
            y: toY(limits[1]) - 2,
            width: 10,
            height: toY(limits[0]) - toY(limits[1]) + 4,
            class: "brush",
          })
        : null,
      box,
    );
  }

  said(scale, [low, high]) {
    if (!scale.choices) return `${number(scale.invert(low), 3)} to ${number(scale.invert(high), 3)}`;
    return (
      scale.ticks.filter((value) => scale.at(value) >= low - 1e-9 && scale.at(value) <= high + 1e-9).join(", ") ||
      "none"
    );
  }

  drag(event, axis, toY) {
    event.preventDefault();
    event.target.focus();
    const top = this.chart.querySelector("svg").getBoundingClientRect().top;
    const share = (one) => Math.min(1, Math.max(0, (toY(0) - (one.clientY - top)) / (toY(0) - toY(1))));
    const start = share(event);
    const move = onFrame(() => this.draw());
    const drag = (one) => {
      this.limits.set(axis, [Math.min(start, share(one)), Math.max(start, share(one))]);
      move();
    };
    const stop = () => {
      removeEventListener("pointermove", drag);
      removeEventListener("pointerup", stop);
    };
    addEventListener("pointermove", drag);
    addEventListener("pointerup", stop);
  }

  // Up and down move a part of a quarter; Escape chooses all.
  onAxisKey(event, axis) {
    const moves = { ArrowUp: 1, ArrowDown: -1 };
    const scale = this.scales.get(axis);
    if (event.key in moves) {
      const size = scale.choices ? 0 : 0.25;
      const step = scale.choices ? 1 / Math.max(1, scale.ticks.length - 1) : 0.125;
      const low = this.limits.has(axis)
        ? this.limits.get(axis)[0] + moves[event.key] * step
        : moves[event.key] > 0
          ? 0
          : 1 - size;
      const start = Math.min(1 - size, Math.max(0, low));
      this.limits.set(axis, [start, start + size]);
    } else if (event.key === "Escape" && this.limits.has(axis)) this.limits.delete(axis);
    else return;
    event.preventDefault();
    event.stopPropagation();
    this.draw();
    announce(
      `${this.limits.has(axis) ? this.said(scale, this.limits.get(axis)) : "all values"}: ${this.count.textContent}`,
    );
  }

  // From 0, the worst result, to 1.
  goodness(one) {
    const [low, high] = (this.span ??= this.data.known.reduce(
      ([least, most], other) => [Math.min(least, other.result), Math.max(most, other.result)],
      [Infinity, -Infinity],
    ));
    const share = high === low ? 1 : (one.result - low) / (high - low);
    return this.data.better === "min" ? 1 - share : share;
  }

  drawImportance() {
    const { all, metric } = this.data;
    const rows = all.filter((one) => one.found);
    if (!rows.length) {
      this.importance.replaceChildren(h("p", { class: "note" }, "More runs are needed to tell."));
      return;
    }
    this.importance.replaceChildren(
      h(
        "table",
        { class: "plain importance" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Setting"),
            h("th", { scope: "col" }, "Explains"),
            h("th", { scope: "col" }, ""),
            h("th", { scope: "col" }, "Direction"),
          ),
        ),
        h(
          "tbody",
          {},
          rows
            .slice(0, 30)
            .map(({ key, found }) =>
              h(
                "tr",
                {},
                h("th", { scope: "row", class: "mono" }, key),
                h("td", { class: "number" }, `${(100 * found.share).toFixed(0)}%`),
                h("td", { class: "meter" }, h("i", { style: { width: `${100 * found.share}%` } })),
                h(
                  "td",
                  {},
                  found.share < 0.02
                    ? ""
                    : found.sign > 0
                      ? `larger, larger ${metric}`
                      : found.sign < 0
                        ? `larger, smaller ${metric}`
                        : "a choice",
                ),
              ),
            ),
        ),
      ),
      h(
        "p",
        { class: "note" },
        "The share of the variance of the result's ranks that each setting alone explains, corrected for chance. " +
          "It sees no interactions, and is only as good as the runs are spread.",
      ),
    );
  }

  drawTable(chosen, keys, metric) {
    const order = [...chosen].sort((a, b) => (this.data.better === "min" ? a.result - b.result : b.result - a.result));
    this.table.replaceChildren(
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Run"),
            h("th", { scope: "col" }, "State"),
            h("th", { scope: "col", class: "number" }, metric ?? ""),
            keys.map((key) => h("th", { scope: "col" }, key)),
          ),
        ),
        h(
          "tbody",
          {},
          order.slice(0, MOST_ROWS).map((one) =>
            h(
              "tr",
              {},
              h("td", {}, link(one.row)),
              h("td", {}, one.row.state ? state(one.row.state) : ""),
              h("td", { class: "number" }, number(one.result)),
              keys.map((key) => h("td", {}, setting(configOf(one.row, key)))),
            ),
          ),
        ),
        order.length > MOST_ROWS
          ? h(
              "tfoot",
              {},
              h("tr", {}, h("td", { class: "note", colspan: keys.length + 3 }, `and ${order.length - MOST_ROWS} more`)),
            )
          : null,
      ),
    );
  }

  close() {
    this.observer.disconnect();
  }
}

function link(row) {
  const text = [row.name, h("small", {}, ` ${row.id}`)];
  if (row.hasRun === false) return h("span", {}, text);
  const open = (event) => {
    event.preventDefault();
    show({ page: "run", run: row.key, tab: "charts", m: null });
  };
  return h("a", { href: `#/run/${row.key}/charts`, onclick: open }, text);
}

function bestMetric(rows) {
  const counts = new Map();
  for (const row of rows) if (row.best?.metric) counts.set(row.best.metric, (counts.get(row.best.metric) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
}

function betterIs(rows, metric) {
  const said = rows.find((row) => row.best?.metric === metric)?.best.mode;
  return said ?? (SMALLER_IS_BETTER.test(metric ?? "") ? "min" : "max");
}

function clipped(text) {
  return text.length > 14 ? `${text.slice(0, 13)}…` : text;
}
