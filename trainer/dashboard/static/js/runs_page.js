// All runs: the table on the left, the charts of those that are selected on the right.

import { postJson } from "./api.js";
import { assign, variable } from "./colors.js";
import { defaultColumns, differing, plainValue, rank, shortened, sorted } from "./columns.js";
import { chooseColumns } from "./columns_dialog.js";
import { Combo } from "./combo.js";
import { differences } from "./differences.js";
import { announce, h, onFrame } from "./dom.js";
import { setting, share } from "./format.js";
import { filtered } from "./filter.js";
import { Panels } from "./panels.js";
import { distinctKeys } from "./parameters.js";
import { allRows, rowOf, status } from "./store.js";
import { RunTable } from "./table.js";
import { chartKey, Toolbar } from "./toolbar.js";
import { show, view } from "./view.js";

const OF_CHARTS = ["z", "x", "sm", "lx", "ly"];
const AUTOMATIC = 8;
const MOST_SELECTED = 100;
const FIRST_METRICS = 4;
const MOST_NAMED = 24;

// Returns whether nothing but what charts show has changed.
function isOfCharts(before) {
  return Object.keys(view).every((name) => OF_CHARTS.includes(name) || view[name] === before[name]);
}

export class RunsPage {
  constructor() {
    this.names = [];
    this.namesOf = "";
    this.filter = h("input", {
      type: "search",
      id: "filter",
      placeholder: "Filter: state=running lr>0.001 resnet",
      "aria-label": "Filter the runs",
      spellcheck: "false",
      autocomplete: "off",
      oninput: () => show({ q: this.filter.value }),
    });
    this.count = h("span", { class: "note", role: "status", id: "count" });
    this.table = new RunTable({
      onSort: (sort) => show({ sort }),
      onToggle: (key, range) => this.toggle(key, range),
      onOpen: (key) => show({ page: "run", run: key, tab: "charts", z: null, m: null }),
      onToggleAll: (on) => this.choose(on ? this.rows.slice(0, MOST_SELECTED).map((row) => row.key) : []),
    });
    this.metrics = new Combo({
      id: "metric",
      label: "Add a metric",
      placeholder: "Add a metric",
      options: () => this.names.filter((name) => !this.shown.includes(name)),
      choose: (name) => show({ m: [name, ...this.shown] }),
    });
    this.group = h("select", {
      "aria-label": "Group runs by",
      title: "Draw the mean of the runs that agree in everything but the seed, or in one setting",
      onchange: (event) => show({ group: event.target.value }),
    });
    this.band = h(
      "select",
      { "aria-label": "Band", onchange: (event) => show({ band: event.target.value }) },
      [
        ["deviation", "± standard deviation"],
        ["error", "± standard error"],
        ["range", "smallest to largest"],
      ].map(([value, text]) => h("option", { value }, text)),
    );
    this.toolbar = new Toolbar(this.metrics.element, h("label", {}, "group", this.group), this.band);
    this.panels = new Panels({
      settings: () => this.settings(),
      onZoom: (range) => show({ z: range }),
      onRemove: (metric) => show({ m: this.shown.filter((one) => one !== metric) }),
      empty: "Add a metric to see its curves.",
    });
    this.legend = h("ul", { class: "legend", "aria-label": "Lines" });
    this.differences = h("div", {});
    this.split = h(
      "div",
      { class: "split" },
      h(
        "section",
        { class: "pane table", "aria-label": "Table of runs" },
        h(
          "div",
          { class: "bar" },
          h("div", { class: "filter" }, this.filter),
          this.count,
          h("span", { class: "push" }),
          h("button", { type: "button", onclick: () => chooseColumns(this.rows) }, "Columns"),
        ),
        this.table.element,
      ),
      this.divider(),
      h(
        "section",
        { class: "pane charts", "aria-label": "Charts" },
        this.toolbar.element,
        this.legend,
        this.panels.element,
        h(
          "details",
          { class: "sheet differences", open: true },
          h("summary", {}, h("b", {}, "Differences")),
          this.differences,
        ),
      ),
    );
    this.panes = h(
      "div",
      { class: "panes", role: "group", "aria-label": "What to show" },
      ["runs", "charts"].map((name) =>
        h(
          "button",
          { type: "button", "data-pane": name, onclick: () => show({ pane: name }) },
          name === "runs" ? "Runs" : "Charts",
        ),
      ),
    );
    this.empty = h("div", { class: "empty-page" });
    this.element = h("div", { style: { display: "contents" } }, this.panes, this.split, this.empty);
    this.later = onFrame(() => this.render());
  }

