// Chooses the columns of the table.

import { allColumns, defaultColumns } from "./columns.js";
import { matches } from "./combo.js";
import { h } from "./dom.js";
import { show, view } from "./view.js";

const MOST = 300;

export function chooseColumns(rows) {
  let chosen = [...(view.cols ?? defaultColumns(rows))];
  const names = allColumns(rows);
  const list = h("div", { class: "columns" });
  const search = h("input", {
    type: "search",
    placeholder: "Find a column",
    "aria-label": "Find a column",
    oninput: () => fill(),
  });
  const title = (name) => name.replace(/^(metric|config):/, "");
  const fill = () => {
    const found = matches(names, search.value);
    list.replaceChildren(
      ...found.slice(0, MOST).map((name) =>
        h(
          "label",
          {},
          h("input", {
            type: "checkbox",
            checked: chosen.includes(name),
            onchange: (event) => {
              chosen = event.target.checked ? [...chosen, name] : chosen.filter((one) => one !== name);
              show({ cols: chosen });
            },
          }),
          h("span", {}, title(name), name.startsWith("config:") ? h("small", {}, " setting") : null),
        ),
      ),
      found.length > MOST ? h("p", { class: "note" }, `and ${found.length - MOST} more: type to narrow down`) : null,
    );
  };
  const dialog = h(
    "dialog",
    { "aria-label": "Columns", onclose: () => dialog.remove() },
    h("h2", {}, "Columns"),
    search,
    list,
    h(
      "div",
      { class: "actions" },
      h(
        "button",
        {
          type: "button",
          onclick: () => {
            show({ cols: null });
            dialog.close();
          },
        },
        "Only what differs",
      ),
      h("button", { type: "button", onclick: () => dialog.close() }, "Close"),
    ),
  );
  fill();
  document.body.append(dialog);
  dialog.showModal();
}
