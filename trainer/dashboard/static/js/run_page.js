// One run: charts, time line, configuration, logs, checkpoints.

import { getJson, postJson } from "./api.js";
import { assign } from "./colors.js";
import { rank } from "./columns.js";
import { Combo } from "./combo.js";
import { announce, h } from "./dom.js";
import { age, bytes, date, duration, number } from "./format.js";
import { configTab } from "./config_tab.js";
import { LogView } from "./log_view.js";
import { Panels } from "./panels.js";
import { rowOf, status } from "./store.js";
import { state } from "./table.js";
import { usedParts } from "./used.js";
import { ledgerBar, measure, timeline } from "./timeline.js";
import { chartKey, Toolbar } from "./toolbar.js";
import { address, show, view } from "./view.js";

const TABS = {
  charts: "Charts",
  system: "System",
  timeline: "Time line",
  config: "Configuration",
  logs: "Logs",
  checkpoints: "Checkpoints",
};
const ACTIVE = ["queued", "starting", "running", "stopping", "requeued"];
const isSystem = (name) => rank(name) >= 4;

export class RunPage {
  constructor(key) {
    this.key = key;
    this.names = [];
    this.details = null;
    this.head = h("div", { class: "runhead" });
    this.reason = h("div", {});
    this.tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Parts of the run" });
    this.body = h("div", { role: "tabpanel", id: "part", tabIndex: -1 });
    this.element = h("div", { class: "runpage" }, this.head, this.reason, this.tabs, this.body);
    this.metrics = new Combo({
      id: "metric",
      label: "Add a metric",
      placeholder: "Add a metric",
      options: () => this.names.filter((name) => !this.shown().includes(name)),
      choose: (name) => show({ m: [name, ...this.shown()] }),
    });
    this.toolbar = new Toolbar(this.metrics.element);
    this.panels = new Panels({
      settings: () => this.settings(),
      onZoom: (range) => show({ z: range }),
      onRemove: (metric) => show({ m: this.shown().filter((one) => one !== metric) }),
      empty: "Nothing of this kind was recorded.",
    });
    this.used = h("div", { class: "stack" });
    this.observer = new ResizeObserver(() => this.details && this.render());
    this.observer.observe(this.element);
    assign([key]);
    this.load();
  }

  title() {
    return rowOf(this.key)?.name ?? "Run";
  }

  async load() {
    try {
      const [details, names] = await Promise.all([
        getJson(`/api/runs/${this.key}`),
        postJson("/api/metrics", { runs: [this.key] }),
      ]);
      this.details = details;
      this.names = names.metrics;
      this.problem = "";
    } catch (error) {
      this.problem = error.message;
    }
    if (this.element.isConnected) this.render();
  }

  changed(changed) {
    if (!changed.has(this.key)) return;
    this.load();
    this.panels.refresh();
  }

  render() {
    const row = rowOf(this.key);
    if (!row) {
      this.body.replaceChildren(h("p", { class: "empty-page note" }, "This run does not exist any more."));
      return;
    }
    this.renderHead(row);
    this.tabs.replaceChildren(
      ...Object.entries(TABS).map(([name, title]) =>
        h(
          "a",
          {
            role: "tab",
            href: address({ ...view, tab: name }),
            "aria-selected": String(view.tab === name),
            "aria-controls": "part",
            tabIndex: view.tab === name ? 0 : -1,
            id: `tab-${name}`,
            onclick: (event) => {
              event.preventDefault();
              this.open(name);
            },
            onkeydown: (event) => this.onTabKey(event, name),
          },
          title,
        ),
      ),
    );
    this.body.setAttribute("aria-labelledby", `tab-${view.tab}`);
    this.renderTab(row);
  }

  open(tab) {
    show({ tab, m: null, z: null });
    this.tabs.querySelector(`#tab-${tab}`)?.focus();
  }

  onTabKey(event, name) {
    const names = Object.keys(TABS);
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    this.open(names[(names.indexOf(name) + move + names.length) % names.length]);
  }

