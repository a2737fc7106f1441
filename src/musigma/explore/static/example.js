// The controls that choose an example: its number, a random one, an upload, a row, a class.

import { button, choice, field, h } from "./dom.js";

/** The parameters of requests that say what is looked at. */
export const chosen = (state) =>
  ({ index: state.index ?? 0, upload: state.upload ?? null, label: state.label ?? null });

export function exampleControls(page) {
  const { about } = page;
  const go = (index) => page.set({
    index: ((index % about.examples) + about.examples) % about.examples || null,
    upload: null,
  });
  const index = h("input", {
    type: "number", min: 0, max: about.examples - 1, class: "index", "aria-label": "Example",
    onchange: () => {
      go(Math.trunc(Number(index.value)) || 0);
      index.value = page.state.index ?? 0;
    },
  });
  const step = (by) => go((Number(page.state.index) || 0) + by);
  const name = h("span", { class: "quiet" });
  const bar = h("div", { class: "controls" },
    button("\u2190", () => step(-1), { "aria-label": "Previous example" }), index,
    button("\u2192", () => step(1), { "aria-label": "Next example" }),
    button("Random", () => go(Math.floor(Math.random() * about.examples))),
    about.shape.length === 3 && about.served !== false ? upload(page) : null,
    about.classes.length ? field("class", choice(
      [["", "its own"], ...about.classes.map((text, i) => [String(i), text])],
      page.state.label ?? "", (value) => page.set({ label: value }), { id: "label" })) : null,
    name);
  const row = about.shape.length === 1 && about.served !== false ? typed(page) : null;
  const root = row ? h("div", {}, bar, row.root) : bar;

  /** Show what an answer is about. */
  function show(answer, state) {
    if (document.activeElement !== index) index.value = state.index ?? 0; // not while it is typed
    const select = bar.querySelector("#label");
    if (select) select.value = state.label ?? "";
    const words = [answer.id, answer.label && `label ${answer.label}`].filter(Boolean);
    name.textContent = !state.upload ? words.join(", ") : !about.context ? "your own"
      : `your own, with the context of example ${state.index ?? 0}`;
    if (answer.cells) row?.show(answer.cells);
  }
  return { root, show };
}

function upload(page) {
  const take = (chosen_) => page.post("upload", { name: chosen_.name }, chosen_);
  page.drop = take;
  const file = h("input", {
    type: "file", accept: "image/*", class: "sr", "aria-label": "Upload an image",
    onchange: () => {
      const [chosen_] = file.files;
      file.value = ""; // so that the same file can be chosen again
      if (chosen_) take(chosen_);
    },
  });
  return h("label", { class: "button", title: "Or drop one on the page" }, "Upload an image", file);
}

/** A form for a row of numbers or cells. */
function typed(page) {
  const inputs = page.about.columns.map((name) => h("input", { type: "text", "aria-label": name }));
  const use = (event) => {
    event.preventDefault();
    page.post("row", {}, JSON.stringify(inputs.map((input) => input.value)));
  };
  const root = h("details", {}, h("summary", {}, "Type a row"),
    h("form", { class: "cells", onsubmit: use },
      inputs.map((input, i) => field(page.about.columns[i], input)),
      h("button", { type: "submit" }, "Use this row")));
  let filled = false;
  const show = (cells) => {
    const typing = root.contains(document.activeElement);
    if (typing && filled) return;
    inputs.forEach((input, i) => {
      if (!typing || input.value === "") input.value = cells[i];
    });
    filled = true;
  };
  return { root, show };
}
