"use strict";

// RMSprop of optax_rmsprop, torch, Keras and optax, restated for a point in the plane.
// Nothing here touches a page: tests/docs/test_explorer.py runs this file by itself.
//
// Every operation is rounded by `f`, which is Math.fround: NaN and overflow then come
// where float32 has them. With FLOAT64 nothing is rounded, so that a test can tell a
// wrong formula from a rounding error.

const MAX32 = (2 - 2 ** -23) * 2 ** 127;
const FLOAT32 = {
  f: Math.fround,
  tiny: 2 ** -116,
  smallest: 2 ** -126,
  largest: Math.sqrt(MAX32) / 2,
};
const FLOAT64 = {
  f: (x) => x,
  tiny: 2 ** -1012,
  smallest: 2 ** -1022,
  largest: Math.sqrt(Number.MAX_VALUE) / 2,
};

const DEFAULTS = {
  learning_rate: 0.01,
  decay: 0.99,
  eps: 1e-8,
  momentum: 0,
  nesterov: false,
  centered: false,
  weight_decay: 0,
  decoupled_weight_decay: false,
  initial_scale: 0,
  eps_in_sqrt: false,
  lr_in_momentum: false,
  bias_correction: false,
};

// What the page adds to the arguments of rmsprop.
const SCENE = { surface: "valley", steps: 200, schedule: "constant" };

// Sliders: `log` runs over decades and has 0 at its left end where `zero` says so;
// `complement` runs over the decades of 1 - x.
const SLIDERS = {
  learning_rate: { scale: "log", low: -7, high: 0, end: Infinity, zero: true },
  decay: { scale: "complement", low: 0, high: 4, end: 1 },
  eps: { scale: "log", low: -12, high: 0, end: Infinity, zero: true },
  momentum: { scale: "complement", low: 0, high: 3, end: 1 },
  weight_decay: { scale: "log", low: -6, high: 0, end: Infinity, zero: true },
  initial_scale: { scale: "log", low: -8, high: 2, end: Infinity, zero: true },
  steps: { scale: "log", low: 1, high: 3.5, end: 3201, integer: true },
};
const STOPS_A_DECADE = 20;

const PRESETS = {
  apart: {
    learning_rate: 0.03,
    decay: 0.9,
    eps: 0.5,
    momentum: 0.9,
    bias_correction: true,
  },
  torch: {},
  keras: {
    learning_rate: 0.001,
    decay: 0.9,
    eps: 1e-7,
    eps_in_sqrt: true,
    lr_in_momentum: true,
  },
  dqn: {
    learning_rate: 2.5e-4,
    decay: 0.95,
    eps: 0.01,
    eps_in_sqrt: true,
    centered: true,
    surface: "noisy",
    steps: 1000,
  },
  efficientnet: {
    learning_rate: 0.016,
    decay: 0.9,
    eps: 0.001,
    momentum: 0.9,
    initial_scale: 1,
    eps_in_sqrt: true,
    lr_in_momentum: true,
  },
  steady: {
    learning_rate: 1e-6,
    decay: 0.9,
    centered: true,
    surface: "slope",
    steps: 400,
  },
  plateau: { learning_rate: 0.01, decay: 0.9, surface: "plateau", steps: 400 },
  late: {
    learning_rate: 0.03,
    decay: 0.9,
    eps: 0.001,
    momentum: 0.9,
    surface: "noisy",
    steps: 100,
    schedule: "drop",
  },
};

const PLAIN = { ...DEFAULTS, ...SCENE };
// Where the page begins, and what an empty address stands for.
const START = { ...PLAIN, ...PRESETS.apart };

function toPosition(name, value) {
  const { scale, low, high, zero } = SLIDERS[name];
  if (zero && value === 0) return low * STOPS_A_DECADE - 1;
  const decades = scale === "log" ? Math.log10(value) : -Math.log10(1 - value);
  const held = Math.min(Math.max(decades, low), high);
  return Math.round(held * STOPS_A_DECADE);
}

function fromPosition(name, position) {
  const { scale, low, zero, integer } = SLIDERS[name];
  if (zero && position < low * STOPS_A_DECADE) return 0;
  const decades = position / STOPS_A_DECADE;
  if (integer) return Math.round(Number((10 ** decades).toPrecision(2)));
  if (scale === "log") return Number((10 ** decades).toPrecision(2));
  const rest = Number((10 ** -decades).toPrecision(2));
  return Number((1 - rest).toPrecision(12));
}