  renderHead(row) {
    const now = Date.now() / 1000 + status.clockAhead;
    const facts = this.details?.facts ?? {};
    const fact = (title, text) => (text ? h("span", {}, `${title} `, h("b", {}, text)) : null);
    const active = ACTIVE.includes(row.state);
    const best = row.best ? `${number(row.best.value)} ${row.best.metric ?? ""} at step ${number(row.best.step)}` : "";
    const key = JSON.stringify([row, this.problem, Boolean(this.details), Math.floor(now / 10)]);
    if (key === this.headOf) return;
    this.headOf = key;
    this.head.replaceChildren(
      h("h1", {}, row.name, h("small", {}, ` ${row.id}`)),
      row.state ? state(row.state) : null,
      h("span", { class: "push" }),
      ...this.buttons(row, active),
      h(
        "div",
        { class: "facts" },
        fact(
          "step",
          row.step === null || row.step === undefined
            ? ""
            : number(row.step) + (row.max_steps ? ` of ${number(row.max_steps)}` : ""),
        ),
        fact("epoch", number(row.epoch)),
        fact("best", best),
        fact("took", row.started ? duration((row.ended ?? now) - row.started) : ""),
        fact("left", active ? duration(row.eta_s) : ""),
        fact("rate", row.rate ? `${number(row.rate, 4)} ${row.rate_unit ?? ""}` : ""),
        fact("created", `${date(row.created)}, ${age(row.created, now)}`),
        fact("attempts", row.attempts > 1 ? number(row.attempts) : ""),
        fact("ranks", row.world_size ? `${row.world_size} × ${row.strategy ?? ""}` : ""),
        fact("job", row.slurm_job_id),
        fact("goodput", row.goodput ? `${(100 * row.goodput).toFixed(1)}%` : ""),
        facts.tracking?.url ? fact("W&B", facts.tracking.url) : null,
        fact("directory", row.path),
      ),
    );
    const failed = ["failed", "dead", "unreadable"].includes(row.state);
    const said = [row.reason, ...(this.details?.waits ?? []), this.problem].filter(Boolean).join("\n");
    this.reason.replaceChildren(
      ...(said ? [h("p", { class: failed || this.problem ? "reason" : "reason mild" }, said)] : []),
    );
  }

  buttons(row, active) {
    if (status.readOnly || !row.state || row.state === "unreadable") return [];
    if (active)
      return [
        h(
          "button",
          { type: "button", class: "danger", disabled: row.state === "stopping", onclick: () => this.ask("stop", row) },
          row.state === "stopping" ? "Stopping …" : "Stop …",
        ),
      ];
    return row.state === "finished"
      ? []
      : [h("button", { type: "button", onclick: () => this.ask("resume", row) }, "Resume …")];
  }

  ask(action, row) {
    const text =
      action === "stop"
        ? "It saves a checkpoint and stops. It can be resumed later."
        : "It resumes from its newest good checkpoint, with the configuration and the code that it was launched with.";
    const output = h("pre", { hidden: true });
    const go = h(
      "button",
      {
        type: "button",
        class: action === "stop" ? "danger" : null,
        onclick: async () => {
          go.disabled = true;
          go.textContent = "Asking …";
          try {
            const answer = await postJson(`/api/runs/${this.key}/${action}`, {});
            announce(answer.code === 0 ? `${action}: done` : `${action}: refused`);
            if (answer.code === 0) return dialog.close();
            output.textContent = answer.output;
          } catch (error) {
            output.textContent = error.message;
          }
          output.hidden = false;
          go.hidden = true;
        },
      },
      action === "stop" ? "Save and stop" : "Resume",
    );
    const dialog = h(
      "dialog",
      { "aria-label": `${action} ${row.name}`, onclose: () => dialog.remove() },
      h("h2", {}, `${action === "stop" ? "Stop" : "Resume"} ${row.name} ${row.id}?`),
      h("p", {}, text),
      output,
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), go),
    );
    document.body.append(dialog);
    dialog.showModal();
  }

  shown() {
    const own = this.names.filter((name) => isSystem(name) === (view.tab === "system"));
    return view.m ?? own.sort((a, b) => rank(a) - rank(b)).slice(0, 60);
  }

  settings() {
    const lines = [{ key: this.key, label: rowOf(this.key)?.name ?? "", runs: [this.key] }];
    return {
      lines,
      grouped: false,
      axis: view.x,
      smoothing: view.sm,
      logX: view.lx,
      logY: view.ly,
      band: view.band,
      zoom: view.z,
    };
  }

  renderTab(row) {
    const tab = view.tab in TABS ? view.tab : "charts";
    if (tab === "charts" || tab === "system") {
      if (this.tab !== tab) this.body.replaceChildren(this.toolbar.element, this.panels.element, this.used);
      this.used.replaceChildren(...(tab === "system" && this.details ? usedParts(this.details) : []));
      this.tab = tab;
      this.toolbar.render();
      this.panels.show(this.details || this.names.length ? this.shown() : []);
      return;
    }
    if (tab === "logs") {
      if (this.tab !== tab) {
        this.log?.close();
        this.log = new LogView(this.key);
        this.body.replaceChildren(this.log.element);
      }
      this.tab = tab;
      this.log.render(this.details?.logs ?? [], ACTIVE.includes(row.state));
      return;
    }
    this.tab = tab;
    if (!this.details) {
      this.body.replaceChildren(h("p", { class: "stack note" }, this.problem || "Reading …"));
      return;
    }
    const key = JSON.stringify([tab, view.ref, shownBy(tab, this.details, row), this.element.clientWidth]);
    if (key === this.bodyOf && this.body.dataset.tab === tab && this.body.firstChild?.classList?.contains("stack"))
      return;
    this.bodyOf = key;
    this.body.dataset.tab = tab;
    measure(this.element.clientWidth);
    const parts = {
      timeline: () => timelineTab(this.details),
      config: () => configTab(row, this.details),
      checkpoints: () => checkpointsTab(this.details),
    };
    const open = [...this.body.querySelectorAll("details")].map((one) => one.open);
    this.body.replaceChildren(h("div", { class: "stack" }, parts[tab]()));
    this.body.querySelectorAll("details").forEach((one, place) => (one.open ||= open[place] ?? false));
  }

  onKey(event) {
    if (event.key === "m" && ["charts", "system"].includes(view.tab)) this.metrics.input.focus();
    else if (["charts", "system"].includes(view.tab)) return chartKey(event);
    else return false;
    return true;
  }

  restyle() {
    this.panels.restyle();
  }

  close() {
    this.observer.disconnect();
    this.panels.close();
    this.log?.close();
  }
}