  title() {
    return "Runs";
  }

  changed(changed) {
    this.later();
    const active = this.selection().some((key) => changed.has(key));
    if (active) this.panels.refresh();
  }

  // `before`: the view before a change. A zoom is drawn without another look at the table.
  render(before) {
    if (before && this.rows?.length && isOfCharts(before)) {
      this.toolbar.render();
      this.panels.show(this.shown);
      return;
    }
    const all = allRows();
    this.empty.hidden = all.length > 0;
    this.split.hidden = this.panes.hidden = all.length === 0;
    if (!all.length) {
      this.empty.replaceChildren(
        h("h1", {}, "No runs yet"),
        h(
          "p",
          { class: "note" },
          `There is no run in ${status.roots.join(", ")}. This page shows one as soon as trainer fit has made it.`,
        ),
      );
      return;
    }
    if (document.activeElement !== this.filter) this.filter.value = view.q;
    this.split.dataset.pane = view.pane;
    for (const button of this.panes.children)
      button.setAttribute("aria-pressed", String(button.dataset.pane === view.pane));
    const matching = filtered(all, view.q);
    this.rows = sorted(matching, view.sort);
    const selection = this.selection();
    assign(selection);
    const count = share(this.rows.length, all.length, "run");
    if (this.count.textContent !== count) this.count.textContent = count;
    this.table.set({
      rows: this.rows,
      columns: view.cols ?? defaultColumns(this.rows),
      sort: view.sort,
      selected: new Set(selection),
    });
    this.toolbar.render();
    this.renderGroups();
    this.band.hidden = !view.group;
    this.band.value = view.band;
    this.loadNames(selection);
    this.panels.show(this.shown);
    this.renderLegend();
    this.renderDifferences(selection);
  }

  renderLegend() {
    const { lines } = this.settings();
    const wanted = JSON.stringify(lines.map((line) => [line.key, line.label]));
    if (wanted === this.legendOf) return;
    this.legendOf = wanted;
    this.legend.replaceChildren(
      ...lines
        .slice(0, MOST_NAMED)
        .map((line) => h("li", {}, h("i", { class: "swatch", style: { background: variable(line.key) } }), line.label)),
      lines.length > MOST_NAMED ? h("li", { class: "note" }, `and ${lines.length - MOST_NAMED} more`) : "",
    );
  }

  renderDifferences(selection) {
    const rows = selection.map(rowOf).filter(Boolean);
    const wanted = JSON.stringify(rows.map((row) => [row.key, row.config]));
    if (wanted === this.differencesOf) return;
    this.differencesOf = wanted;
    this.differences.replaceChildren(differences(rows));
  }

  renderGroups() {
    const keys = ["", "seeds", ...differing(this.rows), "name", "strategy", "cluster"];
    const wanted = JSON.stringify([keys, view.group]);
    if (wanted === this.groupsOf) return;
    this.groupsOf = wanted;
    if (view.group && !keys.includes(view.group)) keys.push(view.group);
    this.group.replaceChildren(
      ...keys.map((key) =>
        h("option", { value: key }, key === "" ? "none" : key === "seeds" ? "all but the seed" : key),
      ),
    );
    this.group.value = view.group;
  }

  get shown() {
    if (view.m) return view.m;
    return [...this.names]
      .sort((a, b) => rank(a) - rank(b))
      .filter((name) => rank(name) < 4)
      .slice(0, FIRST_METRICS);
  }

  // The selected runs that exist; without a choice, the first of the table.
  selection() {
    if (view.sel) return view.sel.filter((key) => rowOf(key));
    return (this.rows ?? []).slice(0, AUTOMATIC).map((row) => row.key);
  }

