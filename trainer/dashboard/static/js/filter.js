// The filter above the table: `state=running lr>0.001 val/acc>=0.9 resnet`. All terms must hold.

import { plainValue } from "./columns.js";

const TERM = /([^\s=<>!~"]+)\s?(!=|>=|<=|=|>|<|~)\s?("[^"]*"?|[^\s]+)|"([^"]*)"?|(\S+)/g;

export function parse(text) {
  const terms = [];
  for (const match of text.matchAll(TERM)) {
    if (match[1] !== undefined) terms.push({ key: match[1], operator: match[2], value: unquoted(match[3]) });
    else {
      const word = (match[4] ?? match[5]).toLowerCase();
      // What is still being typed: `val/acc>` without its value hides nothing.
      if (word && !/[=<>!~]$/.test(word)) terms.push({ word });
    }
  }
  return terms;
}

export function filtered(rows, text) {
  const terms = parse(text);
  return terms.length ? rows.filter((row) => terms.every((term) => holds(row, term))) : rows;
}

function holds(row, term) {
  if (term.word !== undefined) {
    return (
      [row.name, row.id, row.state, row.reason, row.slurm_job_id].some((value) =>
        String(value ?? "")
          .toLowerCase()
          .includes(term.word),
      ) ||
      Object.values(row.config ?? {}).some(
        (value) => typeof value === "string" && value.toLowerCase().includes(term.word),
      )
    );
  }
  const value = plainValue(row, term.key);
  if (term.operator === "~")
    return String(value ?? "")
      .toLowerCase()
      .includes(term.value.toLowerCase());
  if (term.operator === "!=") return !equal(value, term.value);
  if (value === undefined || value === null)
    return term.operator === "=" && ["null", ""].includes(term.value) && value === null;
  if (term.operator === "=") return equal(value, term.value);
  const [left, right] = [Number(value), Number(term.value)];
  if (Number.isNaN(left) || Number.isNaN(right)) return false;
  return { ">": left > right, "<": left < right, ">=": left >= right, "<=": left <= right }[term.operator];
}

// One of several values with commas between them; * is any text.
function equal(value, text) {
  if (value === undefined) return false;
  if (typeof value === "number" && text !== "" && Number(text) === value) return true;
  const own = String(value).toLowerCase();
  return (
    own === text.toLowerCase() ||
    text
      .toLowerCase()
      .split(",")
      .some((one) => (one.includes("*") ? pattern(one).test(own) : own === one || Number(one || NaN) === value))
  );
}

function pattern(text) {
  const escaped = text.split("*").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return new RegExp(`^${escaped.join(".*")}$`, "s");
}

function unquoted(text) {
  return text.startsWith('"') ? text.slice(1).replace(/"$/, "") : text;
}
