// The map: every example in a plane of the latents.

import { button, choice, field, h, number } from "../dom.js";
import { gallery, ofClass, ofScore, sharp } from "../draw.js";

export const title = "The map";
export const fits = (about) => about.dims > 1;

const STEPS = 9; // of an interpolation

export function mount(root, page) {
  const canvas = h("canvas", {
    class: "map", tabindex: 0, role: "application",
    "aria-label": "Map of the examples. Arrow keys move a cross, Enter decodes the point there.",
  });
  const preview = h("div", { class: "card" }, h("p", { class: "quiet" }, "Point at a dot."));
  const decoded = h("div", { class: "card" });
  const legend = h("p", { class: "legend" });
  const state_ = h("p", { class: "quiet" });
  const axes = choice([["components", "principal components"]], "components",
    (value) => restart({ axes: value === "components" ? null : value, at: null }));
  const tint = choice(page.about.labeled ? ["label", "score"] : ["score"], "label",
    (value) => restart({ color: value === "label" ? null : value }));
  root.append(
    h("p", { class: "lead" }, page.about.moments === "values"
      ? "Each dot is an example, at its latents. Point at a dot to see it; "
      : "Each dot is an example, at the mean of its posterior. Similar ones are neighbors. Point "
        + "at a dot to see it and how sure the encoder is (the ellipse, two standard deviations); ",
    "click anywhere to decode that very point, twice to walk between two points."),
    h("div", { class: "controls" }, field("axes", axes), field("color", tint),
      button("Clear", () => page.set({ at: null }))),
    h("div", { class: "columns wide" }, h("section", {}, canvas, legend, state_),
      h("section", { class: "side" }, h("h3", {}, "Under the pointer"), preview,
        h("h3", {}, "Decoded"), decoded)));

  let points = { x: [], y: [], index: [], color: [] };
  let box = { left: -1, right: 1, low: -1, high: 1 };
  let names = ["", ""];
  let colored = "label";
  let layer = null; // the dots, which change rarely
  let under = null; // the example under the pointer
  let cross = null; // the cross of the keyboard, in pixels
  let loading = 0;
  let timer = null;
  let size = { width: 0, height: 0 };

  const chosen = () => (page.state.at ?? "").split(";").filter(Boolean)
    .map((pair) => pair.split(",").map(Number));
  const px = (x) => 12 + ((x - box.left) / (box.right - box.left)) * (size.width - 24);
  const py = (y) => size.height - 12 - ((y - box.low) / (box.high - box.low)) * (size.height - 24);
  const back = (at) => [
    box.left + ((at[0] - 12) / (size.width - 24)) * (box.right - box.left),
    box.low + ((size.height - 12 - at[1]) / (size.height - 24)) * (box.high - box.low)];

  function restart(changes) {
    page.set(changes);
    load();
  }

  /** Fetch the points that are known, and more of them until all are. */
  function load() {
    clearTimeout(timer);
    const run = ++loading;
    points = { x: [], y: [], index: [], color: [] };
    const more = () => page.ask("map", {
      axes: page.state.axes ?? "components",
      color: page.state.color ?? (page.about.labeled ? "label" : "score"),
      first: points.x.length,
    }, (answer) => {
      if (run !== loading || answer.first !== points.x.length) return;
      for (const key of Object.keys(points)) points[key] = points[key].concat(answer[key]);
      names = answer.axes;
      colored = answer.colored;
      const whole = answer.done === answer.total;
      state_.textContent = answer.error || `${answer.done.toLocaleString("en")} of `
        + `${answer.total.toLocaleString("en")} examples`;
      if (points.x.length) frame();
      redraw();
      if (!whole && !answer.error) timer = setTimeout(more, 700);
    });
    more();
  }

  /** The part of the plane that holds all points but the farthest. */
  function frame() {
    const ends = (values) => {
      const sorted = Float32Array.from(values).sort();
      const at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
      const margin = 0.15 * (at(0.995) - at(0.005)) || 1;
      return [at(0.005) - margin, at(0.995) + margin];
    };
    [box.left, box.right] = ends(points.x);
    [box.low, box.high] = ends(points.y);
  }

  /** Draw the dots into a layer of their own, then all. */
  function redraw() {
    size = { width: canvas.parentElement.clientWidth, height: innerWidth > 700 ? 520 : 360 };
    layer = document.createElement("canvas");
    const context = sharp(layer, size.width, size.height);
    const known = points.color.filter((v) => v !== null).sort((a, b) => a - b);
    const at = (share) => known[Math.floor(share * (known.length - 1))];
    const [low, high] = [at(0.02), at(0.98)];
    const radius = points.x.length > 5000 ? 1.2 : 2.4;
    context.globalAlpha = points.x.length > 5000 ? 0.6 : 0.8;
    points.x.forEach((x, i) => {
      const value = points.color[i];
      const share = Math.max(0, Math.min(1, (value - low) / (high - low || 1)));
      context.fillStyle = colored === "label" ? ofClass(value) : ofScore(share);
      context.beginPath();
      context.arc(px(x), py(points.y[i]), radius, 0, 7);
      context.fill();
    });
    legend.replaceChildren(...(colored === "label"
      ? page.about.labels.slice(0, 24).map((name, i) => [swatch(ofClass(i)), `${name} `]).flat()
      : [swatch(ofScore(0)), `${number(low, 1)} nats (likely) `, swatch(ofScore(1)),
        `${number(high, 1)} nats (unlikely)`]));
    overlay();
  }

  const swatch = (ink) => {
    const element = h("canvas", { class: "swatch", "aria-hidden": "true", width: 12, height: 12 });
    const context = element.getContext("2d");
    context.fillStyle = ink;
    context.fillRect(0, 0, 12, 12);
    return element;
  };

  /** The dots, the axes, and what is pointed at or chosen. */
  function overlay() {
    if (!layer) return;
    const style = getComputedStyle(canvas);
    const context = sharp(canvas, size.width, size.height);
    context.drawImage(layer, 0, 0, size.width, size.height);
    context.fillStyle = style.color;
    context.font = "13px system-ui, sans-serif";
    context.fillText(`${names[0]} \u2192`, size.width - 110, size.height - 6);
    context.fillText(`\u2191 ${names[1]}`, 8, 18);
    context.strokeStyle = style.color;
    context.lineWidth = 1.5;
    if (under?.covariance) ellipse(context, under.place, under.covariance);
    const at = chosen();
    if (at.length === 2) {
      context.setLineDash([5, 4]);
      context.beginPath();
      at.forEach(([x, y]) => context.lineTo(px(x), py(y)));
      context.stroke();
      context.setLineDash([]);
    }
    for (const [x, y] of at) {
      context.beginPath();
      context.arc(px(x), py(y), 6, 0, 7);
      context.stroke();
    }
    if (cross && document.activeElement === canvas) {
      context.fillRect(cross[0] - 10, cross[1] - 0.5, 21, 1);
      context.fillRect(cross[0] - 0.5, cross[1] - 10, 1, 21);
    }
  }

  /** Two standard deviations around a place. */
  function ellipse(context, place, [[a, b], [, d]]) {
    context.beginPath();
    for (let k = 0; k <= 48; k++) {
      const t = (k / 48) * 2 * Math.PI;
      const root_ = Math.sqrt(a || 1e-12); // Cholesky factor of the covariance
      const x = 2 * root_ * Math.cos(t);
      const y = 2 * ((b / root_) * Math.cos(t) + Math.sqrt(Math.max(d - (b * b) / (a || 1e-12), 0)) * Math.sin(t));
      context.lineTo(px(place[0] + x), py(place[1] + y));
    }
    context.stroke();
  }

  /** The nearest example within 14 pixels. */
  function nearest([left, top]) {
    let best = -1;
    let least = 14 ** 2;
    points.x.forEach((x, i) => {
      const distance = (px(x) - left) ** 2 + (py(points.y[i]) - top) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  function point(at) {
    const i = nearest(at);
    if (i < 0 || under?.index === points.index[i]) return;
    const axes_ = page.state.axes ?? "components";
    page.ask("hover", { index: points.index[i], axes: axes_ }, (answer) => {
      under = answer;
      preview.replaceChildren(gallery(answer.input,
        [[`example ${answer.index}`, answer.id, answer.label && `label ${answer.label}`]
          .filter(Boolean).join(", ")], 96),
      h("p", {}, h("a", { href: `#one?index=${answer.index}` }, "Open it as one input")));
      overlay();
    });
  }

  function click(at) {
    const place = back(at).map((v) => Number(v.toFixed(4)));
    const before = chosen();
    const next = before.length === 1 ? [before[0], place] : [place];
    page.set({ at: next.map((pair) => pair.join(",")).join(";") });
  }

  function decode() {
    const at = chosen();
    if (!at.length) {
      decoded.replaceChildren(h("p", { class: "quiet" }, "Click the map."));
      page.python("");
      return;
    }
    const line = at.length === 1 ? at : Array.from({ length: STEPS }, (_, k) =>
      [0, 1].map((j) => Number((at[0][j] + (k / (STEPS - 1)) * (at[1][j] - at[0][j])).toFixed(4))));
    page.ask("at", {
      places: line.map((pair) => pair.join(",")).join(";"),
      axes: page.state.axes ?? "components", index: page.state.index ?? 0,
    }, (answer) => {
      const captions = at.length === 1 ? [at[0].map((v) => number(v)).join(", ")] : [];
      decoded.replaceChildren(gallery(answer.pictures, captions, at.length === 1 ? 128 : 64));
      page.python(answer.python);
    });
  }

  const place = (event) => [event.offsetX, event.offsetY];
  canvas.addEventListener("mousemove", (event) => point(place(event)));
  canvas.addEventListener("click", (event) => {
    cross = null;
    point(place(event));
    click(place(event));
  });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
    cross ??= [size.width / 2, size.height / 2];
    if (by[event.key]) {
      cross = [cross[0] + by[event.key][0], cross[1] + by[event.key][1]];
      point(cross);
      overlay();
    } else if (event.key === "Enter" || event.key === " ") click(cross);
    else return;
    event.preventDefault();
  });
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, overlay);

  page.ask("order", {}, (answer) => {
    const top = answer.latents.slice(0, 6);
    const pairs = top.flatMap((a, i) => top.slice(i + 1).map((b) =>
      [`${a.place},${b.place}`, `${a.name}, ${b.name}`]));
    axes.append(...pairs.map(([value, text]) => h("option", { value }, text)));
    const wanted = page.state.axes;
    if (wanted && !pairs.some(([value]) => value === wanted)) {
      axes.append(h("option", { value: wanted }, wanted));
    }
    axes.value = wanted ?? "components";
    load();
  });
  return {
    update(state) {
      axes.value = state.axes ?? "components";
      tint.value = state.color ?? tint.options[0].value;
      if (layer) redraw();
      decode();
    },
    leave() {
      clearTimeout(timer);
      loading++;
    },
  };
}
