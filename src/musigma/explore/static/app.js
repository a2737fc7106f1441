// The page: which view is shown, its state in the address, errors, the link, the picture, the code.
//
// A view is a module with `title`, `fits(about)` and `mount(root, page)`, which returns
// `{update(state), leave()}`. All that a view shows follows from its state, which is the part of
// the address after "#view?", so a link restores it.

import { ask, latest } from "./api.js";
import { h } from "./dom.js";
import { setPlane } from "./plane.js";
import { save } from "./png.js";
import * as anomalies from "./views/anomalies.js";
import * as head from "./views/head.js";
import * as levels from "./views/levels.js";
import * as map from "./views/map.js";
import * as one from "./views/one.js";
import * as training from "./views/training.js";
import * as traverse from "./views/traverse.js";

const views = { one, traverse, map, levels, anomalies, head, training };
const part = (id) => document.getElementById(id);
const root = part("view");

class Page {
  constructor(about) {
    this.about = about;
    this.name = null;
    this.view = null;
    this.visit = 0; // number of views that were shown
    this.errors = new Map(); // messages by the question that failed
    this.drop = null; // takes a file that is dropped on the page, if the view can
    this.plane = null; // for data of two dimensions, once it is known
  }

  /** Whether the page has a view. */
  has(name) {
    const { about } = this;
    return Boolean(views[name]?.fits(about) && (about.views ?? [name]).includes(name));
  }

  /** The state in the address. */
  get state() {
    return Object.fromEntries(new URLSearchParams(location.hash.split("?")[1] ?? ""));
  }

  /** Change the state; values that are null or "" are left out of it. */
  set(changes) {
    const state = { ...this.state, ...changes };
    const kept = Object.entries(state).filter(([, value]) => value !== null && value !== "");
    const text = new URLSearchParams(kept).toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
    history.replaceState(null, "", `#${this.name}${text ? `?${text}` : ""}`);
    this.fail("post", null);
    this.view.update(this.state);
  }

  /** Ask the server; the newest answer of its kind goes to `then`, unless the view was left. */
  ask(name, parameters, then) {
    const { visit } = this;
    const here = (act) => (result) => { if (this.visit === visit) act(result); };
    latest(name, parameters, here((answer) => {
      this.fail(name, null);
      this.notice(answer.notice);
      then(answer);
    }), here((error) => this.fail(name, error)));
  }

  /** Post a file or text, which becomes the input of the view. */
  async post(name, parameters, body) {
    const { visit } = this;
    let [answer, fault] = [null, null];
    try {
      answer = await ask(name, parameters, body);
    } catch (error) {
      fault = error;
    }
    if (this.visit !== visit) return;
    this.fail("post", fault);
    if (answer) this.set({ upload: answer.upload });
  }

  /** Show the error of a question until it is answered; null forgets it. */
  fail(name, error) {
    if (error) this.errors.set(name, error.message);
    else this.errors.delete(name);
    part("error").hidden = !this.errors.size;
    part("error").textContent = [...new Set(this.errors.values())].join("\n");
  }

  notice(text) {
    part("notice").hidden = !text;
    part("notice").textContent = text ?? "";
  }

  /** The Python lines that make what is shown. */
  python(text) {
    part("code").textContent = text;
  }

  /** Show the view that the address names. */
  route() {
    const wanted = location.hash.slice(1).split("?")[0];
    const name = this.has(wanted) ? wanted : "one";
    if (name !== this.name) {
      this.view?.leave?.();
      this.name = name;
      this.visit++;
      document.title = `${views[name].title} \u2013 musigma explore`;
      this.drop = null;
      root.replaceChildren();
      this.python("");
      this.errors.clear();
      this.fail("", null);
      this.view = views[name].mount(root, this);
      for (const link of part("views").children) {
        if (link.dataset.view === name) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
    }
    this.view.update(this.state);
  }
}

async function copy(text, button) {
  button.dataset.text ??= button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch { // without permission, or not over https
    button.textContent = "Not allowed here";
  }
  setTimeout(() => { button.textContent = button.dataset.text; }, 1500);
}

async function start() {
  const about = await ask("about");
  const page = new Page(about);
  part("about").textContent =
    `${about.architecture} on ${about.data}, ${about.examples.toLocaleString("en")} examples`;
  part("python").hidden = about.served === false;
  part("views").replaceChildren(...Object.entries(views)
    .filter(([name]) => page.has(name))
    .map(([name, view]) => h("a", { href: `#${name}`, "data-view": name }, view.title)));
  part("link").addEventListener("click", (event) => copy(location.href, event.target));
  part("copy").addEventListener("click", (event) => copy(part("code").textContent, event.target));
  part("save").addEventListener("click", () => save(root, `musigma-${page.name}`));
  addEventListener("hashchange", () => page.route());
  const redraw = () => page.view.update(page.state);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault(); // or the browser would leave the page
    const [file] = event.dataTransfer.files;
    if (file && page.drop) page.drop(file);
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraw();
    width = innerWidth;
  });
  page.route();
  if (about.flat) {
    page.plane = await ask("plane");
    setPlane(page.plane);
    redraw();
  }
}

start().catch((error) => {
  part("error").hidden = false;
  part("error").textContent = error.message;
});