// Whether rmsprop, or this page, takes a number. Beyond float32 it does not.
function isAllowed(name, value) {
  const { low, end, integer } = SLIDERS[name];
  const bottom = integer ? 10 ** low : 0;
  const whole = !integer || Number.isInteger(value);
  return value >= bottom && value < end && value <= MAX32 && whole;
}

// The combination that rmsprop refuses, or null.
function refusal(s) {
  if (s.nesterov && s.momentum === 0) return "nesterov";
  if (s.centered && s.decay === 0) return "decay";
  if (s.bias_correction && s.initial_scale !== 0) return "initial_scale";
  return null;
}

// 0.000001 is hard to read: 1e-6.
function plain(x) {
  return x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential() : String(x);
}

function pythonCall(s) {
  const python = (x) => (x === true ? "True" : x === false ? "False" : plain(x));
  const values = {};
  if (s.schedule === "drop") {
    const rate = `${plain(s.learning_rate)}, {${Math.floor(s.steps / 2)}: 0.1}`;
    values.learning_rate = `optax.piecewise_constant_schedule(${rate})`;
  }
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    if (s[name] !== usual) values[name] ??= python(s[name]);
  }
  const named = Object.entries(values).map(([name, value]) => `${name}=${value}`);
  const raises = refusal(s) ? "# raises ValueError\n" : "";
  const line = `rmsprop(${named.join(", ")})`;
  if (line.length <= 44) return raises + line;
  return `${raises}rmsprop(\n${named.map((text) => `    ${text},\n`).join("")})`;
}

function toHash(s) {
  const given = Object.keys(PLAIN).filter((name) => s[name] !== PLAIN[name]);
  if (!given.length) given.push("learning_rate"); // an empty address is START
  const text = (x) => (typeof x === "number" ? plain(x) : x);
  return given.map((name) => `${name}=${text(s[name])}`).join("&");
}

function decoded(text) {
  try {
    return decodeURIComponent(text).trim();
  } catch {
    return text; // a percent sign that begins no escape
  }
}

// The value that a text stands for, or null.
function valueOf(name, text) {
  const among = (values) => (values.includes(text) ? text : null);
  if (name === "surface") return among(Object.keys(SURFACES));
  if (name === "schedule") return among(["constant", "drop"]);
  if (name in SLIDERS) return text && isAllowed(name, Number(text)) ? Number(text) : null;
  return among(["true", "false"]) && text === "true";
}

// What is not understood, or not allowed, stays at its default and is named.
function fromHash(hash) {
  const parts = hash.replace(/^#/, "").split("&").filter(Boolean);
  const settings = { ...(parts.length ? PLAIN : START) };
  const ignored = new Set();
  for (const part of parts) {
    const [name, text = ""] = part.split("=").map(decoded);
    const value = Object.hasOwn(settings, name) ? valueOf(name, text) : null;
    if (value === null) ignored.add((name || part).slice(0, 40));
    else settings[name] = value;
  }
  return { settings, ignored: [...ignored] };
}

// `view` is [left, right, bottom, top]; `noise` the standard deviation of what is added
// to either coordinate of the gradient.
const SURFACES = {
  valley: {
    loss: (x, y) => 0.5 * x * x + 25 * y * y,
    gradient: (x, y) => [x, 50 * y],
    start: [-2, 1],
    view: [-2.4, 0.9, -1.15, 1.25],
    lowest: [0, 0],
  },
  saddle: {
    loss: (x, y) => 0.5 * x * x - 0.5 * y * y + 0.25 * y ** 4,
    gradient: (x, y) => [x, y ** 3 - y],
    start: [-1.7, 0.002],
    view: [-2, 1.2, -1.2, 1.2],
    lowest: [0, 1],
  },
  rosenbrock: {
    loss: (x, y) => (1 - x) ** 2 + 100 * (y - x * x) ** 2,
    gradient: (x, y) => [
      -2 * (1 - x) - 400 * x * (y - x * x),
      200 * (y - x * x),
    ],
    start: [-1.2, 1],
    view: [-1.8, 1.8, -0.7, 2],
    lowest: [1, 1],
  },
  noisy: {
    loss: (x, y) => 0.5 * x * x + 2 * y * y,
    gradient: (x, y) => [x, 4 * y],
    start: [-2, 1],
    view: [-2.5, 1.1, -1.3, 1.4],
    lowest: [0, 0],
    noise: 1,
  },
  plateau: {
    loss: (x, y) => 1 - Math.exp(-1.5 * (x * x + y * y)),
    gradient: (x, y) => {
      const slope = 3 * Math.exp(-1.5 * (x * x + y * y));
      return [slope * x, slope * y];
    },
    start: [-2.5, -1.3],
    view: [-3, 1.4, -1.8, 1.5],
    lowest: [0, 0],
  },
  slope: {
    loss: (x, y) => x + 0.4 * y,
    gradient: () => [1, 0.4],
    start: [2.4, 1.2],
    view: [-3, 3, -2.3, 2.2],
    lowest: null,
    noise: 1e-4,
  },
};

// One of two independent integers made of a step and a coordinate, in (0, 1).
function uniform(step, which) {
  let h = Math.imul(step + 1, 0x9e3779b1) ^ Math.imul(which + 1, 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 16), 0x21f0aaad);
  h = Math.imul(h ^ (h >>> 15), 0x735a2d97);
  return ((h ^ (h >>> 15)) >>> 0) / 2 ** 32 + 2 ** -33;
}

