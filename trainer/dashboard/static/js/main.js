// Starts the page: header, routes, theme, keys.

import { announce, h, isTyping } from "./dom.js";
import { help } from "./help.js";
import { ParametersPage } from "./parameters_page.js";
import { RunPage } from "./run_page.js";
import { RunsPage } from "./runs_page.js";
import { allRows, onChange, start, status } from "./store.js";
import { address, onView, readAddress, show, view } from "./view.js";

const main = document.getElementById("main");
const header = document.getElementById("header");
let page = null;
let pageOf = "";

const STORED = "trainer-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try {
  theme = localStorage.getItem(STORED) ?? "auto";
} catch {
  /* without storage it follows the system */
}

function applyTheme() {
  const isDark = theme === "dark" || (theme === "auto" && dark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  page?.restyle?.();
}

function nextTheme() {
  theme = { auto: "light", light: "dark", dark: "auto" }[theme] ?? "auto";
  try {
    localStorage.setItem(STORED, theme);
  } catch {
    /* it lasts until the page is closed */
  }
  applyTheme();
  renderHeader();
  announce(`Colors: ${theme}`);
}

function renderHeader() {
  const active = allRows().filter((row) =>
    ["running", "starting", "stopping", "queued", "requeued"].includes(row.state),
  ).length;
  const link = (name, title) =>
    h(
      "a",
      {
        href: address({ ...view, page: name }),
        "aria-current": view.page === name ? "page" : null,
        onclick: (event) => {
          event.preventDefault();
          show({ page: name, m: null });
        },
      },
      title,
    );
  header.replaceChildren(
    h(
      "a",
      {
        class: "brand",
        href: "#/runs",
        onclick: (event) => {
          event.preventDefault();
          show({ page: "runs" });
        },
      },
      "trainer",
    ),
    h("nav", { "aria-label": "Pages" }, link("runs", "Runs"), link("parameters", "Parameters")),
    h("span", { class: "where", title: status.roots.join("\n") }, status.roots.join("  ·  ")),
    h("span", { class: "push" }),
    h(
      "span",
      { class: "note" },
      status.unread ? `reading ${status.unread} of ${allRows().length} runs …` : active ? `${active} active` : "",
    ),
    h(
      "button",
      { type: "button", class: "quiet", title: "Colors: like the system, light, dark", onclick: nextTheme },
      `◐ ${theme}`,
    ),
    h("button", { type: "button", class: "quiet", title: "Keys (?)", onclick: help }, "?"),
  );
}

function render(before) {
  const wanted = view.page === "run" ? `run ${view.run}` : view.page;
  const isNew = wanted !== pageOf;
  if (isNew) {
    page?.close();
    page =
      view.page === "run" ? new RunPage(view.run) : view.page === "parameters" ? new ParametersPage() : new RunsPage();
    pageOf = wanted;
    main.replaceChildren(page.element);
    if (before) main.focus({ preventScroll: true });
  }
  page.render(isNew ? undefined : before);
  document.title = `${page.title()} · trainer`;
}

let banner = null;

function renderBanner() {
  if (status.error && !banner) {
    banner = h("div", { class: "banner", role: "alert" });
    header.after(banner);
  }
  if (!status.error && banner) {
    banner.remove();
    banner = null;
  }
  if (banner) banner.textContent = `${status.error}. What is below is as it was.`;
}

onView((before) => {
  renderHeader();
  render(before);
});
onChange((changed) => {
  renderBanner();
  renderHeader();
  if (status.loaded) {
    if (!page) render();
    else page.changed(changed);
  }
});
dark.addEventListener("change", applyTheme);
document.addEventListener("keydown", (event) => {
  if (
    event.defaultPrevented ||
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    isTyping(event) ||
    document.querySelector("dialog[open]")
  )
    return;
  if (event.key === "?") help();
  else if (event.key === "Escape" && view.page === "run") show({ page: "runs" });
  else if (!page?.onKey?.(event)) return;
  event.preventDefault();
});

Object.assign(view, readAddress());
applyTheme();
renderHeader();
start();
