// Traverse: a slider for each of the latents that matter most, and for directions.

import { chosen, exampleControls } from "../example.js";
import { button, choice, field, h, number, slider } from "../dom.js";
import { gallery, reach } from "../draw.js";
import { parsed, written } from "./one.js";

export const title = "Traverse";
export const fits = (about) => about.dims > 0;

export function mount(root, page) {
  const controls = exampleControls(page);
  const big = h("div", { class: "big" });
  const along = h("div");
  const along_ = h("h2", {}, "");
  const list = h("div", { class: "sliders" });
  const about = h("p", { class: "quiet" }, "Measuring which latents matter \u2026");
  const directions = h("div", { class: "sliders" });
  const past = []; // earlier values of `start`, `set` and `move`
  let before = null; // those when a slider began to move
  let lines = [];
  let moves = [];
  let timer = null;

  const start = choice([["prior", "center of the prior"], ["example", "this example"]], "prior",
    (value) => jump({ start: value === "prior" ? null : value, set: null }));
  const undo = button("Undo", () => page.set(past.pop() ?? {}));
  const now = () => Object.fromEntries(["start", "set", "move"].map((key) =>
    [key, page.state[key] ?? null]));
  /** Change several things in one step, which can be undone. */
  const jump = (changes) => {
    past.push(now());
    page.set({ move: null, ...changes });
  };
  /** A slider of an entry of `set` or `move`; one pull of it is undone at once. */
  const entry = (key, place, label, more = {}) => slider(label, -4, 4, 0.02, 0, (v) => {
    before ??= now();
    const values = parsed(page.state[key]);
    values.set(place, v);
    page.set({ [key]: written(values), ...more });
  }, () => {
    if (before) past.push(before);
    before = null;
    undo.disabled = false;
  });
  root.append(
    h("p", { class: "lead" }, "Each slider is one latent, in standard deviations of its prior; the "
      + "decoder follows. The first ones carry most information about the data."),
    h("div", { class: "controls" }, field("start from", start), undo,
      button("Reset", () => jump({ set: null })),
      button("Random", () => jump({ set: written(lines.map(({ place }) =>
        [place, Math.round(100 * normal()) / 100])) }))),
    controls.root,
    h("div", { class: "columns" }, h("section", { class: "side" }, big),
      h("section", {}, list, about, directions)),
    h("section", {}, along_, along));

  function build(answer) {
    const most = Math.max(...answer.latents.map((l) => l.cost), 1e-6);
    lines = answer.latents.slice(0, 10).map((latent) => {
      const value = h("output", { class: "numbers" });
      const control = entry("set", latent.place, latent.name, { along: latent.place });
      control.addEventListener("focus", () => {
        if (Number(page.state.along) !== latent.place) page.set({ along: latent.place });
      });
      const bar = h("i");
      bar.style.width = `${(100 * latent.cost) / most}%`;
      list.append(h("div", { class: "slide" }, h("b", {}, latent.name), control, value,
        h("span", { class: "bar", title: `${number(latent.cost)} nats` }, bar)));
      return { place: latent.place, control, value, name: latent.name };
    });
    about.textContent = `Bars: mean cost over ${answer.examples} examples; all latents together `
      + `${number(answer.total)} nats.`;
    moves = answer.directions.map((name, k) => {
      const [control, value] = [entry("move", k, name), h("output", { class: "numbers" })];
      directions.append(h("div", { class: "slide" }, h("b", {}, name), control, value));
      return { control, value };
    });
    directions.prepend(h("h2", {}, "Directions"), h("p", { class: "quiet" }, "Steps of one standard "
      + "deviation along principal components of the data; for a label, from the mean of all "
      + "others to the mean of its examples."));
    ask(page.state);
  }

  function ask(state, whole = false) {
    const place = Number(state.along ?? lines[0]?.place);
    const moving = before !== null; // then the picture comes first, and the rest a little later
    clearTimeout(timer);
    if (moving && !whole) timer = setTimeout(() => ask(page.state, true), 200);
    const parameters = {
      ...chosen(state), start: state.start ?? "prior", set: state.set ?? "", move: state.move ?? "",
      along: moving && !whole ? null : place,
    };
    page.ask("decode", parameters, (answer) => {
      big.replaceChildren(gallery(answer.picture, [""], 224));
      for (const line of lines) {
        const value = answer.values?.[line.place] ?? 0;
        if (document.activeElement !== line.control) {
          [line.control.min, line.control.max] = [-reach(value), reach(value)];
          line.control.value = value;
        }
        line.value.value = number(value);
        if (line.place === place) along_.textContent = `Along ${line.name}`;
      }
      const given = parsed(state.move);
      moves.forEach(({ control, value }, k) => {
        if (document.activeElement !== control) control.value = given.get(k) ?? 0;
        value.value = number(given.get(k) ?? 0);
      });
      if (!answer.strip) return;
      const captions = answer.steps.map((v) => number(v, 0));
      along.replaceChildren(gallery(answer.strip, captions, 72));
      page.python(answer.python);
    });
  }

  page.ask("order", {}, build);
  return {
    update(state) {
      start.value = state.start ?? "prior";
      controls.root.hidden = start.value === "prior" && !page.about.context;
      controls.show({}, state);
      undo.disabled = !past.length;
      if (lines.length) ask(state);
    },
    leave() {
      clearTimeout(timer);
    },
  };
}

/** A standard normal draw. */
const normal = () =>
  Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