// The same for every optimizer: normal, by Box and Muller.
function noiseAt(step) {
  const radius = Math.sqrt(-2 * Math.log(uniform(step, 0)));
  const angle = 2 * Math.PI * uniform(step, 1);
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
}

function gradientAt(surface, p, step, f) {
  const exact = surface.gradient(p[0], p[1]);
  if (!surface.noise) return exact.map(f);
  const noise = noiseAt(step);
  return exact.map((g, i) => f(g + surface.noise * noise[i]));
}

// Each makes a function that moves one coordinate c = {p, v, m, b} by one step, and
// notes `denominator` and what stands `under` its root.

// transforms.py: d and a = 1 - d, the weights of the old average and of the new value.
function averagingWeights(s, t, f) {
  if (!s.bias_correction) return [f(s.decay), f(1 - s.decay)];
  const a = f(1 - s.decay);
  const total = t === 1 ? a : f(-f(Math.expm1(f(t * f(Math.log1p(-a))))));
  const corrected = f(a / total);
  return [f(1 - corrected), corrected];
}

function ours(s, { f, tiny, smallest, largest }) {
  const eps = f(s.eps);
  const momentum = f(s.momentum);
  const weight_decay = f(s.weight_decay);
  const limit = f(largest);
  const clip = (x) => (x > limit ? limit : x < -limit ? -limit : x);
  const cap = (square, fraction) => {
    const most = f(f(largest * largest) * fraction);
    return square > most ? most : square;
  };

  return (c, gradient, lr, t) => {
    const [d, a] = averagingWeights(s, t, f);
    let g = gradient;
    if (weight_decay && !s.decoupled_weight_decay) g = f(g + f(weight_decay * c.p));

    if (s.centered) {
      c.m = f(f(d * c.m) + clip(f(a * g)));
      const deviation = f(g - c.m);
      const above_0 = d > smallest ? d : 1;
      const square = cap(f(deviation * deviation), above_0);
      c.v = f(f(d * c.v) + f(f(a / above_0) * square));
    } else {
      c.v = f(f(d * c.v) + f(a * cap(f(g * g), 1)));
    }

    const above_0 = f(tiny + f(0 * g)); // NaN where g is infinite
    c.under = s.eps_in_sqrt ? f(c.v + f(eps + above_0)) : f(c.v + above_0);
    c.denominator = f(Math.sqrt(c.under));
    if (!s.eps_in_sqrt) c.denominator = f(c.denominator + eps);

    let u = f(clip(g) / c.denominator);
    if (s.lr_in_momentum) u = f(lr * u);
    if (momentum) {
      c.b = f(u + f(momentum * c.b));
      u = s.nesterov ? f(u + f(momentum * c.b)) : c.b;
    }
    if (weight_decay && s.decoupled_weight_decay) {
      const rate = s.lr_in_momentum ? f(weight_decay * lr) : weight_decay;
      u = f(u + f(rate * c.p));
    }
    c.p = f(c.p - (s.lr_in_momentum ? u : f(lr * u)));
  };
}