// What a part shows: it is drawn again when this changes.
function shownBy(tab, details, row) {
  if (tab === "config") return [details.config, details.manifest, row.name];
  if (tab === "checkpoints") return [details.facts.checkpoints, details.facts.best];
  return [details.facts.ledger, details.attempts, details.events.length, details.ranks];
}

function timelineTab(details) {
  const columns = ["Rank", "Host", "Device", "Step", "Phase", "Batch", "Own", "Data"];
  return [
    h("section", { class: "sheet" }, h("h2", {}, "Where the time went"), ledgerBar(details.facts.ledger)),
    h("section", { class: "sheet" }, h("h2", {}, "Attempts and events"), timeline(details)),
    details.ranks.length
      ? h(
          "section",
          { class: "sheet" },
          h("h2", {}, "Ranks of the newest attempt"),
          h(
            "table",
            { class: "plain" },
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                columns.map((name) => h("th", { scope: "col" }, name)),
              ),
            ),
            h(
              "tbody",
              {},
              details.ranks.map((rank) =>
                h(
                  "tr",
                  {},
                  [
                    rank.rank,
                    rank.host,
                    rank.device,
                    number(rank.step),
                    rank.phase,
                    ...[rank.batch_s, rank.own_s, rank.data_s].map((value) =>
                      value ? `${number(1000 * value, 4)} ms` : "",
                    ),
                  ].map((text) => h("td", {}, String(text ?? ""))),
                ),
              ),
            ),
          ),
        )
      : null,
  ];
}

function checkpointsTab(details) {
  const saved = details.facts.checkpoints;
  const best = details.facts.best;
  if (!saved.length) return h("p", { class: "note" }, "No checkpoint has been saved yet.");
  return h(
    "section",
    { class: "sheet" },
    h(
      "table",
      { class: "plain" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["Step", "Size", "State", "Metrics", "Path"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        [...saved].reverse().map((one) =>
          h(
            "tr",
            {},
            h("td", {}, number(one.step), best && best.step === one.step ? h("small", {}, " best") : null),
            h("td", {}, bytes(one.bytes)),
            h(
              "td",
              { class: one.committed ? null : "bad" },
              one.committed ? (one.local ? "committed, on the node" : "committed") : "incomplete",
            ),
            h(
              "td",
              {},
              Object.entries(one.metrics ?? {})
                .map(([name, value]) => `${name} ${number(value)}`)
                .join(", "),
            ),
            h("td", { class: "mono" }, one.path),
          ),
        ),
      ),
    ),
  );
}
