// Traverse: a slider for each of the latents that matter most.

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
  const along_ = h("h3", {}, "");
  const list = h("div", { class: "sliders" });
  const about = h("p", { class: "quiet" }, "Measuring which latents matter \u2026");
  const past = []; // earlier values of `set`
  let before = null; // the value of `set` when a slider began to move
  let lines = [];
  let timer = null;

  const start = choice([["prior", "center of the prior"], ["example", "this example"]], "prior",
    (value) => page.set({ start: value === "prior" ? null : value, set: null }));
  const undo = button("Undo", () => page.set({ set: past.pop() ?? null }));
  /** Change the sliders in one step, which can be undone. */
  const jump = (set) => {
    past.push(page.state.set ?? null);
    page.set({ set });
  };
  root.append(
    h("p", { class: "lead" }, "Each slider is one latent, in standard deviations of its prior; the "
      + "decoder follows. The first ones carry most information about the data."),
    h("div", { class: "controls" }, field("start from", start), undo,
      button("Reset", () => jump(null)),
      button("Random", () => jump(written(lines.map(({ place }) =>
        [place, Math.round(100 * normal()) / 100]))))),
    controls.root,
    h("div", { class: "columns" }, h("section", { class: "side" }, big),
      h("section", {}, list, about)),
    h("section", {}, along_, along));

  function build(answer) {
    const most = Math.max(...answer.latents.map((l) => l.cost), 1e-6);
    lines = answer.latents.slice(0, 10).map((latent) => {
      const value = h("output", { class: "numbers" });
      const move = (v) => {
        before ??= { set: page.state.set ?? null };
        const values = parsed(page.state.set);
        values.set(latent.place, v);
        page.set({ set: written(values), along: latent.place });
      };
      const control = slider(latent.name, -4, 4, 0.02, 0, move, () => {
        if (before) past.push(before.set);
        before = null;
        undo.disabled = false;
      });
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
    ask(page.state);
  }

  function ask(state, whole = false) {
    const place = Number(state.along ?? lines[0]?.place);
    const moving = before !== null; // then the picture comes first, and the rest a little later
    clearTimeout(timer);
    if (moving && !whole) timer = setTimeout(() => ask(page.state, true), 200);
    const parameters = {
      ...chosen(state), start: state.start ?? "prior", set: state.set ?? "",
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
      controls.root.hidden = start.value === "prior" && !page.about.classes.length;
      controls.show({ input: { rows: [[]] } }, state);
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
