// A color of its own for each run, which stays: it is remembered in this browser, and does not depend on what else is
// shown.

const NAMES = 12; // --line-0 ... --line-11 in base.css
const DASHES = [[], [7, 4], [2, 3]];
const STORED = "trainer-colors";
const MOST = 2000;

let places = load();

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    return new Map(Object.entries(stored).filter(([, place]) => Number.isInteger(place)));
  } catch {
    return new Map();
  }
}

// Gives colors to the lines that have none: the least used among those shown now.
export function assign(keys) {
  const used = new Array(NAMES * DASHES.length).fill(0);
  for (const key of keys) if (places.has(key)) used[places.get(key) % used.length] += 1;
  let changed = false;
  for (const key of keys) {
    if (places.has(key)) continue;
    const place = used.indexOf(Math.min(...used));
    used[place] += 1;
    places.set(key, place);
    changed = true;
  }
  if (!changed) return;
  if (places.size > MOST) places = new Map([...places].slice(-MOST));
  try {
    localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(places)));
  } catch {
    // Without storage the colors last until the page is closed.
  }
}

export function variable(key) {
  return `var(--line-${(places.get(key) ?? 0) % NAMES})`;
}

export function stroke(key) {
  const place = places.get(key) ?? 0;
  const color = getComputedStyle(document.documentElement)
    .getPropertyValue(`--line-${place % NAMES}`)
    .trim();
  return { color, dash: DASHES[Math.floor(place / NAMES) % DASHES.length] };
}
