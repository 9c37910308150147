// A text field that suggests while one types (WAI-ARIA combobox with a list).

import { h } from "./dom.js";

const MOST = 60;

export class Combo {
  // options() returns the texts to choose from; choose(text) is called with the chosen one.
  constructor({ label, placeholder, options, choose, id }) {
    this.options = options;
    this.choose = choose;
    this.active = -1;
    this.list = h("ul", { class: "combo-list", role: "listbox", id: `${id}-list`, hidden: true, "aria-label": label });
    this.input = h("input", {
      type: "search",
      id,
      placeholder,
      autocomplete: "off",
      spellcheck: "false",
      role: "combobox",
      "aria-label": label,
      "aria-expanded": "false",
      "aria-controls": `${id}-list`,
      "aria-autocomplete": "list",
      oninput: () => this.open(),
      onfocus: () => this.open(),
      onkeydown: (event) => this.onKey(event),
      onblur: () => this.close(),
    });
    this.element = h("div", { class: "combo" }, this.input, this.list);
  }

  open() {
    const matching = matches(this.options(), this.input.value);
    const items = matching.slice(0, MOST);
    this.active = items.length && this.input.value ? 0 : -1;
    this.list.replaceChildren(
      ...items.map((text, place) =>
        h(
          "li",
          {
            role: "option",
            id: `${this.input.id}-${place}`,
            "aria-selected": place === this.active ? "true" : "false",
            // Before the field loses the focus.
            onmousedown: (event) => {
              event.preventDefault();
              this.pick(text);
            },
          },
          text,
        ),
      ),
      matching.length > MOST
        ? h("li", { class: "note", role: "presentation" }, `and ${matching.length - MOST} more: type to narrow down`)
        : null,
      matching.length ? null : h("li", { class: "note", role: "presentation" }, "nothing matches"),
    );
    this.items = items;
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.mark();
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  pick(text) {
    this.input.value = "";
    this.close();
    this.choose(text);
  }

  mark() {
    [...this.list.children].forEach(
      (item, place) =>
        item.role === "option" && item.setAttribute("aria-selected", place === this.active ? "true" : "false"),
    );
    const item = this.list.children[this.active];
    if (item) {
      this.input.setAttribute("aria-activedescendant", item.id);
      item.scrollIntoView({ block: "nearest" });
    } else this.input.removeAttribute("aria-activedescendant");
  }

  onKey(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (this.list.hidden) this.open();
      const count = this.items.length;
      if (count) this.active = (this.active + (event.key === "ArrowDown" ? 1 : -1) + count) % count;
      this.mark();
    } else if (event.key === "Enter" && this.items?.[this.active] && !this.list.hidden)
      this.pick(this.items[this.active]);
    else if (event.key === "Escape") {
      if (this.list.hidden && !this.input.value) this.input.blur();
      this.input.value = "";
      this.close();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

// Those with all words; one that begins so comes first.
export function matches(options, typed) {
  const words = typed.toLowerCase().split(/\s+/).filter(Boolean);
  const found = options.filter((option) => words.every((word) => option.toLowerCase().includes(word)));
  return words.length
    ? found.sort((a, b) => Number(b.toLowerCase().startsWith(words[0])) - Number(a.toLowerCase().startsWith(words[0])))
    : found;
}
