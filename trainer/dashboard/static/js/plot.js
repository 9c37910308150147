// One chart: uPlot draws axes and grid, this file the lines, the read-out and all that a keyboard and a screen reader
// need.

import uPlot from "/static/vendor/uplot/uPlot.esm.js";
import { stroke } from "./colors.js";
import { announce, h } from "./dom.js";
import { AXES, number, onAxis, plural, setting, tick } from "./format.js";

const HEIGHT = 220;
const MOST_READ = 12;
const TABLE_ROWS = 12;

export class Plot {
  // `onZoom(range | null)` is called with the range that was chosen.
  constructor(title, onZoom) {
    this.title = title;
    this.onZoom = onZoom;
    this.lines = [];
    this.at = null;
    this.plot = null;
    this.options = { axis: "step", logX: false, logY: false };
    this.readout = h("div", { class: "readout", hidden: true });
    this.canvas = h("div", {
      class: "canvas",
      tabIndex: 0,
      role: "group",
      "aria-roledescription": "chart",
      onkeydown: (event) => this.onKey(event),
      onmousemove: (event) => this.onMouse(event),
      onmouseleave: () => this.leave(),
      onblur: () => this.leave(),
      ondblclick: () => this.onZoom(null),
    });
    this.tableBox = h("div", { class: "plot-table", hidden: true });
    this.element = h("div", { class: "plot" }, this.canvas, this.readout, this.tableBox);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.canvas);
  }

  // lines: [{key, label, x, y, raw_x, raw_y, low, high, not_finite, first_not_finite}], edges: [left, right]
  set(lines, edges, options) {
    const rebuild = !this.plot || JSON.stringify(options) !== JSON.stringify(this.options);
    this.lines = lines;
    this.edges = edges;
    this.options = options;
    if (rebuild) this.build();
    else this.redraw();
    this.canvas.setAttribute("aria-label", this.summary());
    if (!this.tableBox.hidden) this.fillTable();
    if (this.at !== null) this.showAt(this.at, false);
  }

  get width() {
    return Math.max(120, Math.round(this.canvas.clientWidth));
  }

  build() {
    this.plot?.destroy();
    const css = getComputedStyle(document.documentElement);
    const color = (name) => css.getPropertyValue(name).trim();
    const line = {
      stroke: color("--faint"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: color("--grid"), width: 1 },
      ticks: { show: false },
    };
    const { axis, logX, logY } = this.options;
    this.plot = new uPlot(
      {
        width: this.width,
        height: HEIGHT,
        mode: 1,
        legend: { show: false },
        padding: [8, 12, 0, 0],
        cursor: { points: { show: false }, y: false, drag: { x: true, y: false, setScale: false, dist: 5 } },
        select: { show: true },
        scales: {
          x: { time: axis === "date", distr: logX ? 3 : 1, range: () => this.xRange() },
          y: { distr: logY ? 3 : 1, range: () => this.yRange() },
        },
        series: [{}, { show: true, paths: () => null, points: { show: false } }],
        axes: [
          {
            ...line,
            size: 26,
            gap: 4,
            space: 70,
            ...(axis === "date"
              ? {}
              : { values: (_, values) => values.map((value) => (axis === "time" ? shortTime(value) : tick(value))) }),
          },
          { ...line, size: 52, gap: 4, values: (_, values) => values.map(tick) },
        ],
        hooks: {
          draw: [(plot) => this.draw(plot)],
          setSelect: [(plot) => this.selected(plot)],
        },
      },
      this.frame(),
      this.canvas,
    );
    this.plot.root.setAttribute("aria-hidden", "true");
  }

  // What uPlot needs to know: the edges. The lines are drawn by `draw`.
  frame() {
    return [
      [this.edges[0], Math.max(this.edges[1], this.edges[0] + 1e-9)],
      [0, 0],
    ];
  }

  redraw() {
    this.plot.setData(this.frame());
    this.plot.redraw();
  }

  restyle() {
    if (this.plot) this.build();
  }

  resize() {
    if (this.plot && this.width !== this.plot.width) this.plot.setSize({ width: this.width, height: HEIGHT });
  }

  xRange() {
    let [low, high] = this.edges;
    if (this.options.logX) {
      low = low > 0 ? low : Math.min(1, high / 1e6 || 1);
      high = Math.max(high, low * 1.01);
    }
    return high > low ? [low, high] : [low - 0.5, low + 0.5];
  }

  yRange() {
    let [low, high] = [Infinity, -Infinity];
    const [from, to] = this.xRange();
    const see = (x, y) => {
      if (!x) return;
      for (let place = 0; place < y.length; place++) {
        const value = y[place];
        if (x[place] < from || x[place] > to || (this.options.logY && value <= 0)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    };
    for (const line of this.lines) {
      see(line.x, line.y);
      see(line.raw_x, line.raw_y ?? []);
      if (line.low) {
        see(line.x, line.low);
        see(line.x, line.high);
      }
    }
    if (low > high) return this.options.logY ? [0.1, 1] : [0, 1];
    if (this.options.logY) return low === high ? [low / 2, high * 2] : [low * 0.9, high * 1.1];
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5;
    return [low - room, high + room];
  }

  draw(plot) {
    const { ctx, bbox } = plot;
    const place = (scale, start, size, flips) => {
      const { min, max, distr } = plot.scales[scale];
      const of = distr === 3 ? Math.log10 : (value) => value;
      const [low, high] = [of(min), of(max)];
      const factor = size / (high - low || 1);
      return flips
        ? (value) => start + size - (of(value) - low) * factor
        : (value) => start + (of(value) - low) * factor;
    };
    const toX = place("x", bbox.left, bbox.width, false);
    const toY = place("y", bbox.top, bbox.height, true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.lineJoin = "round";
    for (const line of this.lines) {
      const { color, dash } = stroke(line.color ?? line.key);
      ctx.strokeStyle = ctx.fillStyle = color;
      if (line.low) this.band(ctx, line, toX, toY);
      if (line.raw_x) this.path(ctx, line.raw_x, line.raw_y, toX, toY, 1, 0.25, []);
      const active = this.at !== null && this.at.line === line.key;
      this.path(ctx, line.x, line.y, toX, toY, active ? 2.5 : 1.5, 1, dash);
      if (line.x.length <= 40) this.dots(ctx, line, toX, toY);
    }
    if (this.at) this.mark(ctx, bbox, toX, toY);
    ctx.restore();
  }

  path(ctx, x, y, toX, toY, width, alpha, dash) {
    ctx.globalAlpha = alpha;
    ctx.lineWidth = width * devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    ctx.beginPath();
    const [logX, logY] = [this.options.logX, this.options.logY];
    let broken = true;
    for (let place = 0; place < x.length; place++) {
      if ((logY && y[place] <= 0) || (logX && x[place] <= 0)) {
        broken = true;
        continue;
      }
      if (broken) ctx.moveTo(toX(x[place]), toY(y[place]));
      else ctx.lineTo(toX(x[place]), toY(y[place]));
      broken = false;
    }
    ctx.stroke();
    ctx.globalAlpha = 1;
  }

  band(ctx, line, toX, toY) {
    const floor = this.options.logY ? this.plot.scales.y.min : -Infinity;
    ctx.globalAlpha = 0.18;
    ctx.beginPath();
    for (let place = 0; place < line.x.length; place++)
      ctx.lineTo(toX(line.x[place]), toY(Math.max(floor, line.high[place])));
    for (let place = line.x.length - 1; place >= 0; place--)
      ctx.lineTo(toX(line.x[place]), toY(Math.max(floor, line.low[place])));
    ctx.fill();
    ctx.globalAlpha = 1;
  }

  dots(ctx, line, toX, toY) {
    for (let place = 0; place < line.x.length; place++) {
      if ((this.options.logY && line.y[place] <= 0) || (this.options.logX && line.x[place] <= 0)) continue;
      ctx.beginPath();
      ctx.arc(toX(line.x[place]), toY(line.y[place]), 2 * devicePixelRatio, 0, 2 * Math.PI);
      ctx.fill();
    }
  }

  mark(ctx, bbox, toX, toY) {
    const css = getComputedStyle(document.documentElement);
    ctx.strokeStyle = css.getPropertyValue("--faint").trim();
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([]);
    ctx.beginPath();
    ctx.moveTo(toX(this.at.x), bbox.top);
    ctx.lineTo(toX(this.at.x), bbox.top + bbox.height);
    ctx.stroke();
    for (const line of this.lines) {
      const place = nearest(line.x, this.at.x);
      if (place < 0) continue;
      ctx.fillStyle = stroke(line.color ?? line.key).color;
      ctx.beginPath();
      ctx.arc(
        toX(line.x[place]),
        toY(line.y[place]),
        (line.key === this.at.line ? 4 : 3) * devicePixelRatio,
        0,
        2 * Math.PI,
      );
      ctx.fill();
    }
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width < 5) return;
    const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.onZoom(range);
  }

  onMouse(event) {
    if (!this.plot || !this.lines.length) return;
    const over = this.plot.over.getBoundingClientRect();
    const [left, top] = [event.clientX - over.left, event.clientY - over.top];
    if (left < 0 || left > over.width || top < 0 || top > over.height) return this.leave();
    const x = this.plot.posToVal(left, "x");
    const y = this.plot.posToVal(top, "y");
    let [best, line] = [Infinity, this.lines[0].key];
    for (const one of this.lines) {
      const place = nearest(one.x, x);
      if (place >= 0 && Math.abs(one.y[place] - y) < best) [best, line] = [Math.abs(one.y[place] - y), one.key];
    }
    this.showAt({ x, line }, false);
  }

  // Arrow keys walk over the points of a line and between lines; + - 0 zoom; t shows the table.
  onKey(event) {
    if (!this.lines.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const numbers = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    const order = this.lines.findIndex((line) => line.key === this.at?.line);
    const line = this.lines[Math.max(order, 0)];
    if (event.key in numbers) {
      const move = numbers[event.key] * (event.shiftKey ? 10 : 1);
      const from = this.at ? Math.max(0, nearest(line.x, this.at.x)) : move > 0 ? -1 : line.x.length;
      const place = Math.min(line.x.length - 1, Math.max(0, from + move));
      if (line.x.length) this.showAt({ x: line.x[place], line: line.key }, true);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const next =
        this.lines[(Math.max(order, 0) + (event.key === "ArrowUp" ? -1 : 1) + this.lines.length) % this.lines.length];
      const place = nearest(next.x, this.at?.x ?? next.x[0]);
      if (place >= 0) this.showAt({ x: next.x[place], line: next.key }, true);
    } else if (event.key === "+" || event.key === "-" || event.key === "=") {
      this.zoomBy(event.key === "-" ? 2 : 0.5);
    } else if (event.key === "0") {
      this.onZoom(null);
    } else if (event.key === "t") {
      this.toggleTable();
    } else if (event.key === "Escape" && this.at) {
      this.leave();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  zoomBy(factor) {
    const [low, high] = this.edges;
    const middle = this.at?.x ?? (low + high) / 2;
    this.onZoom([middle - (middle - low) * factor, middle + (high - middle) * factor]);
  }

  leave() {
    if (this.at === null) return;
    this.at = null;
    this.readout.hidden = true;
    this.plot?.redraw(false);
  }

  showAt(at, speaks) {
    this.at = at;
    const read = this.read(at.x);
    const own = read.find((one) => one.line.key === at.line) ?? read[0];
    if (!own) return;
    const x = onAxis(this.options.axis, own.x);
    const shown = read.slice(0, MOST_READ);
    if (!shown.includes(own)) shown[shown.length - 1] = own;
    this.readout.replaceChildren(
      h("div", { class: "readout-x" }, `${this.options.axis} ${x}`),
      ...shown.map((one) =>
        h(
          "div",
          { class: one === own ? "readout-row own" : "readout-row" },
          h("i", { class: "swatch", style: { background: stroke(one.line.color ?? one.line.key).color } }),
          h("span", { class: "readout-name" }, one.line.label),
          h("b", {}, number(one.y)),
          one.low === undefined ? null : h("small", {}, ` ${number(one.low, 4)} – ${number(one.high, 4)}`),
        ),
      ),
      read.length > MOST_READ ? h("div", { class: "note" }, `and ${read.length - MOST_READ} more`) : null,
    );
    this.readout.hidden = false;
    const left = this.plot.valToPos(at.x, "x") + this.plot.over.offsetLeft;
    const onRight = left < this.width / 2;
    this.readout.style.left = onRight ? `${left + 14}px` : "";
    this.readout.style.right = onRight ? "" : `${this.width - left + 14}px`;
    this.plot.redraw(false);
    const which = read.length > 1 ? [`Line ${this.lines.indexOf(own.line) + 1} of ${this.lines.length}.`] : [];
    if (speaks)
      announce([`${this.options.axis} ${x}, ${own.line.label}: ${number(own.y)}${band(own)}.`, ...which].join(" "));
  }

  // The nearest point of each line, the largest first.
  read(x) {
    const found = [];
    for (const line of this.lines) {
      const place = nearest(line.x, x);
      if (place >= 0)
        found.push({ line, x: line.x[place], y: line.y[place], low: line.low?.[place], high: line.high?.[place] });
    }
    return found.sort((a, b) => b.y - a.y);
  }

  summary() {
    const { axis } = this.options;
    const lines = this.lines.filter((line) => line.x.length);
    if (!lines.length) return `${this.title}: no points`;
    const last = lines
      .slice(0, 5)
      .map((line) => `${line.label} ends at ${number(line.y[line.y.length - 1])}`)
      .join(", ");
    const [from, to] = this.edges.map((edge) => onAxis(axis, edge));
    return [
      `${this.title} by ${AXES[axis]}, ${plural(lines.length, "line")}, from ${from} to ${to}.`,
      `${last}. Arrow keys read points, plus and minus zoom, t shows a table.`,
    ].join(" ");
  }

  toggleTable() {
    this.tableBox.hidden = !this.tableBox.hidden;
    if (!this.tableBox.hidden) this.fillTable();
    return !this.tableBox.hidden;
  }

  // What the chart shows, as a table: of each line its extremes, then values at evenly spaced x.
  fillTable() {
    const { axis } = this.options;
    const [low, high] = this.xRange();
    const places = Array.from({ length: TABLE_ROWS }, (_, row) => low + ((high - low) * row) / (TABLE_ROWS - 1));
    const lines = this.lines.slice(0, MOST_READ);
    const extremes = (line, of) => {
      let best = -1;
      const y = line.raw_y ?? line.y;
      for (let place = 0; place < y.length; place++) if (best < 0 || of(y[place], y[best])) best = place;
      return best < 0 ? "" : `${number(y[best])} at ${onAxis(axis, (line.raw_x ?? line.x)[best])}`;
    };
    const row = (title, cell) =>
      h("tr", {}, h("th", { scope: "row" }, title), ...lines.map((line) => h("td", {}, cell(line))));
    this.tableBox.replaceChildren(
      h(
        "table",
        { class: "plain" },
        h("caption", { class: "unseen" }, `${this.title} by ${AXES[axis]}`),
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, AXES[axis]),
            ...lines.map((line) => h("th", { scope: "col" }, line.label)),
          ),
        ),
        h(
          "tbody",
          {},
          row("smallest", (line) => extremes(line, (a, b) => a < b)),
          row("largest", (line) => extremes(line, (a, b) => a > b)),
          row("last", (line) => (line.y.length ? number(line.y[line.y.length - 1]) : "")),
          ...places.map((x) =>
            row(onAxis(axis, x), (line) => {
              const place = nearest(line.x, x);
              return place < 0 ? "" : setting(Number(line.y[place].toPrecision(6)));
            }),
          ),
        ),
      ),
    );
  }

  close() {
    this.observer.disconnect();
    this.plot?.destroy();
  }
}

function band(point) {
  return point.low === undefined ? "" : `, from ${number(point.low, 4)} to ${number(point.high, 4)}`;
}

function nearest(x, value) {
  if (!x.length) return -1;
  let [low, high] = [0, x.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle;
    else high = middle;
  }
  return value - x[low] <= x[high] - value ? low : high;
}

function shortTime(seconds) {
  if (seconds === null) return "";
  if (seconds >= 86400 * 2) return `${Number((seconds / 86400).toFixed(2))}d`;
  if (seconds >= 7200) return `${Number((seconds / 3600).toFixed(2))}h`;
  if (seconds >= 120) return `${Number((seconds / 60).toFixed(2))}m`;
  return `${Number(seconds.toFixed(2))}s`;
}
