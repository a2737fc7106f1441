// The head: how two tensors are read as mean and scale, and what a misreading does.

import { choice, field, h, number, slider } from "../dom.js";
import { bells, curves } from "../draw.js";

export const title = "The head";
export const fits = () => true;

const LAYOUTS = ["halves", "interleaved", "two-heads", "per-feature"];
const ORDERS = ["mean-first", "scale-first"];
const SCALES = ["log_std", "log_var", "softplus", "squareplus", "sigmoid+2", "2*sigmoid", "atan",
  "tanh", "softclip", "softcap"];
const START = "1,-1.5,0.5,-0.7,0.2,-2";

export function mount(root, page) {
  const words = page.about.format.split(" ");
  const own = (options) => options.find((option) => words.includes(option)) ?? options[0];
  const reading = (state) => [state.layout ?? own(LAYOUTS), state.order ?? own(ORDERS),
    state.scale ?? own(SCALES)];
  const pick = (name, options) =>
    choice(options, own(options), (value) => page.set({ [name]: value }), { name });
  const layout = pick("layout", LAYOUTS);
  const order = pick("order", ORDERS);
  const scale = pick("scale", SCALES);
  const numbers = START.split(",").map((_, i) => h("input", {
    type: "number", step: 0.1, "aria-label": `Output ${i}`,
    onchange: () => page.set({ h: numbers.map((input) => Number(input.value) || 0).join(",") }),
  }));
  const cells = numbers.map((input) => h("label", { class: "cell" }, input, h("span", {}, "")));
  const laws = h("div", { class: "laws" });
  const curve = h("canvas", { role: "img", "aria-label": "Standard deviation for a raw scale" });

  const sampler = pick("sampler", SCALES);
  const charged = pick("kl", SCALES);
  const noise = slider("Noise of the data", 0.1, 2, 0.05, 1, (value) => page.set({ noise: value }));
  const amount = h("output");
  const plot = h("canvas", { role: "img", "aria-label": "Loss and bound for each r" });
  const bell = h("canvas", { role: "img", "aria-label": "The Gaussians that are learned" });
  const verdict = h("p", { class: "verdict" });
  const text = h("code", { class: "format" });
  root.append(
    h("p", { class: "lead" }, "A head emits numbers; a format says which are means, which are "
      + "scales, and what a scale means. Sampler and KL must read them alike."),
    h("div", { class: "columns even" },
      h("section", {}, h("h2", {}, "How an output is read"),
        h("div", { class: "controls" }, field("layout", layout), field("order", order),
          field("scale", scale)),
        text, h("div", { class: "cells" }, cells), laws, curve),
      h("section", {}, h("h2", {}, "If sampler and KL disagree"),
        h("p", {}, "One datum x = z + noise, z ~ N(0, 1). The encoder learns one number r, the raw "
          + "scale of its posterior, by the loss. Nothing crashes:"),
        h("div", { class: "controls" }, field("the sampler reads", sampler),
          field("the KL reads", charged), field("noise", noise), amount),
        plot, bell, verdict)));

  const width = (canvas) => Math.min(480, canvas.parentElement.clientWidth);

  function showReading(answer) {
    text.textContent = answer.format;
    cells.forEach((cell, i) => {
      const j = answer.mean_from.indexOf(i);
      cell.className = `cell ${j >= 0 ? "mean" : "scale"}`;
      cell.lastChild.textContent = j >= 0 ? `mean ${j}` : `scale ${answer.scale_from.indexOf(i)}`;
    });
    laws.replaceChildren(...answer.mean.map((mean, i) => {
      const std = Math.exp(answer.log_std[i]);
      const canvas = h("canvas", { role: "img", "aria-label": `Gaussian ${i}` });
      bells(canvas, [[0, 1], [mean, std]], { width: 150 });
      return h("figure", {}, canvas, h("figcaption", {}, `mean ${number(mean)}, log-scale `
        + `${number(answer.log_std[i])}, std ${number(std)}`));
    }));
    curves(curve, [{ points: answer.raw.map((r, i) => [r, Math.exp(answer.curve[i])]),
      ink: "accent" }], { width: width(curve), height: 200, limits: [0, 4],
      xName: "raw scale", yName: "standard deviation" });
    page.python([answer.python, other].join("\n"));
    mine = answer.python;
  }

  let mine = "";
  let other = "";
  function showMismatch(answer) {
    const at = (values) => answer.r.map((r, i) => [r, values[i]]);
    const low = Math.min(...answer.loss, ...answer.bound);
    curves(plot, [
      { points: at(answer.loss), ink: "accent", name: "loss that is minimized" },
      { points: at(answer.bound), ink: "blue", name: "bound of \u2212log p(x), by what is drawn" },
    ], { width: width(plot), height: 220, limits: [low - 0.1, low + 3], xName: "r", yName: "nats",
      marks: [{ x: answer.r[answer.chosen], ink: "accent" }, { x: answer.r[answer.best], ink: "blue" }] });
    const drawn = answer.std[answer.chosen];
    bells(bell, [[0, answer.true_std], [0, drawn], [0, answer.charged_std]],
      { width: width(bell), height: 90 });
    const right = sampler.value === charged.value;
    verdict.textContent = right
      ? `They agree: the learned posterior has std ${number(drawn, 3)}, the exact one `
        + `${number(answer.true_std, 3)} (gray).`
      : `The sampler draws with std ${number(drawn, 3)} (orange), the KL charges for `
        + `${number(answer.charged_std, 3)} (blue), and the exact posterior has `
        + `${number(answer.true_std, 3)} (gray). The loss reports ${number(answer.loss[answer.chosen])} `
        + `nats; what is drawn costs ${number(answer.bound[answer.chosen])}, and the right reading `
        + `${number(answer.bound[answer.best])}.`;
    other = answer.python;
    page.python([mine, other].join("\n"));
  }

  return {
    update(state) {
      const read = reading(state);
      [layout.value, order.value, scale.value] = read;
      const values = (state.h ?? START).split(",");
      numbers.forEach((input, i) => { input.value = values[i] ?? 0; });
      page.ask("head", { format: read.join(" "), numbers: values.join(",") }, showReading);
      sampler.value = state.sampler ?? "log_std";
      charged.value = state.kl ?? "log_var";
      noise.value = state.noise ?? 1;
      amount.value = number(Number(noise.value));
      page.ask("mismatch", { sampler: sampler.value, kl: charged.value, noise: noise.value },
        showMismatch);
    },
  };
}
