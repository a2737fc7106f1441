// Where answers come from, on a page without a server: files beside it, and two functions that ONNX
// Runtime Web computes in the browser. They are what `musigma.explore.Explorer` answers.

import * as ort from "./onnxruntime/ort.js";

const beside = (name) => new URL(name, import.meta.url).href;
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { wasm: beside("onnxruntime/ort.wasm") };

const COUNT = 8; // draws that are shown

/** The answer to a question. Throws an Error whose message is for the user. */
export async function ask(name, parameters = {}) {
  const known = await knowledge;
  if (!questions[name]) throw new Error(`${name}: this page has no server that could answer it.`);
  return questions[name](known, parameters);
}

// --- what is known -------------------------------------------------------------------------------

async function fetched(name) {
  const response = await fetch(beside(name));
  if (!response.ok) throw new Error(`The file ${name} is missing beside this page.`);
  return response;
}

async function load() {
  const [known, contents] = await Promise.all([
    fetched("musigma.json").then((response) => response.json()),
    fetched("examples.bin").then((response) => response.arrayBuffer()),
  ]);
  const numbers = new Float32Array(contents);
  const take = (size) => {
    const rows = { size, numbers: numbers.subarray(take.at, take.at + size * known.about.examples) };
    take.at += size * known.about.examples;
    return rows;
  };
  take.at = 0;
  known.x = take(product(known.about.shape));
  known.given = known.context.map(([, shape]) => take(product(shape)));
  const session = async (name) => ort.InferenceSession.create(
    new Uint8Array(await (await fetched(name)).arrayBuffer()));
  known.sessions = { look: await session("look.onnx"), decode: await session("decode.onnx") };
  return known;
}

const knowledge = load();
knowledge.catch(() => {}); // `ask` says it

const product = (sizes) => sizes.reduce((a, b) => a * b, 1);
const row = ({ size, numbers }, i) => numbers.subarray(i * size, (i + 1) * size);

// --- functions -----------------------------------------------------------------------------------

let last = Promise.resolve();

/** Run a function on rows, one run after the other: inputs by name, arrays of n rows. */
function run(known, name, n, values) {
  const inputs = known.inputs[name];
  const feeds = Object.fromEntries(inputs.map((input) =>
    [input.name, new ort.Tensor("float32", values[input.name], [n, ...input.shape])]));
  const next = last.then(() => known.sessions[name].run(feeds));
  last = next.catch(() => {});
  return next;
}

/** Random numbers in [0, 1) of a seed (a 32-bit generator by a counter and a hash of it). */
export function uniforms(seed) {
  let state = (seed * 0x9e3779b1) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

const laws = {
  normal: (random) => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()),
  uniform: (random) => Math.fround(Math.min(random(), 1 - 2 ** -24)),
  exponential: (random) => Math.max(-Math.log(1 - random()), 1e-30),
};

/** The noise of a function for n rows, by the names of its inputs. */
export function noise(inputs, n, seed) {
  const random = uniforms(seed);
  return Object.fromEntries(inputs.filter(({ law }) => law).map(({ name, shape, law }) =>
    [name, Float32Array.from({ length: n * product(shape) }, () => laws[law](random))]));
}

/** Rows one after another. */
function joined(rows) {
  const out = new Float32Array(rows.length * (rows[0]?.length ?? 0));
  rows.forEach((values, i) => out.set(values, i * values.length));
  return out;
}

const repeated = (values, n) => joined(Array(n).fill(values));

/** The context of an example, or that of another class, for n rows. */
function context(known, { index, label }, n) {
  return Object.fromEntries(known.context.map(([name, shape, classes], k) => {
    let values = row(known.given[k], Number(index));
    if (label !== null && label !== undefined && classes && known.about.classes.length) {
      values = Float32Array.from({ length: classes }, (_, i) => Number(i === Number(label)));
    }
    return [known.inputs.decode[k + 1].name, repeated(values, n)];
  }));
}

/** What the model says of an example: rows of each output, which differ in their noise. */
async function look(known, of, n, seed) {
  if (!(of.index >= 0 && of.index < known.about.examples)) {
    throw new Error(`index: expected 0 to ${known.about.examples - 1}; got ${of.index}`);
  }
  const given = context(known, of, n);
  const renamed = Object.fromEntries(Object.values(given).map((values, k) =>
    [known.inputs.look[k + 1].name, values]));
  const outputs = await run(known, "look", n, {
    x: repeated(row(known.x, Number(of.index)), n), ...renamed,
    ...noise(known.inputs.look, n, seed),
  });
  const out = {};
  for (const [name, tensor] of Object.entries(outputs)) {
    const size = tensor.data.length / n;
    out[name] = Array.from({ length: n }, (_, i) => tensor.data.slice(i * size, (i + 1) * size));
  }
  return out;
}

/** Decode rows of whitened latents. */
async function decode(known, of, rows) {
  const given = context(known, of, rows.length);
  const { x } = await run(known, "decode", rows.length, { z: joined(rows), ...given });
  const size = x.data.length / rows.length;
  return rows.map((_, i) => x.data.slice(i * size, (i + 1) * size));
}

// --- how examples are shown ----------------------------------------------------------------------

