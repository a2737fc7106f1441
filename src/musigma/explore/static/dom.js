// Elements of the page: built by functions, with the names and labels that assistive tools read.

/** An element; attributes that begin with "on" are listeners, null ones are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace the children of an element; if one of its buttons has the focus, the new one gets it. */
export function refill(root, ...children) {
  const at = [...root.querySelectorAll("button")].indexOf(document.activeElement);
  root.replaceChildren(...children);
  root.querySelectorAll("button")[at]?.focus();
}

export const button = (text, onclick, attributes = {}) =>
  h("button", { type: "button", onclick, ...attributes }, text);

/** A labeled control. */
export const field = (text, control) => h("label", { class: "field" }, h("span", {}, text), control);

/** A choice of texts, or of [value, text]. */
export function choice(options, value, onchange, attributes = {}) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const select = h("select", { onchange: () => onchange(select.value), ...attributes },
    pairs.map(([key, text]) => h("option", { value: key }, text)));
  select.value = value;
  return select;
}

export function slider(label, low, high, step, value, oninput, onchange = null) {
  const input = h("input", {
    type: "range", min: low, max: high, step, "aria-label": label,
    oninput: () => oninput(Number(input.value)),
    onchange: onchange && (() => onchange(Number(input.value))),
  });
  input.value = value;
  return input;
}

/** A number with a true minus sign, short. */
export function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const small = value !== 0 && Math.abs(value) < 10 ** -digits;
  const text = small ? value.toPrecision(2) : value.toFixed(digits);
  return text.replace("-", "\u2212");
}

/** A color of the style sheet. */
export const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Prepare a canvas of a size in CSS pixels, sharp on any screen; returns its context. */
export function sharp(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  return context;
}
