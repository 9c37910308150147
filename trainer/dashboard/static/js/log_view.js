// The end of a log, which follows what is written, and earlier parts on request.

import { getJson } from "./api.js";
import { h } from "./dom.js";
import { bytes } from "./format.js";
import { show, view } from "./view.js";

const FOLLOW_MS = 1000;
const MOST_CHARACTERS = 2_000_000;

export class LogView {
  constructor(key) {
    this.key = key;
    this.name = "";
    this.choice = h("select", { "aria-label": "Log", onchange: (event) => show({ log: event.target.value }) });
    this.follow = h("input", { type: "checkbox", checked: true, onchange: () => this.toEnd() });
    this.earlier = h("button", { type: "button", hidden: true, onclick: () => this.loadEarlier() }, "Earlier");
    this.search = h("input", {
      type: "search",
      placeholder: "Only lines with",
      "aria-label": "Only lines with",
      oninput: () => this.draw(),
    });
    this.size = h("span", { class: "note" });
    this.text = h("pre", {
      class: "log",
      tabIndex: 0,
      role: "log",
      "aria-live": "off",
      "aria-label": "Log",
      onscroll: () => this.onScroll(),
    });
    this.element = h(
      "div",
      { class: "stack" },
      h(
        "div",
        { class: "bar" },
        h("label", {}, "log", this.choice),
        this.search,
        h("label", {}, this.follow, "follow"),
        this.earlier,
        this.size,
      ),
      this.text,
    );
    this.content = "";
    this.timer = setInterval(() => this.loadNew(), FOLLOW_MS);
  }

  render(names, active) {
    this.active = active;
    const wanted = names.includes(view.log) ? view.log : (names[0] ?? "");
    if (JSON.stringify(names) !== this.names) {
      this.names = JSON.stringify(names);
      this.choice.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
      if (!names.length) this.text.textContent = "There is no log yet.";
    }
    this.choice.value = wanted;
    if (wanted !== this.name) this.open(wanted);
  }

  async open(name) {
    this.name = name;
    this.content = "";
    this.end = undefined;
    if (!name) return;
    await this.request("", (part) => {
      this.content = part.text;
      this.start = part.start;
    });
    this.draw();
    this.toEnd();
  }

  async loadNew() {
    if (!this.name || this.end === undefined || !this.follow.checked || document.hidden || this.busy) return;
    const before = this.end;
    await this.request(`&offset=${this.end}`, (part) => {
      if (part.start !== before) {
        this.content = part.text;
        this.start = part.start;
      } // it was cut or replaced
      else if (part.text) this.content = (this.content + part.text).slice(-MOST_CHARACTERS);
      else return;
      this.draw();
      this.toEnd();
    });
  }

  async loadEarlier() {
    const height = this.text.scrollHeight;
    const start = this.start;
    await this.request(
      `&before=${start}`,
      (part) => {
        this.content = part.text + this.content;
        this.start = part.start;
        this.follow.checked = false;
      },
      true,
    );
    this.draw();
    this.text.scrollTop += this.text.scrollHeight - height;
  }

  async request(query, use, isEarlier = false) {
    this.busy = true;
    const name = this.name;
    try {
      const part = await getJson(`/api/runs/${this.key}/log?name=${encodeURIComponent(name)}${query}`);
      if (name !== this.name) return;
      use(part);
      if (!isEarlier) this.end = part.end;
      this.size.textContent = bytes(part.size);
    } catch (error) {
      this.size.textContent = error.message;
    } finally {
      this.busy = false;
    }
    this.earlier.hidden = !(this.start > 0);
  }

  draw() {
    const wanted = this.search.value.toLowerCase();
    this.text.textContent = wanted
      ? this.content
          .split("\n")
          .filter((line) => line.toLowerCase().includes(wanted))
          .join("\n") || "No such line in the part that is loaded."
      : this.content || "The log is empty.";
  }

  toEnd() {
    if (this.follow.checked) this.text.scrollTop = this.text.scrollHeight;
  }

  // Who scrolls up reads; at the end it follows again.
  onScroll() {
    const atEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 8;
    if (atEnd !== this.follow.checked && !this.search.value) this.follow.checked = atEnd;
  }

  close() {
    clearInterval(this.timer);
  }
}
