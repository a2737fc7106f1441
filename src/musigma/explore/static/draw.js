// Drawing: examples as pixels or rows, Gaussians as bells, curves.

import { color, h, sharp } from "./dom.js";
import { scatter } from "./plane.js";

/** Draw image i of a set of the server into a canvas, one pixel to one. */
function paint(canvas, set, i) {
  const bytes = Uint8Array.from(atob(set.images[i]), (letter) => letter.charCodeAt(0));
  const out = new ImageData(set.width, set.height);
  for (let pixel = 0; pixel < set.width * set.height; pixel++) {
    for (let k = 0; k < 3; k++) {
      out.data[4 * pixel + k] = bytes[set.channels * pixel + (set.channels === 3 ? k : 0)];
    }
    out.data[4 * pixel + 3] = 255;
  }
  canvas.width = set.width;
  canvas.height = set.height;
  canvas.getContext("2d").putImageData(out, 0, 0);
}

/** One image of a set, `size` pixels high on the page. */
export function image(set, i, size, label) {
  const canvas = h("canvas", { class: "pixels", role: "img", "aria-label": label });
  paint(canvas, set, i);
  canvas.style.height = `${size}px`;
  return canvas;
}

/** A set of examples: figures in a line, or a table of rows. */
export function gallery(set, captions, size = 64) {
  if (set.points) return scatter(set, captions);
  if (!set.images) return table(set, captions);
  return h("div", { class: "gallery" }, set.images.map((_, i) => {
    const caption = captions[i] ?? "";
    return h("figure", {}, image(set, i, size, caption || `image ${i}`),
      caption ? h("figcaption", {}, caption) : null);
  }));
}

/** Rows of a table; with few of them, a line for each column. */
function table(set, captions) {
  const more = set.columns > set.names.length
    ? h("p", { class: "quiet" }, `and ${set.columns - set.names.length} more columns`) : null;
  const upright = set.rows.length <= 8;
  const heads = upright ? captions : set.names;
  const lines = upright
    ? set.names.map((name, j) => [name, ...set.rows.map((row) => row[j])])
    : set.rows.map((row, i) => [captions[i] ?? "", ...row]);
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("td", {}, ""),
      heads.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, lines.map(([name, ...cells]) =>
      h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell)))))), more);
}

/** The end of the axis of a latent, in standard deviations of the prior. */
export const reach = (value) => Math.max(4, Math.min(99, Math.ceil(Math.abs(value) + 1)));

/**
 * Gaussians on one axis: the first is filled gray, the others in color. Widths are to scale;
 * heights grow more slowly than densities, so that narrow ones can be seen beside wide ones.
 */
export function bells(canvas, laws, { width = 260, height = 46, dots = [],
  mark = null, range = 4 } = {}) {
  const context = sharp(canvas, width, height);
  const base = height - 6;
  // as the thumb of a slider of this width, which is 16 wide
  const across = (value) => 8 + ((value + range) / (2 * range)) * (width - 16);
  const inks = ["muted", "accent", "blue"].map(color);
  laws.forEach(([mean, std], k) => {
    const tall = Math.min(0.95, 0.42 * Math.max(std, 1e-4) ** -0.3) * base;
    context.beginPath();
    context.moveTo(across(-range), base);
    const steps = new Set();
    for (let s = 0; s <= 160; s++) steps.add(-range + (2 * range * s) / 160);
    for (let s = -24; s <= 24; s++) steps.add(mean + (s / 6) * std);
    for (const x of [...steps].filter((v) => Math.abs(v) <= range).sort((a, b) => a - b)) {
      context.lineTo(across(x), base - tall * Math.exp(-(((x - mean) / std) ** 2) / 2));
    }
    context.lineTo(across(range), base);
    context.globalAlpha = k === 0 ? 0.18 : 0.3;
    context.fillStyle = inks[k];
    context.fill();
    context.globalAlpha = k === 0 ? 0.5 : 1;
    context.strokeStyle = inks[k];
    context.lineWidth = k === 0 ? 1 : 1.6;
    context.stroke();
    context.globalAlpha = 1;
  });
  context.fillStyle = color("ink");
  context.globalAlpha = 0.55;
  for (const dot of dots) {
    context.beginPath();
    context.arc(across(Math.max(-range, Math.min(range, dot))), base + 2, 2, 0, 7);
    context.fill();
  }
  context.globalAlpha = 1;
  if (mark !== null && Math.abs(mark) <= range) {
    context.fillRect(across(mark) - 1, 2, 2, base - 2);
  }
}

/** Round values of an axis from low to high. */
function ticks(low, high, count = 4) {
  const raw = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) out.push(v);
  return out;
}

/**
 * Curves with axes: lines of {points: [[x, y]], ink, name, dots}, and marks of {x, ink, name}.
 */