/** Examples as the drawing code takes them: pixels in base 64, or rows of texts. */
function shown(known, examples) {
  const { about } = known;
  if (about.shape.length === 3) {
    const [all, height, width] = about.shape;
    const channels = all >= 3 ? 3 : 1;
    const top = (known.levels || 256) - 1;
    const images = examples.map((x) => {
      let text = "";
      for (let i = 0; i < height * width; i++) {
        for (let c = 0; c < channels; c++) {
          const level = Math.max(0, Math.min(top, x[c * height * width + i]));
          text += String.fromCharCode(Math.round((level * 255) / top));
        }
      }
      return btoa(text);
    });
    return { height, width, channels, images };
  }
  const rows = examples.map((x) => [...x.subarray(0, known.columns)]
    .map((v) => String(Number(v.toPrecision(4)))));
  return {
    names: about.columns.slice(0, known.columns), rows, columns: about.columns.length,
    ...(about.flat ? { points: examples.map((x) => [...x]) } : {}),
  };
}

const pairs = (text) => (text ?? "").split(",").filter(Boolean)
  .map((word) => word.split(":").map(Number));

/** Latents with some elements set. */
function changed(z, set) {
  const out = z.slice();
  for (const [place, value] of pairs(set)) out[place] = value;
  return out;
}

// --- questions -----------------------------------------------------------------------------------

async function one(known, { seed = 0, temperature = 1, set = "", ...of }) {
  const looked = await look(known, of, COUNT, Number(seed) + 1);
  const [mean, std, cost, center] = ["mean", "std", "cost", "center"].map((k) => looked[k][0]);
  const drawn = looked.drawn.map((z) =>
    z.map((value, i) => center[i] + Number(temperature) * (value - center[i])));
  const rows = [center, changed(center, set), ...drawn.map((z) => changed(z, set))];
  const [again, follows, ...draws] = await decode(known, of, rows);
  const order = [...cost.keys()].sort((a, b) => cost[b] - cost[a]).slice(0, known.shown);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const nats = looked.nats[0][0];
  return {
    ...known.examples[of.index],
    input: shown(known, [row(known.x, Number(of.index))]),
    reconstruction: shown(known, [again]),
    follows: shown(known, [follows]),
    draws: shown(known, draws),
    nats,
    bits_per_dim: nats / (product(known.about.shape) * Math.LN2),
    bound: known.bound,
    cost: sum([...cost]),
    latents: order.map((i) => ({
      place: i, name: known.names[i], mean: mean[i], std: std[i], cost: cost[i],
      draws: drawn.map((z) => z[i]),
    })),
    python: "",
  };
}

async function decoded(known, { start = "prior", set = "", move = "", along = null, ...of }) {
  let z = start === "example" ? (await look(known, of, 1, 1)).center[0]
    : new Float32Array(known.about.dims);
  for (const [k, value] of pairs(move)) z = z.map((v, i) => v + value * known.steps[k][i]);
  z = changed(z, set);
  const strip = along === null ? [] : known.along.map((value) => {
    const other = z.slice();
    other[along] = value;
    return other;
  });
  const [picture, ...others] = await decode(known, of, [z, ...strip]);
  return {
    picture: shown(known, [picture]),
    ...(strip.length ? { strip: shown(known, others), steps: known.along } : {}),
    values: Object.fromEntries(known.top.map((i) => [i, z[i]])),
    python: "",
  };
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/** The two directions of the map. */
function directions(known, axes) {
  if (axes === "components") return known.axes;
  return axes.split(",").map((place) =>
    Array.from({ length: known.about.dims }, (_, i) => Number(i === Number(place))));
}

async function at(known, { places, axes = "components", ...of }) {
  const along = directions(known, axes);
  const origin = along.map((axis) => dot(axis, known.middle));
  const rows = places.split(";").map((pair) => pair.split(",").map(Number)).map((place) =>
    Float32Array.from(known.middle, (value, i) => value
      + (place[0] - origin[0]) * along[0][i] + (place[1] - origin[1]) * along[1][i]));
  return { pictures: shown(known, await decode(known, of, rows)), python: "" };
}

async function hover(known, { axes = "components", ...of }) {
  const { std: [std], center: [center] } = await look(known, of, 1, 1);
  const along = directions(known, axes);
  const roots = along.map((axis) => axis.map((value, i) => value * std[i]));
  return {
    ...known.examples[of.index],
    input: shown(known, [row(known.x, Number(of.index))]),
    place: along.map((axis) => dot(axis, center)),
    covariance: std.some((value) => value > 0)
      ? roots.map((a) => roots.map((b) => dot(a, b))) : null,
  };
}

function map(known, { axes = "components", color = "score", first = 0 }) {
  const pair = axes === "components" ? [0, 1]
    : axes.split(",").map((place) => 2 + known.top.indexOf(Number(place)));
  const [values, names] = known.map.colors[color];
  const { rows } = known.map;
  const total = rows.length;
  const [x, y] = pair.map((k) => known.map.places[k].slice(first));
  return {
    first, done: total, total, error: "", x, y, names, colored: color,
    index: rows.slice(first),
    color: values.slice(first),
    axes: axes === "components" ? ["component 1", "component 2"]
      : axes.split(",").map((place) => known.names[place]),
  };
}

const questions = {
  about: (known) => known.about,
  order: (known) => known.order,
  plane: (known) => known.plane,
  one, decode: decoded, at, hover, map,
};
