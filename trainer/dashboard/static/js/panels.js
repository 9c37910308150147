// The charts of some runs: which metrics, how they are drawn, and the requests for their points.

import { curves as requestCurves } from "./api.js";
import { h } from "./dom.js";
import { AXES } from "./format.js";
import { Plot } from "./plot.js";

const REFRESH_MS = 2000;
const SOON_MS = 60;

class Panel {
  constructor(owner, metric) {
    this.owner = owner;
    this.metric = metric;
    this.plot = new Plot(metric, (range) => owner.onZoom(range));
    this.note = h("span", { class: "note" });
    this.tableButton = h(
      "button",
      {
        type: "button",
        class: "quiet",
        "aria-pressed": "false",
        title: "Show the values as a table",
        onclick: () => this.toggleTable(),
      },
      "Table",
    );
    this.element = h(
      "section",
      { class: "panel", "aria-label": metric },
      h(
        "header",
        {},
        h("h3", {}, metric),
        this.note,
        h("span", { class: "push" }),
        this.tableButton,
        owner.onRemove &&
          h(
            "button",
            {
              type: "button",
              class: "quiet",
              "aria-label": `Remove ${metric}`,
              title: "Remove",
              onclick: () => owner.onRemove(metric),
            },
            "×",
          ),
      ),
      this.plot.element,
    );
    this.asked = "";
    this.visible = false;
  }

  toggleTable() {
    this.tableButton.setAttribute("aria-pressed", String(this.plot.toggleTable()));
  }

  // Asks for the points at once, or soon while an answer is awaited: a slider that is dragged asks for few.
  load(force = false) {
    clearTimeout(this.soon);
    this.isForced ||= force;
    const isBusy = this.element.getAttribute("aria-busy") === "true";
    this.soon = setTimeout(() => this.loadNow(), isBusy ? SOON_MS : 0);
  }

  // Asks for the points unless they are those that were asked for last.
  async loadNow() {
    if (!this.visible || !this.element.isConnected) return;
    const settings = this.owner.settings();
    const body = this.owner.body(this.metric, this.plot.width);
    const wanted = JSON.stringify([body, settings.logY, settings.lines]);
    if (wanted === this.asked && !this.isForced) return;
    this.isForced = false;
    this.asked = wanted;
    this.abort?.abort();
    this.abort = new AbortController();
    if (!body.runs.length) return this.show({ edges: null, curves: [] }, settings);
    this.element.setAttribute("aria-busy", "true");
    try {
      this.show(await requestCurves(body, this.abort.signal), settings);
      this.element.setAttribute("aria-busy", "false");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.asked = "";
      this.element.setAttribute("aria-busy", "false");
      this.note.textContent = error.message;
    }
  }

  show(answer, settings) {
    const lines = answer.curves
      .map((curve, place) => {
        const line =
          curve.key === undefined ? settings.lines[curve.group] : settings.lines.find((one) => one.key === curve.key);
        return {
          x: new Float64Array(),
          y: new Float64Array(),
          ...curve,
          key: line?.key ?? String(place),
          color: line?.color,
          label: line?.label ?? "",
        };
      })
      .filter((line) => line.x.length || line.not_finite);
    this.note.textContent = remarks(answer, lines, settings);
    this.element.classList.toggle("empty", !lines.length);
    this.plot.set(lines, answer.edges ?? [0, 1], { axis: settings.axis, logX: settings.logX, logY: settings.logY });
    this.element.dataset.points = String(answer.curves.reduce((sum, curve) => sum + (curve.count ?? 0), 0));
    const converting = answer.curves.some((curve) => curve.progress < 1);
    clearTimeout(this.again);
    if (converting) this.again = setTimeout(() => this.load(true), 1000);
  }

  close() {
    clearTimeout(this.again);
    clearTimeout(this.soon);
    this.abort?.abort();
    this.plot.close();
  }
}

export class Panels {
  // settings() returns {lines: [{key, label, color, runs: [key]}], grouped, axis, smoothing, logX, logY, band, zoom}.
  constructor({ settings, onZoom, onRemove, empty }) {
    this.settings = settings;
    this.onZoom = onZoom;
    this.onRemove = onRemove;
    this.empty = empty;
    this.panels = new Map();
    this.element = h("div", { class: "panels" });
    this.observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const panel = [...this.panels.values()].find((one) => one.element === entry.target);
          if (!panel) continue;
          panel.visible = entry.isIntersecting;
          if (panel.visible) panel.load();
        }
      },
      { rootMargin: "200px" },
    );
    this.refreshed = 0;
  }

  show(metrics) {
    for (const [metric, panel] of this.panels) {
      if (metrics.includes(metric)) continue;
      this.observer.unobserve(panel.element);
      panel.close();
      panel.element.remove();
      this.panels.delete(metric);
    }
    for (const metric of metrics) {
      if (this.panels.has(metric)) continue;
      const panel = new Panel(this, metric);
      this.panels.set(metric, panel);
    }
    const order = metrics.map((metric) => this.panels.get(metric).element);
    if (
      order.some((element, place) => this.element.children[place] !== element) ||
      this.element.children.length !== order.length
    ) {
      this.element.replaceChildren(...(order.length ? order : [h("p", { class: "note" }, this.empty)]));
      for (const panel of this.panels.values()) this.observer.observe(panel.element);
    }
    for (const panel of this.panels.values()) panel.load();
  }

  // The points of active runs have grown.
  refresh() {
    if (Date.now() - this.refreshed < REFRESH_MS) return;
    this.refreshed = Date.now();
    for (const panel of this.panels.values()) panel.load(true);
  }

  restyle() {
    for (const panel of this.panels.values()) panel.plot.restyle();
  }

  body(metric, width) {
    const { lines, grouped, axis, smoothing, logX, band, zoom } = this.settings();
    const [start, end] = zoom ?? [null, null];
    const runs = [...new Set(lines.flatMap((line) => line.runs))];
    const common = { metric, runs, axis, start, end, pixels: width, smoothing, log_x: logX };
    return grouped ? { ...common, groups: lines.map((line) => line.runs), band } : common;
  }

  close() {
    this.observer.disconnect();
    for (const panel of this.panels.values()) panel.close();
    this.panels.clear();
  }
}

function remarks(answer, lines, settings) {
  const said = [];
  const progress = answer.curves.filter((curve) => curve.progress < 1).map((curve) => curve.progress);
  if (progress.length) said.push(`reading ${Math.floor(100 * Math.min(...progress))}%`);
  const bad = lines.filter((line) => line.not_finite);
  if (bad.length === 1)
    said.push(`${bad[0].label}: ${bad[0].first_not_finite[1]} from ${settings.axis} ${bad[0].first_not_finite[0]}`);
  else if (bad.length) said.push(`${bad.length} runs with NaN or inf`);
  const missing = answer.curves.filter((curve) => curve.no_axis).length;
  if (missing)
    said.push(`${missing === answer.curves.length ? "not" : `${missing} not`} recorded by ${AXES[settings.axis]}`);
  if (!answer.edges) said.push("no values");
  return said.join("; ");
}
