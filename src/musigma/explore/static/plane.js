// Data of two dimensions: points over the data and the density of the model.

import { color, h, sharp } from "./dom.js";

let background = null; // the answer `plane` of the server

/** Keep the density, the data and the draws that points are shown over. */
export const setPlane = (answer) => { background = answer; };

const INKS = ["ink", "accent", "blue"];

/** A picture of points (x, y) over the density; few with captions have colors of their own. */
export function scatter(set, captions, { dots = "data", size = 320 } = {}) {
  const canvas = h("canvas", { class: "plane", role: "img", "aria-label":
    `${set.points.length} points: ${set.points.slice(0, 8)
      .map((point) => point.map((v) => v.toPrecision(3)).join(", ")).join("; ")}` });
  const path = captions.length > INKS.length;
  const box = background?.box ?? around(set.points);
  const context = sharp(canvas, size, size);
  const px = (x) => ((x - box[0]) / (box[1] - box[0])) * size;
  const py = (y) => size - ((y - box[2]) / (box[3] - box[2])) * size;
  if (background) {
    context.drawImage(landscape(), 0, 0, size, size);
    context.fillStyle = color("muted");
    context.globalAlpha = 0.5;
    for (const [x, y] of background[dots]) context.fillRect(px(x) - 1, py(y) - 1, 2, 2);
    context.globalAlpha = 1;
  }
  if (path) {
    context.strokeStyle = color("accent");
    context.beginPath();
    for (const [x, y] of set.points) context.lineTo(px(x), py(y));
    context.stroke();
  }
  set.points.forEach(([x, y], i) => {
    context.fillStyle = color(captions.length && !path ? INKS[i] : "accent");
    context.beginPath();
    context.arc(px(x), py(y), captions.length ? 6 - 1.5 * Math.min(i, 2) : 3, 0, 7);
    context.fill();
    if (path) context.fillText(captions[i], px(x) + 8, py(y) + 4);
  });
  context.fillStyle = color("muted");
  context.font = "12px system-ui, sans-serif";
  context.fillText(`\u2191 ${set.names[1]}`, 6, 14);
  context.textAlign = "right";
  context.fillText(`${set.names[0]} \u2192`, size - 6, size - 6);
  const named = path ? [] : captions.map((text, i) => [text, i]).filter(([text]) => text);
  return h("figure", {}, canvas, named.length ? h("figcaption", {}, named.map(([text, i]) =>
    h("span", { class: "key" }, h("i", { class: `dot ${INKS[i]}` }),
      ` ${text}: ${set.points[i].map((v) => v.toPrecision(3)).join(", ")}`))) : null);
}

/** The data and the draws of the model, each over its density. */
export function overview() {
  const empty = { points: [], names: background.names };
  return h("div", { class: "pictures" }, [
    ["data", `${background.data.length.toLocaleString("en")} examples of the data`],
    ["samples", `${background.samples.length.toLocaleString("en")} draws of the model`],
  ].map(([dots, text]) => {
    const figure = scatter(empty, [], { dots });
    figure.querySelector("canvas").setAttribute("aria-label", text);
    figure.append(h("figcaption", {}, text));
    return figure;
  }));
}

/** The density as an image: the more probable, the more of the color. */
function landscape() {
  const { side, log_p: values } = background;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const out = new ImageData(side, side);
  const most = Math.max(...values.filter(Number.isFinite));
  const [r, g, b] = color("blue").match(/\w\w/g).map((pair) => parseInt(pair, 16));
  values.forEach((value, i) => {
    const at = 4 * ((side - 1 - Math.floor(i / side)) * side + (i % side));
    out.data.set([r, g, b, 150 * Math.exp(0.5 * ((value ?? -Infinity) - most))], at);
  });
  canvas.getContext("2d").putImageData(out, 0, 0);
  return canvas;
}

function around(points) {
  const ends = (j) => {
    const values = points.map((point) => point[j]);
    const [low, high] = [Math.min(...values, -1), Math.max(...values, 1)];
    return [low - 1, high + 1];
  };
  return [...ends(0), ...ends(1)];
}
