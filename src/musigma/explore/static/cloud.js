// Many dots: a window of the plane, and its picture, drawn into the pixels of a canvas.

import { parts } from "./draw.js";
import { color } from "./dom.js";

const MARGIN = 12; // CSS pixels around the window

/** The part of a plane that a canvas shows. */
export class Window {
  constructor() {
    [this.left, this.right, this.low, this.high] = [-1, 1, -1, 1];
    this.size = { width: 1, height: 1 };
  }

  get box() { return [this.left, this.right, this.low, this.high]; }

  set box(ends) { [this.left, this.right, this.low, this.high] = ends; }

  px(x) { return MARGIN + ((x - this.left) / (this.right - this.left)) * (this.size.width - 2 * MARGIN); }

  py(y) {
    const { height } = this.size;
    return height - MARGIN - ((y - this.low) / (this.high - this.low)) * (height - 2 * MARGIN);
  }

  /** The place of the plane under a pixel. */
  back([left, top]) {
    const { width, height } = this.size;
    return [
      this.left + ((left - MARGIN) / (width - 2 * MARGIN)) * (this.right - this.left),
      this.low + ((height - MARGIN - top) / (height - 2 * MARGIN)) * (this.high - this.low)];
  }

  /** Move by pixels. */
  pan(dx, dy) {
    const { width, height } = this.size;
    const [x, y] = [(dx / (width - 2 * MARGIN)) * (this.right - this.left),
      (dy / (height - 2 * MARGIN)) * (this.high - this.low)];
    this.box = [this.left - x, this.right - x, this.low + y, this.high + y];
  }

  /** Show more or less around a pixel, which stays where it is. */
  zoom(factor, at) {
    const [x, y] = this.back(at);
    const scaled = [x + (this.left - x) / factor, x + (this.right - x) / factor,
      y + (this.low - y) / factor, y + (this.high - y) / factor];
    if (scaled[1] - scaled[0] > 1e-6 && scaled[1] - scaled[0] < 1e6) this.box = scaled;
  }

  /** Show all points but the farthest. */
  fit(xs, ys) {
    const ends = (values) => {
      const sorted = Float32Array.from(values).sort();
      const at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
      const margin = 0.15 * (at(0.995) - at(0.005)) || 1;
      return [at(0.005) - margin, at(0.995) + margin];
    };
    this.box = [...ends(xs), ...ends(ys)];
  }
}

/** A table of colors for `paint`. */
export const palette = (inks) => inks.map((ink) => parts(ink));

/** Coverage of a dot's pixels, from its center. */
function stamp(radius) {
  const out = [];
  const reach = Math.ceil(radius);
  for (let j = -reach; j <= reach; j++) {
    for (let i = -reach; i <= reach; i++) {
      const cover = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(i, j)));
      if (cover > 0) out.push([i, j, cover]);
    }
  }
  return out;
}

/**
 * Draw dots into a canvas of the window's size. `inks` are numbers of colors in the palette.
 * Fifty thousand dots are half a million pixels, which takes a few milliseconds.
 */
export function paint(canvas, window_, { xs, ys, inks }, colors) {
  const density = window.devicePixelRatio || 1;
  const width = Math.round(window_.size.width * density);
  const height = Math.round(window_.size.height * density);
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const { data } = image;
  const card = parts(color("card"));
  new Uint32Array(data.buffer).fill(
    ((255 << 24) | (card[2] << 16) | (card[1] << 8) | card[0]) >>> 0);
  const many = xs.length > 5000;
  const marks = stamp((many ? 1.1 : 2.4) * density);
  const strength = many ? 0.6 : 0.85;
  const reach = Math.max(...marks.map(([i]) => i));
  for (let k = 0; k < xs.length; k++) {
    const x = Math.round(window_.px(xs[k]) * density);
    const y = Math.round(window_.py(ys[k]) * density);
    if (x < reach || y < reach || x >= width - reach || y >= height - reach) continue;
    const ink = colors[inks[k]];
    for (const [i, j, cover] of marks) {
      const at = 4 * ((y + j) * width + x + i);
      const alpha = strength * cover;
      data[at] += (ink[0] - data[at]) * alpha;
      data[at + 1] += (ink[1] - data[at + 1]) * alpha;
      data[at + 2] += (ink[2] - data[at + 2]) * alpha;
    }
  }
  context.putImageData(image, 0, 0);
}
