// The configuration of a run: searchable, beside that of another run, or only what differs from it.

import { configOf, sorted } from "./columns.js";
import { h } from "./dom.js";
import { date, setting } from "./format.js";
import { allRows, rowOf } from "./store.js";
import { show, view } from "./view.js";

const MOST_CHOICES = 500;

export function configTab(row, details) {
  const other = view.ref ? rowOf(view.ref) : null;
  const body = h("tbody", {});
  const keys = [...new Set([...Object.keys(details.config), ...Object.keys(other?.config ?? {})])];
  const search = h("input", {
    type: "search",
    placeholder: "Find a setting",
    "aria-label": "Find a setting",
    oninput: () => fill(),
  });
  const only = h("input", { type: "checkbox", checked: Boolean(other), onchange: () => fill() });
  const choice = h(
    "select",
    { "aria-label": "Compare with", onchange: (event) => show({ ref: event.target.value }) },
    h("option", { value: "" }, "no other run"),
    sorted(allRows(), "-created")
      .filter((one) => one.key !== row.key)
      .slice(0, MOST_CHOICES)
      .map((one) => h("option", { value: one.key }, `${one.name} ${one.id}`)),
  );
  choice.value = other ? view.ref : "";
  const fill = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = keys
      .map((key) => [key, details.config[key], other ? configOf(other, key) : undefined])
      .map(([key, own, theirs]) => ({ key, own, theirs, differs: other !== null && setting(own) !== setting(theirs) }))
      .filter(
        (one) =>
          words.every((word) => `${one.key} ${setting(one.own)}`.toLowerCase().includes(word)) &&
          (!other || !only.checked || one.differs),
      );
    body.replaceChildren(
      ...rows.map((one) =>
        h(
          "tr",
          { class: one.differs && !only.checked ? "differs" : null },
          h("th", { scope: "row", class: "mono" }, one.key),
          h("td", { class: "mono" }, setting(one.own)),
          other ? h("td", { class: "mono" }, setting(one.theirs)) : null,
        ),
      ),
    );
    if (!rows.length)
      body.replaceChildren(
        h(
          "tr",
          {},
          h(
            "td",
            { class: "note", colspan: 3 },
            other && only.checked && !words.length ? "Nothing differs." : "Nothing matches.",
          ),
        ),
      );
  };
  fill();
  const manifest = details.manifest;
  const machine = manifest.machine ?? {};
  const commit = details.commit.commit
    ? `${details.commit.commit}${details.commit.dirty ? " with uncommitted changes" : ""}`
    : "";
  const facts = [
    ["Overrides", details.overrides],
    ["Commit", commit],
    ["Launched by", [manifest.user, manifest.host].filter(Boolean).join(" on ")],
    ["Created", date(manifest.created)],
    ["Python", manifest.python],
    ["Platform", manifest.platform],
    ["Processor", machine.cpu ? `${machine.cpu}, ${machine.cores} cores` : ""],
    ["GPUs", (machine.gpus ?? []).join(", ")],
    [
      "Packages",
      Object.entries(manifest.packages ?? {})
        .filter(([, version]) => version)
        .map(([name, version]) => `${name} ${version}`)
        .join(", "),
    ],
  ].filter(([, text]) => text);
  return [
    h(
      "section",
      { class: "sheet" },
      h("h2", {}, "Launched with"),
      h(
        "table",
        { class: "plain" },
        h(
          "tbody",
          {},
          facts.map(([name, text]) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, name),
              h("td", { class: name === "Overrides" ? "mono" : null }, String(text)),
            ),
          ),
        ),
      ),
    ),
    h(
      "section",
      { class: "sheet" },
      h("h2", {}, "Settings"),
      h(
        "div",
        { class: "bar" },
        search,
        h("label", {}, "compare with", choice),
        other ? h("label", {}, only, "only what differs") : null,
      ),
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Setting"),
            h("th", { scope: "col" }, row.name),
            other ? h("th", { scope: "col" }, `${other.name} ${other.id}`) : null,
          ),
        ),
        body,
      ),
    ),
  ];
}
