// One input: what the encoder says of it, draws of that, and what they decode to.

import { chosen, exampleControls } from "../example.js";
import { conditionals } from "../columns.js";
import { button, field, h, number, refill, slider } from "../dom.js";
import { bells, gallery, reach } from "../draw.js";
import { overview } from "../plane.js";

export const title = "One input";
export const fits = () => true;

const FEW = 10; // latents shown at first

const EXPLAINED = {
  posterior: "For this input the encoder gives every latent a Gaussian of its own: a mean (where) "
    + "and a log-scale (how sure). Gray is the prior, the same for all inputs. The KL is what the "
    + "difference costs. A draw takes one value from every bell; the decoder turns them into data.",
  estimated: "For this input the posterior gives every latent a distribution of its own; bells "
    + "have the mean and the scale of 64 draws. Gray is the prior, the same for all inputs.",
  values: "A flow maps this input to one value of every latent, without a posterior. Gray is the "
    + "prior; \u2212log p is what the value costs. Draws differ only by the "
    + "noise that fills the gaps between integer levels.",
  "": "This model has no latents: it is a density of rows. Each column has a distribution given "
    + "the others, which shows what is unusual in a row.",
};

/** "3:1.5,7:0" as a Map. */
export const parsed = (text) => new Map(
  (text ?? "").split(",").filter(Boolean).map((word) => word.split(":").map(Number)));
export const written = (values) => [...values].map(([i, v]) => `${i}:${v}`).join(",");

