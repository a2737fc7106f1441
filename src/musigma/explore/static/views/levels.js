// The levels of a multi-scale model: the prior of each latent, and draws of one of them.

import { chosen, exampleControls } from "../example.js";
import { button, field, h, number, refill, slider } from "../dom.js";
import { gallery } from "../draw.js";

export const title = "Levels";
export const fits = (about) => about.levels;

export function mount(root, page) {
  const controls = exampleControls(page);
  const list = h("div");
  const input = h("div");
  const drawn = h("div");
  const warmth = h("output");
  const temperature = slider("Temperature", 0, 2, 0.05, 1,
    (value) => page.set({ temperature: value === 1 ? null : value }));
  const heading = h("h2", {}, "");
  root.append(
    h("p", { class: "lead" }, "This model has a latent at several sizes. The prior of each depends "
      + "on those above it: its mean and log-scale are images. Draw one level again and keep the "
      + "others, to see what it holds."),
    controls.root,
    h("div", { class: "columns" }, h("section", { class: "side" }, h("h2", {}, "Input"), input,
      heading, h("div", { class: "controls" },
        button("Draw again", () => page.set({ seed: (Number(page.state.seed) || 0) + 1 })),
        field("temperature", temperature), warmth), drawn),
    h("section", {}, list)));

  const about = (set) => `from ${number(set.low)} (black) to ${number(set.high)} (white)`;

  function show(answer, state) {
    const level = Number(state.level) || 0;
    controls.show(answer, state);
    input.replaceChildren(gallery(answer.input, [""], 128));
    heading.textContent = `Level ${level} drawn again`;
    drawn.replaceChildren(gallery(answer.redrawn, [], 96));
    refill(list, ...answer.levels.map((row, i) => h("div", { class: "level" },
      h("div", { class: "controls" },
        h("h2", {}, `Level ${i}${i ? "" : ", the top"}: ${row.shape.join(" \u00d7 ")}`),
        button("Redraw this level", () => page.set({ level: i || null }),
          { "aria-pressed": String(i === level) })),
      h("p", { class: "quiet" }, `mean, ${about(row.mean)}`), gallery(row.mean, [], 44),
      h("p", { class: "quiet" }, `log-scale, ${about(row.log_std)}`),
      gallery(row.log_std, [], 44))));
    page.python(answer.python);
  }

  return {
    update(state) {
      temperature.value = state.temperature ?? 1;
      warmth.value = number(Number(temperature.value));
      page.ask("levels", {
        ...chosen(state), level: state.level ?? 0, seed: state.seed ?? 0,
        temperature: state.temperature ?? 1,
      }, (answer) => show(answer, state));
    },
  };
}
