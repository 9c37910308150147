// The rows of all runs, kept current by asking for what changed since the last answer.

import { getJson } from "./api.js";

const POLL_MS = 2000;
const FIRST_MS = 250;

const rows = new Map();
let baseline = {};
let cursor = 0;
let session = "";
let listeners = [];
export const status = { roots: [], unread: 0, readOnly: false, error: "", loaded: false, clockAhead: 0 };

export const common = () => baseline;
export const allRows = () => [...rows.values()];
export const rowOf = (key) => rows.get(key);

export function onChange(listener) {
  listeners.push(listener);
}

export async function poll() {
  try {
    const answer = await getJson(`/api/rows?since=${cursor}&session=${encodeURIComponent(session)}`);
    apply(answer);
    status.error = "";
  } catch (error) {
    if (status.error !== error.message) {
      status.error = error.message;
      listeners.forEach((listener) => listener(new Set()));
    }
  }
}

function apply(answer) {
  const changed = new Set();
  if (answer.reset) {
    for (const key of rows.keys()) changed.add(key);
    rows.clear();
  }
  if (answer.common) baseline = answer.common;
  for (const row of answer.rows) {
    rows.set(row.key, row);
    changed.add(row.key);
  }
  for (const key of answer.removed) {
    rows.delete(key);
    changed.add(key);
  }
  const news = changed.size > 0 || answer.common || !status.loaded || status.error || status.unread !== answer.unread;
  cursor = answer.cursor;
  session = answer.session;
  Object.assign(status, {
    roots: answer.roots,
    unread: answer.unread,
    readOnly: answer.read_only,
    loaded: true,
    clockAhead: answer.now - Date.now() / 1000,
  });
  if (news) {
    status.error = "";
    listeners.forEach((listener) => listener(changed));
  }
}

// A page in the background asks for nothing.
export async function start() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resolve) => setTimeout(resolve, status.unread && !status.error ? FIRST_MS : POLL_MS));
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