export function curves(canvas, lines, { width, height, xName = "", yName = "", limits = null,
  marks = [] }) {
  const context = sharp(canvas, width, height);
  const all = lines.flatMap((line) => line.points).filter(([, y]) => Number.isFinite(y));
  if (!all.length) return;
  const xs = all.map(([x]) => x);
  const ys = all.map(([, y]) => y).sort((a, b) => a - b);
  const [low, high] = limits ?? [ys[0], ys[Math.floor(0.98 * (ys.length - 1))]];
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const names = [{ name: yName, ink: "muted" }, ...lines].filter((line) => line.name);
  const box = { x: 56, y: 10, w: width - 68 };
  context.font = "13px system-ui, sans-serif";
  context.textAlign = "left";
  let at = box.x;
  for (const { name, ink } of names) { // in lines above the box
    const wide = context.measureText(name).width;
    if (at > box.x && at + wide > width) [at, box.y] = [box.x, box.y + 18];
    context.fillStyle = color(ink);
    context.fillText(name, at, box.y + 4);
    at += wide + 18;
  }
  box.y += names.length ? 16 : 2;
  box.h = height - box.y - 38;
  const px = (x) => box.x + ((x - left) / (right - left || 1)) * box.w;
  const py = (y) => box.y + box.h - ((y - low) / (high - low || 1)) * box.h;
  context.font = "12px system-ui, sans-serif";
  context.strokeStyle = color("line");
  context.fillStyle = color("muted");
  context.textAlign = "right";
  for (const y of ticks(low, high)) {
    context.beginPath();
    context.moveTo(box.x, py(y));
    context.lineTo(box.x + box.w, py(y));
    context.stroke();
    context.fillText(String(Number(y.toPrecision(6))), box.x - 6, py(y) + 4);
  }
  context.textAlign = "center";
  for (const x of ticks(left, right, 5)) {
    context.fillText(Number(x.toPrecision(6)).toLocaleString("en"), px(x), box.y + box.h + 16);
  }
  context.fillText(xName, box.x + box.w / 2, height - 6);
  context.textAlign = "left";
  context.save();
  context.beginPath();
  context.rect(box.x, box.y, box.w, box.h);
  context.clip();
  for (const line of lines) {
    context.strokeStyle = context.fillStyle = color(line.ink);
    context.lineWidth = 1.8;
    context.beginPath();
    for (const [x, y] of line.points) {
      if (line.dots) {
        context.moveTo(px(x) + 3, py(y));
        context.arc(px(x), py(y), 3, 0, 7);
      } else context.lineTo(px(x), py(y));
    }
    if (line.dots) context.fill(); else context.stroke();
  }
  context.restore();
  for (const mark of marks) {
    context.strokeStyle = color(mark.ink);
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(px(mark.x), box.y);
    context.lineTo(px(mark.x), box.y + box.h);
    context.stroke();
    context.setLineDash([]);
  }
}

export const twelve = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2",
  "#97bbf5", "#9c6b4e", "#9498a0", "#1f9e89", "#b4532a"];

/** The color of a class, or of a score from 0 (low) to 1 (high). */
export const ofClass = (i) => twelve[((i % 12) + 12) % 12];
export const ofScore = (t) =>
  `hsl(${Math.round(230 - 200 * t)} ${60 + Math.round(20 * t)}% ${42 + Math.round(14 * t)}%)`;

/** A square of a color. */
export function swatch(shade) {
  const element = h("canvas", { class: "swatch", "aria-hidden": "true", width: 12, height: 12 });
  const context = element.getContext("2d");
  context.fillStyle = shade;
  context.fillRect(0, 0, 12, 12);
  return element;
}

/** The three parts of a color of the style sheet, or of any other, from 0 to 255. */
export function parts(ink) {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = ink;
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data.slice(0, 3);
}

/** Counts between edges; gray ones, scaled to the same area, are behind; `mark` is a line. */
export function histogram(canvas, { edges, data, known }, mark, { width, height, xName }) {
  const context = sharp(canvas, width, height);
  const [left, right] = [edges[0], edges[edges.length - 1]];
  const base = height - 36;
  const px = (x) => 8 + ((x - left) / (right - left)) * (width - 16);
  const sum = (values) => values.reduce((a, b) => a + b, 0) || 1;
  const sets = [[known, "muted", 0.3], [data, "blue", 0.75]].filter(([counts]) => counts);
  const most = Math.max(...sets.map(([counts]) => Math.max(...counts) / sum(counts)));
  for (const [counts, ink, alpha] of sets) {
    context.fillStyle = color(ink);
    context.globalAlpha = alpha;
    counts.forEach((count, i) => {
      const tall = count && Math.max(2, (count / sum(counts) / most) * (base - 8));
      context.fillRect(px(edges[i]), base - tall, px(edges[i + 1]) - px(edges[i]) - 1, tall);
    });
  }
  context.globalAlpha = 1;
  context.fillStyle = color("muted");
  context.font = "12px system-ui, sans-serif";
  context.textAlign = "center";
  for (const x of ticks(left, right, 5)) {
    context.fillText(Number(x.toPrecision(6)).toLocaleString("en"), px(x), base + 15);
  }
  context.fillText(xName, width / 2, height - 4);
  if (mark !== null && mark >= left && mark <= right) {
    context.fillStyle = color("accent");
    context.fillRect(px(mark) - 1, 2, 2, base - 2);
  }
}
