// Each column of a row, given the others: a curve or bars, with the value in the row.

import { button, color, h, number, refill, sharp } from "./dom.js";

const FEW = 12; // columns shown at first
const BARS = 6; // values with a probability of their own

const EXPLAINED = {
  conditional: "The distribution of each column given all the others, exactly as the model has it. "
    + "The line is the value in this row.",
  slice: "A slice of the density: one column varies, the others are held fixed at the values of "
    + "this row, and the curve is divided by its area over the range that is shown. The line is "
    + "the value in this row.",
  bound: "A slice of a bound of the density, from 64 draws for each value: one column varies, the "
    + "others are held fixed at the values of this row, and the curve is divided by its area over "
    + "the range that is shown. The line is the value in this row.",
};

const percent = (share) => {
  const text = (100 * share).toPrecision(2);
  return `${Number(text) < 0.01 ? "under 0.01" : Number(text)} %`;
};

/** The cards of the columns; `root` is filled by `show`, and `unfold` shows all of them, or few. */
export function conditionals(unfold) {
  const list = h("div", { class: "columns-list" });
  const text = h("p", { class: "quiet" });
  const more = h("p", {});
  const root = h("section", { hidden: true }, h("h2", {}, "Each column given the others"), text,
    list, more);

  function show(answer, all) {
    root.hidden = false;
    text.textContent = EXPLAINED[answer.how];
    const shown = all ? answer.columns : answer.columns.slice(0, FEW);
    list.replaceChildren(...shown.map(card));
    refill(more, answer.columns.length > FEW
      ? button(all ? "Show fewer" : `Show ${answer.columns.length} columns`, () => unfold(!all)) : "");
  }
  return { root, show };
}

function card(column) {
  const sure = column.probability !== undefined
    ? `probability ${percent(column.probability)}`
    : column.less !== undefined ? `${percent(column.less)} of values are less likely` : "";
  const canvas = column.curve ? h("canvas", { role: "img", "aria-label":
    `Density of ${column.name} given the other columns` }) : null;
  if (canvas) curve(canvas, column.curve);
  const most = Math.max(...column.masses.map(([, p]) => p), 1e-9);
  const masses = column.masses.filter(([name], i) => i < BARS || name === column.value);
  return h("figure", {},
    h("p", {}, h("b", {}, column.name), ` = ${column.value}`), canvas,
    masses.map(([name, p]) => {
      const bar = h("i");
      bar.style.width = `${(100 * p) / most}%`;
      return h("div", { class: `mass${name === column.value ? " own" : ""}` },
        h("span", { class: "name" }, name), h("span", { class: "bar" }, bar),
        h("span", { class: "numbers" }, number(p, 3)));
    }),
    h("figcaption", {}, sure));
}

function curve(canvas, { x: xs, p, at, bars, ticks }) {
  const [width, height] = [250, 96];
  const context = sharp(canvas, width, height);
  const base = height - 18;
  const [low, high] = [xs[0], xs[xs.length - 1]];
  const px = (x) => 8 + ((x - low) / (high - low || 1)) * (width - 16);
  const top = Math.max(...p, 1e-300);
  const py = (value) => base - (value / top) * (base - 6);
  context.fillStyle = context.strokeStyle = color("blue");
  if (bars) {
    const wide = Math.max(1, Math.min(14, (width - 16) / p.length - 1));
    p.forEach((value, i) => context.fillRect(px(xs[i]) - wide / 2, py(value), wide,
      base - py(value)));
  } else {
    context.beginPath();
    context.moveTo(8, base);
    p.forEach((value, i) => context.lineTo(px(xs[i]), py(value)));
    context.lineTo(width - 8, base);
    context.globalAlpha = 0.3;
    context.fill();
    context.globalAlpha = 1;
    context.stroke();
  }
  context.fillStyle = color("muted");
  context.font = "12px system-ui, sans-serif";
  ticks.forEach(([x, text], i) => {
    context.textAlign = ["left", "center", "right"][i];
    context.fillText(text, px(x), height - 3);
  });
  if (at !== null && at >= low && at <= high) {
    context.fillStyle = color("accent");
    context.fillRect(px(at) - 1, 2, 2, base);
  }
}