// torch/optim/rmsprop.py (2.13.0), _single_tensor_rmsprop.
function torch(s, { f }) {
  const eps = f(s.eps);
  const momentum = f(s.momentum);
  const weight_decay = f(s.weight_decay);
  const alpha = f(s.decay);
  const rest = f(1 - s.decay);

  return (c, gradient, lr) => {
    const g = weight_decay ? f(gradient + f(weight_decay * c.p)) : gradient;
    c.v = f(f(alpha * c.v) + f(f(rest * g) * g));
    c.under = c.v;
    if (s.centered) {
      // lerp_, which has one formula for weights below 1/2 and one for the others
      const way = f(g - c.m);
      c.m = rest < 0.5 ? f(c.m + f(rest * way)) : f(g - f(way * f(1 - rest)));
      c.under = f(c.v - f(c.m * c.m));
    }
    c.denominator = f(f(Math.sqrt(c.under)) + eps);
    if (momentum) {
      c.b = f(f(momentum * c.b) + f(g / c.denominator));
      c.p = f(c.p - f(lr * c.b));
    } else {
      c.p = f(c.p - f(f(lr * g) / c.denominator));
    }
  };
}

// keras/src/optimizers/rmsprop.py (3.15.1).
function keras(s, { f }) {
  const epsilon = f(s.eps);
  const momentum = f(s.momentum);
  const weight_decay = f(s.weight_decay);
  const rho = f(s.decay);
  const rest = f(1 - s.decay);

  return (c, g, lr) => {
    if (weight_decay) c.p = f(c.p - f(f(c.p * weight_decay) * lr));
    c.v = f(f(rho * c.v) + f(rest * f(g * g)));
    if (s.centered) {
      c.m = f(f(rho * c.m) + f(rest * g));
      c.under = f(f(c.v - f(c.m * c.m)) + epsilon);
    } else {
      c.under = f(c.v + epsilon);
    }
    c.denominator = f(Math.sqrt(c.under));
    const increment = f(f(lr * g) / c.denominator);
    if (momentum) {
      c.b = f(f(momentum * c.b) + increment);
      c.p = f(c.p - c.b);
    } else {
      c.p = f(c.p - increment);
    }
  };
}

// optax (0.2.8) rmsprop: scale_by_rms or scale_by_stddev, scale, trace. Its default has
// eps under the root, whatever ours is set to.
function optax(s, { f }) {
  const eps = f(s.eps);
  const momentum = f(s.momentum);
  const decay = f(s.decay);
  const rest = f(1 - s.decay);

  return (c, g, lr, t) => {
    const corrected = (moment) =>
      s.bias_correction ? f(moment / f(1 - f(decay ** t))) : moment;
    c.v = f(f(rest * f(g * g)) + f(decay * c.v));
    if (s.centered) {
      c.m = f(f(rest * g) + f(decay * c.m));
      const mean = corrected(c.m);
      c.under = f(f(corrected(c.v) - f(mean * mean)) + eps);
    } else {
      c.under = f(corrected(c.v) + eps);
    }
    c.denominator = f(Math.sqrt(c.under));
    let u = f(-lr * f(f(1 / c.denominator) * g));
    if (momentum) {
      c.b = f(u + f(momentum * c.b));
      u = s.nesterov ? f(u + f(momentum * c.b)) : c.b;
    }
    c.p = f(c.p + u);
  };
}

const UPDATES = { ours, torch, keras, optax };

// What of ours each of them is fixed to. Everything else it has too.
const FIXED = {
  torch: {
    eps_in_sqrt: false,
    lr_in_momentum: false,
    nesterov: false,
    initial_scale: 0,
    bias_correction: false,
    decoupled_weight_decay: false,
  },
  keras: {
    eps_in_sqrt: true,
    lr_in_momentum: true,
    nesterov: false,
    initial_scale: 0,
    bias_correction: false,
    decoupled_weight_decay: true,
  },
  optax: { eps_in_sqrt: true, lr_in_momentum: true, weight_decay: 0 },
};

function learningRate(s, t, f) {
  const dropped = s.schedule === "drop" && t > Math.floor(s.steps / 2);
  return dropped ? f(f(s.learning_rate) * f(0.1)) : f(s.learning_rate);
}

