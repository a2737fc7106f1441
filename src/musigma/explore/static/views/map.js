// The map: every example in a plane of the latents.

import { Window, paint, palette } from "../cloud.js";
import { button, choice, color, field, h, number, sharp } from "../dom.js";
import { gallery, ofClass, ofScore, swatch, twelve } from "../draw.js";

export const title = "The map";
export const fits = (about) => about.dims > 1;

const STEPS = 9; // of an interpolation
const SHADES = 32; // of a scale
const UMAP = "umap";

export function mount(root, page) {
  const canvas = h("canvas", {
    class: "map", tabindex: 0, role: "application",
    "aria-label": "Map of the examples. Arrow keys move a cross, Enter decodes the point there, "
      + "plus and minus zoom, 0 shows all.",
  });
  const preview = h("div", { class: "card" }, h("p", { class: "quiet" }, "Point at a dot."));
  const decoded = h("div", { class: "card" });
  const legend = h("p", { class: "legend" });
  const status = h("p", { class: "quiet", role: "status" });
  const { about } = page;
  const axes = choice([["components", "principal components"],
    ...(about.umap ? [[UMAP, "UMAP"]] : [])], "components",
  (value) => {
    clearTimeout(saving); // the window is of the other axes
    saving = null;
    page.set({ axes: value === "components" ? null : value, at: null, box: null });
  });
  const own = about.labeled ? "label" : "score";
  const tint = choice([...about.colors.filter((name) => name === "label"), "score",
    ...about.colors.filter((name) => name !== "label")], own,
  (value) => page.set({ color: value === own ? null : value }));
  const middle = () => [view.size.width / 2, view.size.height / 2];
  root.append(
    h("p", { class: "lead" }, about.moments === "values"
      ? "Each dot is an example, at its latents. Point at a dot to see it; "
      : "Each dot is an example, at the mean of its posterior. Similar ones are neighbors. Point "
        + "at a dot to see it and how sure the encoder is (the ellipse, two standard deviations); ",
    "click anywhere to decode that very point, twice to walk between two points. Drag to move, "
      + "scroll to zoom."),
    h("div", { class: "controls" }, field("axes", axes), field("color", tint),
      button("Clear", () => page.set({ at: null })),
      button("+", () => zoom(1.5, cross ?? middle()), { "aria-label": "Zoom in" }),
      button("\u2212", () => zoom(1 / 1.5, cross ?? middle()), { "aria-label": "Zoom out" }),
      button("Show all", () => all())),
    h("div", { class: "columns wide" }, h("section", {}, canvas, legend, status),
      h("section", { class: "side" }, h("h2", {}, "Under the pointer"), preview,
        h("h2", {}, "Decoded"), decoded)));

  const view = new Window();
  const layer = document.createElement("canvas"); // the dots
  let points = empty();
  let names = ["", ""];
  let colors = [];
  let under = null; // the example under the pointer
  let cross = null; // the cross of the keyboard, in pixels
  let ready = false; // whether the axes are known
  let loaded = null; // the axes and the color of the points
  let timer = null;
  let saving = null;
  let frame = null;
  let asked = null; // the points that are decoded

  const chosen = () => (page.state.at ?? "").split(";").filter(Boolean)
    .map((pair) => pair.split(",").map(Number));
  const onAxes = () => page.state.axes ?? "components";

  /** Fetch the points that are known, and more of them until all are. */
  function load() {
    const run = { axes: onAxes(), color: page.state.color ?? own };
    if (loaded?.axes === run.axes && loaded.color === run.color) return;
    loaded = run;
    clearTimeout(timer);
    points = empty();
    under = null; // it is at its place on the other axes
    const more = () => page.ask("map", { ...run, first: points.xs.length }, (answer) => {
      if (run !== loaded || answer.first !== points.xs.length) return;
      points.xs.push(...answer.x);
      points.ys.push(...answer.y);
      points.index.push(...answer.index);
      points.values.push(...answer.color);
      names = answer.axes;
      const whole = answer.done === answer.total;
      status.textContent = answer.error || answer.note || `${answer.done.toLocaleString("en")} of `
        + `${answer.total.toLocaleString("en")} examples`;
      ink(answer);
      place(page.state);
      draw();
      if (!whole && !answer.error) timer = setTimeout(more, 700);
    });
    more();
  }

  /** Choose the color of each point, and say what colors mean. */
  function ink({ colored, names: classes }) {
    const { values } = points;
    if (classes.length) {
      colors = palette([...twelve, color("line")]);
      points.inks = values.map((v) => (v === null || v < 0 ? twelve.length : v % twelve.length));
      legend.replaceChildren(...classes.slice(0, 24)
        .flatMap((name, i) => [swatch(ofClass(i)), `${name} `]));
      return;
    }
    const known = values.filter((v) => v !== null).sort((a, b) => a - b);
    const at = (share) => known[Math.floor(share * (known.length - 1))];
    const [low, high] = [at(0.02), at(0.98)];
    const shade = (v) => Math.round((SHADES - 1)
      * Math.max(0, Math.min(1, (v - low) / (high - low || 1))));
    colors = palette([...Array.from({ length: SHADES }, (_, i) => ofScore(i / (SHADES - 1))),
      color("line")]);
    points.inks = values.map((v) => (v === null ? SHADES : shade(v)));
    const [less, more] = colored === "score" ? [" nats (likely) ", " nats (unlikely)"] : [" ", ""];
    legend.replaceChildren(swatch(ofScore(0)), `${number(low, 1)}${less}`, swatch(ofScore(1)),
      `${number(high, 1)}${more}`);
  }

  /** Show the part of the plane that the state names, by default all. */
  function place(state) {
    view.size = { width: canvas.parentElement.clientWidth, height: innerWidth > 700 ? 520 : 360 };
    if (saving !== null) return; // it is on its way
    const box = (state.box ?? "").split(",").map(Number);
    if (box.length === 4 && box.every(Number.isFinite) && box[0] < box[1] && box[2] < box[3]) {
      view.box = box;
    } else if (points.xs.length) view.fit(points.xs, points.ys);
  }

  /** Draw once before the next frame. */
  function draw() {
    frame ??= requestAnimationFrame(() => {
      frame = null;
      paint(layer, view, points, colors);
      overlay();
    });
  }

  /** The window has moved: draw it, and keep it in the address when it rests. */
  function moved() {
    draw();
    clearTimeout(saving);
    saving = setTimeout(() => {
      saving = null;
      page.set({ box: view.box.map((v) => Number(v.toPrecision(6))).join(",") });
    }, 250);
  }

  function all() {
    clearTimeout(saving);
    saving = null;
    page.set({ box: null });
  }

  function zoom(factor, at) {
    view.zoom(factor, at);
    moved();
  }

  /** The dots, the axes, and what is pointed at or chosen. */
  function overlay() {
    if (!layer.width) return;
    const style = getComputedStyle(canvas);
    const context = sharp(canvas, view.size.width, view.size.height);
    context.drawImage(layer, 0, 0, view.size.width, view.size.height);
    context.fillStyle = style.color;
    context.font = "13px system-ui, sans-serif";
    context.fillText(`\u2191 ${names[1]}`, 8, 18);
    context.textAlign = "right";
    context.fillText(`${names[0]} \u2192`, view.size.width - 8, view.size.height - 6);
    context.strokeStyle = style.color;
    context.lineWidth = 1.5;
    if (under?.covariance) ellipse(context, under.place, under.covariance);
    const at = chosen();
    if (at.length === 2) {
      context.setLineDash([5, 4]);
      context.beginPath();
      at.forEach(([x, y]) => context.lineTo(view.px(x), view.py(y)));
      context.stroke();
      context.setLineDash([]);
    }
    for (const [x, y] of at) {
      context.beginPath();
      context.arc(view.px(x), view.py(y), 6, 0, 7);
      context.stroke();
    }
    if (cross && document.activeElement === canvas) {
      context.fillRect(cross[0] - 10, cross[1] - 0.5, 21, 1);
      context.fillRect(cross[0] - 0.5, cross[1] - 10, 1, 21);
    }
  }

  /** Two standard deviations around a place. */
  function ellipse(context, at, [[a, b], [, d]]) {
    context.beginPath();
    const first = Math.sqrt(a || 1e-12); // the Cholesky factor of the covariance
    const rest = Math.sqrt(Math.max(d - (b * b) / (a || 1e-12), 0));
    for (let k = 0; k <= 48; k++) {
      const [c, s] = [Math.cos((k / 24) * Math.PI), Math.sin((k / 24) * Math.PI)];
      context.lineTo(view.px(at[0] + 2 * first * c),
        view.py(at[1] + 2 * ((b / first) * c + rest * s)));
    }
    context.stroke();
  }

  /** The nearest example within 14 pixels. */
  function nearest([left, top]) {
    let best = -1;
    let least = 14 ** 2;
    for (let i = 0; i < points.xs.length; i++) {
      const distance = (view.px(points.xs[i]) - left) ** 2 + (view.py(points.ys[i]) - top) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  function point(at) {
    const i = nearest(at);
    if (i < 0 || under?.index === points.index[i]) return;
    const run = loaded;
    page.ask("hover", { index: points.index[i], axes: run.axes }, (answer) => {
      if (run !== loaded) return;
      under = answer;
      preview.replaceChildren(gallery(answer.input,
        [[`example ${answer.index}`, answer.id, answer.label && `label ${answer.label}`]
          .filter(Boolean).join(", ")], 96),
      h("p", {}, h("a", { href: `#one?index=${answer.index}` }, "Open it as one input")));
      overlay();
    });
  }

  function click(at) {
    const there = view.back(at).map((v) => Number(v.toFixed(4)));
    const before = chosen();
    const next = before.length === 1 ? [before[0], there] : [there];
    page.set({ at: next.map((pair) => pair.join(",")).join(";") });
  }

  function decode() {
    const [at, index] = [chosen(), page.state.index ?? 0];
    const key = JSON.stringify([at, onAxes(), index]);
    if (asked === key) return;
    asked = key;
    if (!at.length) {
      page.fail("at", null);
      decoded.replaceChildren(h("p", { class: "quiet" }, "Click the map."));
      page.python("");
      return;
    }
    const line = at.length === 1 ? at : Array.from({ length: STEPS }, (_, k) =>
      [0, 1].map((j) => Number((at[0][j] + (k / (STEPS - 1)) * (at[1][j] - at[0][j])).toFixed(4))));
    page.ask("at", {
      places: line.map((pair) => pair.join(",")).join(";"),
      axes: onAxes(), index,
    }, (answer) => {
      if (asked !== key) return;
      const captions = at.length === 1 ? [at[0].map((v) => number(v)).join(", ")] : [];
      decoded.replaceChildren(gallery(answer.pictures, captions, at.length === 1 ? 128 : 64),
        about.context ? h("p", { class: "quiet" }, `Given the context of example ${index}.`) : "");
      page.python(answer.python);
    });
  }

  // One pointer moves the window or clicks; two zoom.
  const held = new Map();
  let travel = 0;
  const spot = (event) => [event.offsetX, event.offsetY];
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return; // it opens a menu
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, spot(event));
    travel = held.size > 1 ? Infinity : 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) {
      point(spot(event));
      return;
    }
    const now = spot(event);
    const other = [...held].find(([id]) => id !== event.pointerId)?.[1];
    travel += Math.hypot(now[0] - before[0], now[1] - before[1]);
    held.set(event.pointerId, now);
    if (travel < 5) return;
    if (other) {
      const apart = (at) => Math.hypot(at[0] - other[0], at[1] - other[1]) || 1;
      zoom(apart(now) / apart(before), other);
    } else {
      view.pan(now[0] - before[0], now[1] - before[1]);
      moved();
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!held.delete(event.pointerId) || travel >= 5) return;
    cross = null;
    point(spot(event));
    click(spot(event));
  });
  canvas.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) / 250), spot(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
    cross ??= middle();
    if (by[event.key]) {
      cross = cross.map((v, j) => v + by[event.key][j]);
      point(cross);
      overlay();
    } else if (event.key === "Enter" || event.key === " ") click(cross);
    else if (event.key === "+" || event.key === "=") zoom(1.25, cross);
    else if (event.key === "-") zoom(0.8, cross);
    else if (event.key === "0") all();
    else return;
    event.preventDefault();
  });
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, overlay);

  page.ask("order", {}, (answer) => {
    const top = answer.latents.slice(0, 6);
    const pairs = top.flatMap((a, i) => top.slice(i + 1).map((b) =>
      [`${a.place},${b.place}`, `${a.name}, ${b.name}`]));
    axes.append(...pairs.map(([value, text]) => h("option", { value }, text)));
    ready = true;
    update(page.state);
  });

  function update(state) {
    if (ready) load();
    axes.value = onAxes();
    if (ready && !axes.value) axes.append(h("option", { selected: true }, onAxes())); // of a link
    tint.value = state.color ?? own;
    place(state);
    if (points.xs.length) draw();
    decode();
  }

  return {
    update,
    leave() {
      clearTimeout(timer);
      clearTimeout(saving);
    },
  };
}

const empty = () => ({ xs: [], ys: [], index: [], values: [], inks: [] });
