// Anomalies: the data from the strangest on, and the threshold of a false-positive rate.

import { button, choice, field, h, number } from "../dom.js";
import { gallery, histogram, image } from "../draw.js";

export const title = "Anomalies";
export const fits = () => true;

const RATES = [["0.001", "0.1 %"], ["0.005", "0.5 %"], ["0.01", "1 %"], ["0.02", "2 %"],
  ["0.05", "5 %"], ["0.1", "10 %"], ["0.2", "20 %"]];
const COUNT = 24;

export function mount(root, page) {
  const rate = choice(RATES, "0.01", (value) => page.set({
    rate: value === "0.01" ? null : value, first: null,
  }), { name: "rate" });
  const line = h("p", { class: "figures" });
  const promise = h("p", { class: "quiet" });
  const plot = h("canvas", { role: "img", "aria-label": "Histogram of the scores" });
  const key = h("p", { class: "quiet" });
  const list = h("div", { class: "scroll" });
  const turn = (by) => page.set({ first: Math.max(0, (Number(page.state.first) || 0) + by) || null });
  const back = button("Stranger ones", () => turn(-COUNT));
  const on = button("Less strange ones", () => turn(COUNT));
  root.append(
    h("p", { class: "lead" }, "The data, the strangest first: those that cost most nats. A p-value "
      + "is the share of normal examples that are at least as strange; flagging those below a rate "
      + "flags no more than this share of normal examples, whatever the model is."),
    h("div", { class: "controls" }, field("false-positive rate", rate), back, on),
    line, promise, h("section", {}, plot, key), list);
  let timer = null;

  function show(answer, state) {
    const total = answer.done.toLocaleString("en");
    const ranked = answer.n !== undefined;
    const known = ranked && answer.done === answer.total;
    line.textContent = answer.error || (ranked
      ? `${answer.flagged.toLocaleString("en")} of ${total} examples are flagged`
        + (answer.threshold === null || answer.threshold === undefined ? ""
          : `: scores ${answer.apart ? "above" : "from"} ${number(answer.threshold)} nats`)
      : "Scoring \u2026") + (known ? "" : `, ${total} of ${answer.total.toLocaleString("en")} scored`);
    const others = answer.apart ? `${answer.n?.toLocaleString("en")} normal examples that the model `
      + "was not trained on" : `all ${answer.n?.toLocaleString("en")} others, which are taken for normal`;
    promise.textContent = answer.reason ? `${answer.reason}.`
      : answer.between ? `Compared with ${others}. The rate is promised on average over such sets; `
        + `with this one, ${answer.between.map((v) => number(100 * v, 2)).join(" to ")} % of normal `
        + "examples are flagged (95 % interval)." : "";
    back.disabled = !Number(state.first);
    on.disabled = (Number(state.first) || 0) + COUNT >= answer.done;
    if (answer.histogram) {
      histogram(plot, answer.histogram, answer.threshold ?? null, {
        width: Math.min(760, plot.parentElement.clientWidth), height: 170,
        xName: `${answer.unit}, nats`,
      });
      key.textContent = `Blue: these data${answer.apart ? "; gray: normal examples" : ""}`
        + `${answer.threshold ? "; the line is the threshold" : ""}.`;
    }
    list.replaceChildren(answer.rows.length ? table(answer, Number(state.first) || 0) : "");
    page.python(answer.python);
    clearTimeout(timer);
    if (!known && !answer.error) timer = setTimeout(() => ask(page.state), 1000);
  }

  const ask = (state) => page.ask("anomalies", {
    rate: state.rate ?? "0.01", first: state.first ?? 0, count: COUNT,
  }, (answer) => show(answer, state));
  return {
    update(state) {
      rate.value = state.rate ?? "0.01";
      clearTimeout(timer);
      ask(state);
    },
    leave: () => clearTimeout(timer),
  };
}

function table(answer, first) {
  const { rows, shown, maps, because } = answer;
  const pictures = Boolean(shown.images);
  const labeled = rows.some((row) => row.label);
  const heads = ["", "example", "nats", "p", labeled && "label", pictures && "input",
    maps && "surprise", because && "because", ...(pictures ? [] : shown.names)];
  return h("div", {},
    maps ? h("p", { class: "quiet" }, "Surprise: where the nats are, from "
      + `${number(maps.low)} (black) to ${number(maps.high)} (white), the same for all.`) : null,
    h("table", { class: "ranked" },
      h("thead", {}, h("tr", {}, heads.filter((text) => typeof text === "string").map((text) =>
        h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map((row, i) => h("tr", {
        class: row.p <= answer.rate ? "flagged" : null,
      },
      h("td", {}, `${first + i + 1}`),
      h("td", {}, h("a", { href: `#one?index=${row.index}` },
        [`example ${row.index}`, row.id].filter(Boolean).join(", "))),
      h("td", {}, row.score === null ? "\u221e" : number(row.score)),
      h("td", {}, row.p.toPrecision(2)),
      labeled ? h("td", {}, row.label) : null,
      pictures ? h("td", {}, image(shown, i, 56, `example ${row.index}`)) : null,
      maps ? h("td", {}, image(maps, i, 56, `surprise of example ${row.index}`)) : null,
      because ? h("td", { class: "because" }, because[i].join("; ") || "\u2013") : null,
      pictures ? null : shown.rows[i].map((cell) => h("td", {}, cell)))))),
    shown.points ? gallery(shown, []) : null);
}
