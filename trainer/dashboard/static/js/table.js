// The table of runs. Only the rows in view are in the document, so that ten thousand runs scroll like ten.

import { describe, explain } from "./columns.js";
import { variable } from "./colors.js";
import { h, onFrame } from "./dom.js";

const ROW = 28;
const SPARE = 6;

export class RunTable {
  // Calls: onSort(name), onToggle(key, range), onOpen(key), onToggleAll(on)
  constructor(calls) {
    this.calls = calls;
    this.rows = [];
    this.columns = [];
    this.selected = new Set();
    this.focused = null;
    this.head = h("thead", {});
    this.body = h("tbody", {});
    this.group = h("colgroup", {});
    this.table = h(
      "table",
      { class: "runs", role: "grid", "aria-label": "Runs", "aria-multiselectable": "true" },
      this.group,
      this.head,
      this.body,
    );
    this.draw = onFrame(() => this.render());
    // A row that is replaced while the button of the mouse is down would lose the click.
    this.isHeld = false;
    this.table.addEventListener("pointerdown", () => {
      this.isHeld = true;
    });
    this.onRelease = () => {
      if (!this.isHeld) return;
      this.isHeld = false;
      setTimeout(this.draw);
    };
    addEventListener("pointerup", this.onRelease);
    addEventListener("pointercancel", this.onRelease);
    this.element = h(
      "div",
      { class: "scroller", onscroll: this.draw, onkeydown: (event) => this.onKey(event) },
      this.table,
    );
    this.observer = new ResizeObserver(this.draw);
    this.observer.observe(this.element);
  }

  set({ rows, columns, sort, selected, automatic }) {
    this.rows = rows;
    this.selected = selected;
    this.automatic = automatic;
    this.sort = sort;
    this.columns = columns.map((name) => describe(name, rows)).filter(Boolean);
    this.table.setAttribute("aria-rowcount", String(rows.length + 1));
    this.table.setAttribute("aria-colcount", String(this.columns.length + 1));
    if (!rows.some((row) => row.key === this.focused)) this.focused = rows[0]?.key ?? null;
    this.renderHead();
    this.render();
  }

  close() {
    this.observer.disconnect();
    removeEventListener("pointerup", this.onRelease);
    removeEventListener("pointercancel", this.onRelease);
  }

  renderHead() {
    const names = JSON.stringify([this.columns.map((column) => [column.name, column.width]), this.sort]);
    const all = this.rows.length > 0 && this.rows.every((row) => this.selected.has(row.key));
    if (names !== this.headed) {
      this.headed = names;
      const widths = [4, ...this.columns.map((column) => column.width)];
      this.group.replaceChildren(...widths.map((width) => h("col", { style: { width: `${width * 0.56 + 1.1}rem` } })));
      this.table.style.width = `${widths.reduce((sum, width) => sum + width * 0.56 + 1.1, 0)}rem`;
      this.everyone = h("input", {
        type: "checkbox",
        "aria-label": "Show all runs of the table in the charts",
        onchange: (event) => this.calls.onToggleAll(event.target.checked),
      });
      this.head.replaceChildren(
        h(
          "tr",
          { "aria-rowindex": "1" },
          h("th", { scope: "col", class: "pick" }, this.everyone),
          ...this.columns.map((column) => this.heading(column)),
        ),
      );
    }
    this.everyone.checked = all;
  }

  heading(column) {
    const down = this.sort === `-${column.name}`;
    const direction = down ? "descending" : this.sort === column.name ? "ascending" : null;
    return h(
      "th",
      { scope: "col", "aria-sort": direction, class: column.numeric ? "number" : null },
      h(
        "button",
        {
          type: "button",
          class: "heading",
          title: column.title,
          onclick: () => this.calls.onSort(down ? column.name : `-${column.name}`),
        },
        h("span", {}, column.short ?? column.title),
        direction && h("i", { "aria-hidden": "true" }, down ? "↓" : "↑"),
      ),
    );
  }