  choose(keys) {
    show({ sel: keys });
  }

  toggle(key, range) {
    let keys = this.selection();
    if (range && this.anchor) {
      const [from, to] = [this.anchor, key]
        .map((one) => this.rows.findIndex((row) => row.key === one))
        .sort((a, b) => a - b);
      keys = [...new Set([...keys, ...this.rows.slice(Math.max(0, from), to + 1).map((row) => row.key)])];
    } else keys = keys.includes(key) ? keys.filter((one) => one !== key) : [...keys, key];
    this.anchor = key;
    if (keys.length > MOST_SELECTED) {
      announce(`At most ${MOST_SELECTED} runs can be shown at once`);
      keys = keys.slice(-MOST_SELECTED);
    }
    this.choose(keys);
  }

  settings() {
    const rows = this.selection().map(rowOf).filter(Boolean);
    const common = {
      axis: view.x,
      smoothing: view.sm,
      logX: view.lx,
      logY: view.ly,
      band: view.band,
      zoom: view.z,
      grouped: Boolean(view.group),
    };
    if (!view.group)
      return { ...common, lines: rows.map((row) => ({ key: row.key, label: label(row, rows), runs: [row.key] })) };
    const groups = new Map();
    const isSeed = (key) => /(^|\.)seed$/.test(key);
    const keys = view.group === "seeds" ? distinctKeys(rows.map((row) => withoutSeeds(row, isSeed))) : [view.group];
    for (const row of rows) {
      const values = keys.map((key) => `${shortened(key)}=${setting(plainValue(row, key))}`);
      const name = values.join(" ") || row.name;
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(row.key);
    }
    const lines = [...groups].map(([name, runs]) => ({
      key: `group:${name}`,
      label: `${name} (${runs.length})`,
      runs,
    }));
    assign(lines.map((line) => line.key));
    return { ...common, lines };
  }

  // The names of the metrics of the selected runs.
  async loadNames(selection) {
    const wanted = selection.join();
    if (wanted === this.namesOf) return;
    this.namesOf = wanted;
    if (!selection.length) {
      this.names = [];
      return;
    }
    const known = new Set(selection.flatMap((key) => Object.keys(rowOf(key)?.metrics ?? {})));
    if (!this.names.length) this.names = [...known];
    try {
      const answer = await postJson("/api/metrics", { runs: selection });
      if (wanted !== this.namesOf) return;
      this.names = answer.metrics;
      this.panels.show(this.shown);
    } catch {
      this.namesOf = ""; // asked again with the next change
    }
  }

  divider() {
    const drag = (event) => {
      const share = Math.min(80, Math.max(20, (100 * event.clientX) / innerWidth));
      this.split.style.setProperty("--left", `${share}%`);
    };
    const stop = () => {
      removeEventListener("pointermove", drag);
      removeEventListener("pointerup", stop);
    };
    return h("div", {
      class: "divider",
      "aria-hidden": "true",
      onpointerdown: (event) => {
        event.preventDefault();
        addEventListener("pointermove", drag);
        addEventListener("pointerup", stop);
      },
    });
  }

  onKey(event) {
    if (event.key === "/") {
      show({ pane: "runs" });
      this.filter.focus();
      this.filter.select();
    } else if (event.key === "m") {
      show({ pane: "charts" });
      this.metrics.input.focus();
    } else if (["ArrowDown", "j"].includes(event.key) && !this.table.element.contains(document.activeElement))
      this.table.focusOn(0, false);
    else return chartKey(event);
    return true;
  }

  restyle() {
    this.panels.restyle();
  }

  close() {
    this.panels.close();
    this.table.close();
  }
}

function withoutSeeds(row, isSeed) {
  return {
    ...row,
    config: Object.fromEntries(Object.entries(row.config ?? {}).filter(([key]) => !isSeed(key))),
    without: row.without?.filter((key) => !isSeed(key)),
  };
}

// The name of a run, with its id where another has the same name.
function label(row, rows) {
  return rows.some((one) => one !== row && one.name === row.name) ? `${row.name} ${row.id}` : row.name;
}