// points[t] is the point after t steps; rates[t], and gradients[t] and states[t] for who
// asks to record them, belong to step t + 1. The run ends where a coordinate is not
// finite: `end` says at which step, where and why. `overflow` is the first step with an
// infinite average.
function run(name, s, type = FLOAT32, record = false) {
  const { f } = type;
  const surface = SURFACES[s.surface];
  const starts = { ours: s.initial_scale, optax: s.initial_scale, torch: 0, keras: 0 };
  const update = UPDATES[name](s, type);
  const slots = surface.start.map((x) => ({ p: f(x), v: f(starts[name]), m: 0, b: 0 }));
  const path = { points: [slots.map((c) => c.p)], rates: [], end: null, overflow: null };
  path.losses = [surface.loss(...path.points[0])];
  if (record) [path.gradients, path.states] = [[], []];
  for (let t = 1; t <= s.steps; t++) {
    const lr = learningRate(s, t, f);
    const p = slots.map((c) => c.p);
    const gradient = gradientAt(surface, p, t, f);
    slots.forEach((c, i) => update(c, gradient[i], lr, t));
    const bad = slots.findIndex((c) => !Number.isFinite(c.p));
    if (bad >= 0) {
      path.end = { step: t, axis: bad, why: whyNotFinite(slots[bad], gradient[bad]) };
      return path;
    }
    if (slots.some((c) => c.v === Infinity)) path.overflow ??= t;
    if (record) {
      path.gradients.push(gradient);
      path.states.push(slots.map((c) => [c.v, c.m, c.b]));
    }
    path.rates.push(slots.map((c) => f(lr / c.denominator)));
    path.points.push(slots.map((c) => c.p));
    path.losses.push(surface.loss(...path.points[t]));
  }
  return path;
}

function whyNotFinite(c, g) {
  if (!Number.isFinite(g)) return "gradient";
  if (c.under < 0) return "negative";
  if (c.v === Infinity) return "square";
  if (c.denominator === 0) return "zero";
  return "parameter";
}

// The longest way of the first path from its start, in either coordinate.
function reach(path) {
  const far = (p) => Math.max(...p.map((x, i) => Math.abs(x - path.points[0][i])));
  return path.points.reduce((most, p) => Math.max(most, far(p)), 1e-30);
}

// The largest distance of two paths, and the first step at which it is above `most`.
function apart(path, other, most) {
  let [largest, step] = [0, null];
  const length = Math.min(path.points.length, other.points.length);
  for (let t = 0; t < length; t++) {
    const [p, q] = [path.points[t], other.points[t]];
    const distance = Math.max(...p.map((x, i) => Math.abs(x - q[i])));
    largest = Math.max(largest, distance);
    if (step === null && distance > most) step = t;
  }
  if (step === null && path.points.length !== other.points.length) step = length;
  return { largest, step };
}

const VISIBLE = 0.01; // of the way: from there on two paths count as different

// One framework beside ours. Its reasons are found by trying: each option in which it
// differs is changed in ours alone, and named if that parts the paths. `tried` keeps
// these runs, which the frameworks share.
function compare(name, s, ourPath, path, tried = {}) {
  if (path.end) return { kind: "end", ...path.end };
  if (ourPath.end) return { kind: "alone" };
  const way = Math.max(reach(ourPath), reach(path));
  const { largest, step } = apart(ourPath, path, VISIBLE * way);
  if (step === null) return { kind: "same", difference: largest / way };

  const changed = Object.keys(FIXED[name]).filter(
    (key) => FIXED[name][key] !== s[key],
  );
  const effects = changed.map((key) => {
    const other = (tried[`${key}:${FIXED[name][key]}`] ??= run("ours", {
      ...s,
      [key]: FIXED[name][key],
    }));
    return { key, ...apart(ourPath, other, VISIBLE * way) };
  });
  const reasons = effects
    .filter((effect) => effect.step !== null)
    .sort((a, b) => b.largest - a.largest)
    .map(({ key }) => `${key}:${FIXED[name][key]}`);
  // Where ours with all of its options still parts from it, rounding is to blame.
  const twin = run("ours", { ...s, ...FIXED[name] });
  if (apart(twin, path, VISIBLE * way).step !== null) {
    const rounding = s.centered ? "subtraction" : "rounding";
    reasons.push(path.overflow === null ? rounding : "overflow");
  }
  if (!reasons.length) reasons.push("together");
  return { kind: "differs", step, difference: largest / way, reasons };
}
