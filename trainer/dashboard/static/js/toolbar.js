// How the charts are drawn: the controls that the charts of several runs and of one run share.

import { h } from "./dom.js";
import { AXES } from "./format.js";
import { show, view } from "./view.js";

const WEIGHTS = [0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999];

export class Toolbar {
  constructor(...others) {
    this.axis = h(
      "select",
      { "aria-label": "x axis", onchange: (event) => show({ x: event.target.value, z: null }) },
      Object.entries(AXES).map(([name, title]) => h("option", { value: name }, title)),
    );
    this.weight = h("output", {});
    this.smoothing = h("input", {
      type: "range",
      min: "0",
      max: String(WEIGHTS.length - 1),
      step: "1",
      "aria-label": "Smoothing",
      title: "Exponential moving average over all points; the line before smoothing stays faint",
      oninput: (event) => show({ sm: WEIGHTS[Number(event.target.value)] }),
    });
    this.logX = toggle("log x", "Logarithmic x axis", () => show({ lx: !view.lx }));
    this.logY = toggle("log y", "Logarithmic y axis", () => show({ ly: !view.ly }));
    this.reset = h("button", { type: "button", onclick: () => show({ z: null }) }, "Whole range");
    this.element = h(
      "div",
      { class: "bar", role: "toolbar", "aria-label": "Charts" },
      ...others,
      h("label", {}, "x", this.axis),
      h("label", {}, "smooth", this.smoothing, this.weight),
      this.logX,
      this.logY,
      this.reset,
    );
  }

  render() {
    this.axis.value = view.x in AXES ? view.x : "step";
    this.smoothing.value = String(nearestWeight(view.sm));
    this.smoothing.setAttribute("aria-valuetext", view.sm ? String(view.sm) : "off");
    this.weight.textContent = view.sm ? String(view.sm) : "off";
    this.logX.setAttribute("aria-pressed", String(view.lx));
    this.logY.setAttribute("aria-pressed", String(view.ly));
    this.reset.hidden = !view.z;
  }
}

export function chartKey(event) {
  const place = nearestWeight(view.sm);
  if (event.key === "[") show({ sm: WEIGHTS[Math.max(0, place - 1)] });
  else if (event.key === "]") show({ sm: WEIGHTS[Math.min(WEIGHTS.length - 1, place + 1)] });
  else if (event.key === "l") show({ ly: !view.ly });
  else if (event.key === "0") show({ z: null });
  else return false;
  return true;
}

function toggle(text, title, onclick) {
  return h("button", { type: "button", title, "aria-pressed": "false", onclick }, text);
}

function nearestWeight(value) {
  let best = 0;
  WEIGHTS.forEach((weight, place) => {
    if (Math.abs(weight - value) < Math.abs(WEIGHTS[best] - value)) best = place;
  });
  return best;
}