export function mount(root, page) {
  const unit = page.about.moments === "values" ? "\u2212log p" : "KL";
  const controls = exampleControls(page);
  const figures = h("p", { class: "figures" });
  const pictures = h("div", { class: "pictures" });
  const draws = h("div");
  const list = h("div", { class: "latents" });
  const rest = h("p", { class: "quiet" });
  const warmth = h("output");
  const temperature = slider("Temperature of the draws", 0, 2, 0.05, 1,
    (value) => page.set({ temperature: value === 1 ? null : value }));
  let rows = new Map(); // place -> row of the list
  let seen = { key: null }; // draws of one posterior: their `seeds`, and the `dots` of each place
  let shown = "";

  const columns = conditionals((all) => page.set({ columns: all ? "all" : null }));
  const plane = h("section");
  const code = { one: "", columns: "", plane: "" };
  const latent = page.about.dims > 0;

  /** Show the lines of a part of the view. */
  function python(name, text) {
    code[name] = text;
    page.python(Object.values(code).filter(Boolean).join("\n"));
  }

  root.append(
    h("p", { class: "lead" }, EXPLAINED[page.about.moments]),
    controls.root,
    h("div", { class: latent ? "columns" : "" },
      h("section", { class: "side" }, figures, pictures, latent ? [h("h2", {}, "Draws"),
        h("div", { class: "controls" },
          button("Draw again", () => page.set({ seed: (Number(page.state.seed) || 0) + 1 })),
          field("temperature", temperature), warmth),
        draws] : null),
      latent ? h("section", {},
        h("div", { class: "controls" }, h("h2", {}, `Latents by ${unit}`),
          button("Release all", () => page.set({ set: null })),
          button("Prior mean for all", () => page.set({
            set: written([...rows.keys()].map((i) => [i, 0])),
          }))),
        list, rest) : null),
    columns.root, plane);
  /** All of the plane of data, once it is known. */
  function showPlane() {
    const { plane: answer, about } = page;
    if (!answer) return;
    plane.replaceChildren(h("h2", {}, "All of the plane"), overview(),
      h("p", { class: "quiet" }, `Shades: the density of the model${answer.bound === "exact" ? ""
        : `, by a bound (${answer.bound})`}${about.context ? ", given the context of example 0" : ""}.`));
    python("plane", answer.python);
  }

  /** Set a latent, or give it back to the posterior. */
  function change(place, value) {
    const values = parsed(page.state.set);
    if (value === null) values.delete(place); else values.set(place, value);
    page.set({ set: written(values) });
  }

  function row(latent) {
    const canvas = h("canvas", { role: "img" });
    const control = slider(`Set ${latent.name}`, -4, 4, 0.01, 0,
      (value) => change(latent.place, value));
    const off = button("off", () => {
      change(latent.place, parsed(page.state.set).get(latent.place) === 0 ? null : 0);
    }, { title: "Set it to the mean of the prior", "aria-label": `off: ${latent.name}` });
    const release = button("\u00d7", () => change(latent.place, null),
      { title: "Back to the posterior", "aria-label": `Release ${latent.name}` });
    const bar = h("i");
    const text = h("span", { class: "numbers" });
    const cost = h("span", { class: "numbers" });
    const element = h("div", { class: "latent" },
      h("div", {}, h("b", {}, latent.name), text),
      h("div", { class: "axis" }, canvas, control),
      h("div", {}, h("span", { class: "bar" }, bar), cost),
      h("div", { class: "buttons" }, off, release));
    return { element, canvas, control, off, release, bar, text, cost };
  }

  function showLatents(answer, state) {
    const [values, all] = [parsed(state.set), state.latents === "all"];
    const kept = answer.latents.filter((l, i) => all || i < FEW || values.has(l.place));
    const most = Math.max(...answer.latents.map((l) => l.cost), 1e-6);
    const width = innerWidth > 700
      ? Math.min(300, Math.max(160, list.clientWidth - 400)) : list.clientWidth - 20;
    const next = new Map();
    for (const latent of kept) {
      const line = rows.get(latent.place) ?? row(latent);
      next.set(latent.place, line);
      const set = values.get(latent.place);
      const laws = latent.std > 0 ? [[0, 1], [latent.mean, latent.std]] : [[0, 1]];
      const mark = set ?? (latent.std > 0 ? null : latent.mean);
      const dots = seen.dots.get(latent.place) ?? [];
      const range = reach(latent.mean);
      [line.control.min, line.control.max] = [-range, range];
      bells(line.canvas, laws, { width, dots, mark, range });
      line.canvas.setAttribute("aria-label",
        `mean ${number(latent.mean)}, standard deviation ${number(latent.std, 3)}`);
      if (document.activeElement !== line.control || set === undefined) {
        line.control.value = set ?? latent.mean;
      }
      line.element.classList.toggle("set", set !== undefined);
      line.off.setAttribute("aria-pressed", set === 0);
      line.release.disabled = set === undefined;
      line.text.textContent = latent.std > 0
        ? `mean ${number(latent.mean)}, std ${number(latent.std, 3)}\n`
          + `log-scale ${number(Math.log(latent.std))}`
        : `value ${number(latent.mean)}`;
      line.bar.style.width = `${(100 * Math.max(latent.cost, 0)) / most}%`;
      line.cost.textContent = `${number(latent.cost)} nats`;
    }
    const order = [...next.values()].map((line) => line.element);
    if (order.some((element, i) => list.children[i] !== element)
      || list.children.length !== order.length) list.replaceChildren(...order);
    rows = next;
    refill(rest, `${unit} of all ${page.about.dims}: ${number(answer.cost)} nats. `,
      answer.latents.length > FEW
        ? button(all ? "Show fewer" : `Show ${answer.latents.length}`,
          () => page.set({ latents: all ? null : "all" })) : "");
  }

  const showPictures = (answer, follows) => pictures.replaceChildren(gallery(
    [answer.input, answer.reconstruction, follows].reduce(joined),
    ["input", "reconstruction", "with your sliders"], 112));

  function show(answer, state) {
    page.fail("decode", null); // this answer is newer
    controls.show(answer, state);
    figures.textContent = `${number(answer.bits_per_dim, 3)} bits per dimension, `
      + `${number(answer.nats)} nats${answer.bound === "exact" ? "" : ", an upper bound"}`;
    if (!latent) {
      pictures.replaceChildren(gallery(answer.input, ["input"], 112));
      python("one", answer.python);
      [shown, last] = [sameExcept(state, "set"), answer];
      return;
    }
    showPictures(answer, answer.follows);
    draws.replaceChildren(gallery(answer.draws, [], 60));
    const key = [state.index, state.upload, state.label, state.temperature].join();
    if (seen.key !== key) seen = { key, seeds: new Set(), dots: new Map() };
    if (!seen.seeds.has(state.seed)) {
      seen.seeds.add(state.seed);
      for (const latent of answer.latents) {
        const before = seen.dots.get(latent.place) ?? [];
        seen.dots.set(latent.place, [...latent.draws, ...before].slice(0, 160));
      }
    }
    showLatents(answer, state);
    python("one", answer.python);
    shown = sameExcept(state, "set");
    last = answer;
  }

  let last = null;
  let asked = null; // the example whose columns are shown, and how many
  function askColumns(state) {
    const parameters = chosen(state);
    const key = JSON.stringify([parameters, state.columns]);
    if (!page.about.conditionals || asked === key) return;
    asked = key;
    page.ask("columns", parameters, (answer) => {
      columns.show(answer, state.columns === "all");
      python("columns", answer.python);
    });
  }

  return {
    update(state) {
      showPlane();
      temperature.value = state.temperature ?? 1;
      warmth.value = number(Number(temperature.value));
      const parameters = {
        ...chosen(state), seed: state.seed ?? 0, temperature: state.temperature ?? 1,
        set: state.set ?? "",
      };
      askColumns(state);
      clearTimeout(this.timer); // it would ask for what was shown before
      const ask = () => page.ask("one", parameters,
        (answer) => show(answer, { ...state, set: page.state.set }));
      if (!last || !latent || shown !== sameExcept(state, "set")) {
        ask();
        return;
      }
      showLatents(last, state); // only sliders moved
      const { seed, temperature: warm, ...less } = parameters;
      const before = shown;
      page.ask("decode", less, (answer) => {
        if (shown === before) showPictures(last, answer.picture); // not beside another example
      });
      this.timer = setTimeout(ask, 250);
    },
    leave() {
      clearTimeout(this.timer);
    },
  };
}

const sameExcept = (state, name) => JSON.stringify({ ...state, [name]: null });

/** Two sets of examples as one. */
const joined = (a, b) => (a.images
  ? { ...a, images: [...a.images, ...b.images] }
  : { ...a, rows: [...a.rows, ...b.rows], points: a.points && [...a.points, ...b.points] });
