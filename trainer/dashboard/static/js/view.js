// What is shown, kept in the URL: a reload, a bookmark and the back button return to it.

const DEFAULTS = {
  q: "",
  sort: "-created",
  sel: null,
  m: null,
  x: "step",
  sm: 0,
  lx: false,
  ly: false,
  group: "",
  band: "deviation",
  z: null,
  cols: null,
  pane: "runs",
  ref: "",
  log: "",
  sweep: "",
};
const LISTS = ["sel", "m", "cols"];

export const view = { page: "runs", run: "", tab: "charts", ...DEFAULTS };
const WRITE_MS = 200;
let listeners = [];
let later = null;

export function onView(listener) {
  listeners.push(listener);
}

// Changes the view. A change of the page is a step of the back button, all else replaces the URL.
export function show(patch) {
  const opens = ("page" in patch && patch.page !== view.page) || ("run" in patch && patch.run !== view.run);
  const before = { ...view };
  Object.assign(view, patch);
  if (opens) {
    clearTimeout(later);
    later = null;
    history.pushState(null, "", address(view));
  } else later ??= setTimeout(write, WRITE_MS);
  listeners.forEach((listener) => listener(before));
}

// Browsers refuse more than some hundred changes of the URL in half a minute: a slider makes as many in a second.
function write() {
  later = null;
  if (address(view) !== location.hash) history.replaceState(null, "", address(view));
}

addEventListener("pagehide", () => later && write());

export function address(state) {
  const parameters = new URLSearchParams();
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const value = state[name];
    if (value === usual || value === null || value === undefined) continue;
    if (LISTS.includes(name))
      value.length ? value.forEach((one) => parameters.append(name, one)) : parameters.append(name, "");
    else if (name === "z") parameters.set(name, value.join("~"));
    else parameters.set(name, value === true ? "1" : String(value));
  }
  const path = state.page === "run" ? `#/run/${state.run}/${state.tab}` : `#/${state.page}`;
  const query = parameters.toString().replaceAll("%2F", "/").replaceAll("%3A", ":");
  return query ? `${path}?${query}` : path;
}

export function readAddress() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, run = "", tab = "charts"] = path.split("/");
  const parameters = new URLSearchParams(query);
  const state = { page: ["run", "parameters"].includes(page) ? page : "runs", run, tab, ...DEFAULTS };
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    if (!parameters.has(name)) continue;
    const value = parameters.get(name);
    if (LISTS.includes(name)) state[name] = parameters.getAll(name).filter((one) => one !== "");
    else if (name === "z") state.z = edges(value);
    else if (typeof usual === "boolean") state[name] = value === "1";
    else if (typeof usual === "number") state[name] = Number(value) || 0;
    else state[name] = value;
  }
  return state;
}

function edges(text) {
  const [start, end] = text.split("~").map(Number);
  return Number.isFinite(start) && Number.isFinite(end) && end > start ? [start, end] : null;
}

window.addEventListener("popstate", () => {
  const before = { ...view };
  Object.assign(view, readAddress());
  listeners.forEach((listener) => listener(before));
});
