// Training: the curves and the warnings of the run, while it runs.

import { h, number } from "../dom.js";
import { curves } from "../draw.js";

export const title = "Training";
export const fits = (about) => about.training;

const EVERY = 2000; // milliseconds

export function mount(root, page) {
  const line = h("p", { class: "figures" });
  const plot = h("canvas", { role: "img", "aria-label": "Bits per dimension by step" });
  const latents = h("div", { class: "kl" });
  const problems = h("ul", { class: "problems" });
  root.append(
    h("p", { class: "lead" }, "Bits per dimension of the batches and of validation data, and what "
      + "training warned of."),
    line, h("section", {}, plot),
    h("section", {}, h("h2", {}, "Cost of each latent, last step"), latents),
    h("section", {}, h("h2", {}, "Warnings"), problems));
  let timer = null;

  function show(answer) {
    const share = answer.share === null ? "" : `, ${Math.round(100 * answer.share)} %`;
    const best = answer.best ? `, best ${number(answer.best.bits_per_dim, 4)} on validation data `
      + `at step ${answer.best.step.toLocaleString("en")}` : "";
    line.textContent = `${answer.state}${share}, step ${answer.step.toLocaleString("en")}${best}`;
    curves(plot, [
      { points: answer.train, ink: "blue", name: "training batches" },
      { points: answer.validation, ink: "accent", name: "validation", dots: true },
    ], { limits: late([...answer.train, ...answer.validation]), height: 320,
      width: plot.parentElement.clientWidth, xName: "step", yName: "bits per dimension" });
    const most = Math.max(...answer.kl, 1e-6);
    latents.replaceChildren(...answer.kl.slice(0, 24).map((nats, i) => {
      const bar = h("i");
      bar.style.width = `${(100 * Math.max(nats, 0)) / most}%`;
      return h("div", { class: "slide" }, h("b", {}, `z${i}`), h("span", { class: "bar" }, bar),
        h("span", { class: "numbers" }, `${number(nats)} nats`));
    }));
    const all = ["setbacks", "warnings", "skips"]
      .flatMap((kind) => answer[kind].map((problem) => [problem.step, kind, problem.message]))
      .sort(([a], [b]) => a - b);
    problems.replaceChildren(...(all.length ? all : [[0, "", "none"]]).map(([step, kind, text]) =>
      h("li", {}, kind ? `step ${step.toLocaleString("en")}: ${text}` : text)));
    page.python(answer.python);
    clearTimeout(timer);
    if (answer.state !== "finished") timer = setTimeout(ask, EVERY);
  }

  const ask = () => page.ask("training", {}, show);
  return { update: ask, leave: () => clearTimeout(timer) };
}

/** The range of the values after the first tenth of the steps, which are much larger. */
function late(points) {
  const last = Math.max(...points.map(([x]) => x));
  const ys = points.filter(([x]) => x >= 0.1 * last).map(([, y]) => y);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const margin = 0.05 * (high - low) || 0.1;
  return [low - margin, high + margin];
}