  render() {
    if (this.isHeld) return;
    const height = this.element.clientHeight || 400;
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW) - SPARE);
    const last = Math.min(this.rows.length, Math.ceil((this.element.scrollTop + height) / ROW) + SPARE);
    const hadFocus = this.body.contains(document.activeElement) && document.activeElement.closest("tr")?.dataset.key;
    const rows = [];
    for (let place = first; place < last; place++) rows.push(this.row(this.rows[place], place));
    const space = (count) =>
      count > 0
        ? h(
            "tr",
            { "aria-hidden": "true", class: "space" },
            h("td", { colspan: this.columns.length + 1, style: { height: `${count * ROW}px` } }),
          )
        : null;
    this.body.replaceChildren(...[space(first), ...rows, space(this.rows.length - last)].filter(Boolean));
    if (hadFocus) this.body.querySelector(`tr[data-key="${CSS.escape(hadFocus)}"]`)?.focus({ preventScroll: true });
  }

  row(row, place) {
    const on = this.selected.has(row.key);
    return h(
      "tr",
      {
        "data-key": row.key,
        "aria-rowindex": String(place + 2),
        "aria-selected": String(on),
        tabIndex: row.key === this.focused ? 0 : -1,
        class: on ? "on" : null,
        onfocus: () => {
          this.focused = row.key;
        },
      },
      h(
        "td",
        { class: "pick" },
        h("input", {
          type: "checkbox",
          checked: on,
          tabIndex: -1,
          "aria-label": `Show ${row.name} ${row.id} in the charts`,
          style: on ? { "--own": variable(row.key) } : {},
          onclick: (event) => this.calls.onToggle(row.key, event.shiftKey),
        }),
      ),
      ...this.columns.map((column) =>
        h(
          "td",
          { class: column.numeric ? "number" : null, title: explain(row, column.name) || null },
          this.cell(row, column),
        ),
      ),
    );
  }

  cell(row, column) {
    if (column.name === "name") {
      return h(
        "a",
        {
          href: `#/run/${row.key}/charts`,
          tabIndex: -1,
          onclick: (event) => {
            if (event.ctrlKey || event.metaKey || event.shiftKey) return;
            event.preventDefault();
            this.calls.onOpen(row.key);
          },
        },
        row.name,
        h("small", {}, ` ${row.id}`),
      );
    }
    if (column.name === "state") return row.state ? state(row.state) : h("span", { class: "note" }, "…");
    return column.cell(row);
  }

  onKey(event) {
    if (event.target.matches("button, thead *") || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = this.rows.findIndex((row) => row.key === this.focused);
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW) - 2);
    const moves = {
      ArrowDown: 1,
      j: 1,
      ArrowUp: -1,
      k: -1,
      PageDown: page,
      PageUp: -page,
      Home: -Infinity,
      End: Infinity,
    };
    if (event.key in moves) this.focusOn(place + moves[event.key], event.shiftKey && event.key.startsWith("Arrow"));
    else if (event.key === " " || event.key === "x") this.focused && this.calls.onToggle(this.focused, event.shiftKey);
    else if (event.key === "Enter" || event.key === "o") this.focused && this.calls.onOpen(this.focused);
    else return;
    event.preventDefault();
  }

  focusOn(place, selects) {
    if (!this.rows.length) return;
    const row = this.rows[Math.min(this.rows.length - 1, Math.max(0, place))];
    this.focused = row.key;
    if (selects && !this.selected.has(row.key)) this.calls.onToggle(row.key, false);
    const top = this.rows.indexOf(row) * ROW;
    const head = this.head.offsetHeight;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top + ROW + head > this.element.scrollTop + this.element.clientHeight)
      this.element.scrollTop = top + ROW + head - this.element.clientHeight;
    this.render();
    this.body.querySelector(`tr[data-key="${CSS.escape(row.key)}"]`)?.focus({ preventScroll: true });
  }
}

export function state(name) {
  return h("span", { class: `state ${/^[a-z]+$/.test(name) ? name : ""}` }, h("i", { "aria-hidden": "true" }), name);
}
