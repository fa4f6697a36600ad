// The page: what explorer.js computes, drawn and said.

const LABELS = JSON.parse(document.getElementById("labels").textContent);
const NAMES = ["ours", "torch", "keras", "optax"];
const GROUPS = {
  step: ["learning_rate", "schedule", "steps"],
  average: [
    "decay",
    "eps",
    "eps_in_sqrt",
    "centered",
    "initial_scale",
    "bias_correction",
  ],
  momentum: ["momentum", "nesterov", "lr_in_momentum"],
  decay: ["weight_decay", "decoupled_weight_decay"],
};
const FORMULAS = {
  ours: "var",
  torch: "square_avg − grad_avg²",
  keras: "velocity − average_gradient² + epsilon",
  optax: "nu − mu² + eps",
};
const CHOICES = { schedule: ["constant", "drop"] };

const page = {
  language: "en",
  ...fromHash(location.hash), // settings, and ignored: the names it could not take
  shown: new Set(NAMES),
  look: null, // a step, or null for the last
  paths: {},
  verdicts: {},
};

const $ = (id) => document.getElementById(id);

function fill(parent, tag, attributes = {}, ...children) {
  const svg = parent.namespaceURI.endsWith("svg") || tag === "svg";
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  node.append(...children);
  parent.append(node);
  return node;
}

function say(key, values = {}) {
  const text = LABELS[page.language][key];
  return text.replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);
}

// Three digits, with a true minus.
function brief(x) {
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return String(x).replace("-", "−");
  const small = Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5;
  const text = small ? x.toExponential(1) : String(Number(x.toPrecision(3)));
  return text.replace(".0e", "e").replace("e+", "e").replaceAll("-", "−");
}

function buildControls() {
  for (const id of ["preset", "surface"]) {
    const names = id === "preset" ? ["own", ...Object.keys(PRESETS)] : SURFACES;
    for (const name of Array.isArray(names) ? names : Object.keys(names)) {
      fill($(id), "option", { value: name, "data-label": `${id}.${name}` });
    }
  }
  for (const [group, names] of Object.entries(GROUPS)) {
    const set = fill($("controls"), "fieldset");
    fill(set, "legend", { "data-label": `group.${group}` });
    for (const name of names) {
      if (name in SLIDERS) buildSlider(set, name);
      else if (name in CHOICES) buildChoice(set, name);
      else buildCheck(set, name);
    }
  }
  const list = $("implementations");
  for (const name of NAMES) {
    const item = fill(list, "li");
    const label = fill(item, "label");
    const box = fill(label, "input", { type: "checkbox", id: `show-${name}` });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) page.shown.add(name);
      else page.shown.delete(name);
      draw();
    });
    const swatch = fill(label, "svg", { class: "swatch", "aria-hidden": "true" });
    fill(swatch, "path", { class: `curve ${name}`, d: "M2 7H32" });
    fill(label, "strong", { "data-label": `name.${name}` });
    fill(item, "span", { class: "where", id: `where-${name}` });
    fill(item, "span", { class: "why", id: `why-${name}` });
  }
}

function parameterName(parent, name) {
  fill(parent, "span", { "data-label": name });
  if (name in DEFAULTS) parent.append(" "), fill(parent, "code", {}, name);
}

function buildSlider(set, name) {
  const { low, high, zero } = SLIDERS[name];
  const control = fill(set, "div", { class: "control" });
  const row = fill(control, "div", { class: "row" });
  parameterName(fill(row, "label", { for: name }), name);
  const number = fill(row, "input", {
    id: name,
    class: "number",
    spellcheck: "false",
    autocapitalize: "off",
    "aria-describedby": `${name}-help ${name}-error`,
  });
  const slider = fill(control, "input", {
    id: `${name}-slider`,
    type: "range",
    min: low * STOPS_A_DECADE - (zero ? 1 : 0),
    max: high * STOPS_A_DECADE,
    "data-slider": name,
    "aria-describedby": `${name}-help`,
  });
  fill(control, "p", { class: "error", id: `${name}-error`, role: "alert" });
  const help = { class: "help", id: `${name}-help`, "data-label": `${name}.help` };
  fill(control, "p", help);
  slider.addEventListener("input", () => {
    change({ [name]: fromPosition(name, Number(slider.value)) });
  });
  number.addEventListener("input", () => {
    const value = number.value.trim() === "" ? NaN : Number(number.value);
    if (isAllowed(name, value)) change({ [name]: value }, number);
    else refuseNumber(name);
  });
  number.addEventListener("change", () => {
    if (number.getAttribute("aria-invalid") !== "true") showSettings();
  });
}

function refuseNumber(name) {
  const { scale } = SLIDERS[name];
  const key = name === "steps" ? "steps" : scale === "log" ? "rate" : "range";
  $(name).setAttribute("aria-invalid", "true");
  $(`${name}-error`).textContent = say(`error.${key}`, { end: 1 });
}

function buildChoice(set, name) {
  const control = fill(set, "div", { class: "control choice" });
  parameterName(fill(control, "label", { for: name }), name);
  const help = `${name}-help`;
  const select = fill(control, "select", { id: name, "aria-describedby": help });
  for (const value of CHOICES[name]) {
    fill(select, "option", { value, "data-label": `${name}.${value}` });
  }
  fill(control, "p", { class: "help", id: help, "data-label": `${name}.help` });
  select.addEventListener("change", () => change({ [name]: select.value }));
}

function buildCheck(set, name) {
  const control = fill(set, "div", { class: "control check" });
  const label = fill(control, "label");
  const help = `${name}-help`;
  const box = fill(label, "input", {
    type: "checkbox",
    id: name,
    "aria-describedby": help,
  });
  parameterName(fill(label, "span"), name);
  fill(control, "p", { class: "help", id: help, "data-label": `${name}.help` });
  box.addEventListener("change", () => change({ [name]: box.checked }));
}

// `typing` is the field that is being typed in, and must not be written to.
function showSettings(typing) {
  const s = page.settings;
  for (const name of Object.keys(SLIDERS)) {
    const slider = $(`${name}-slider`);
    slider.value = toPosition(name, s[name]);
    slider.setAttribute("aria-valuetext", plain(s[name]));
    if ($(name) !== typing) $(name).value = plain(s[name]);
    $(name).removeAttribute("aria-invalid");
    $(`${name}-error`).textContent = "";
  }
  for (const [name, value] of Object.entries(s)) {
    if (typeof value === "boolean") $(name).checked = value;
  }
  $("schedule").value = s.schedule;
  $("surface").value = s.surface;
  $("preset").value = presetOf(s);
  $("call").textContent = pythonCall(s);
}

function presetOf(s) {
  const plain = { ...DEFAULTS, schedule: "constant" };
  const fits = (preset) =>
    Object.entries({ ...plain, ...preset }).every(([name, x]) => s[name] === x);
  return Object.keys(PRESETS).findLast((name) => fits(PRESETS[name])) ?? "own";
}

function change(some, typing) {
  page.settings = { ...page.settings, ...some };
  page.look = null;
  stop();
  showSettings(typing);
  $("copied").textContent = "";
  rewriteAddress();
  compute();
  draw();
}

function rewriteAddress() {
  const address = new URL(location.href);
  address.hash = toHash(page.settings);
  if (page.chosenLanguage) address.searchParams.set("lang", page.chosenLanguage);
  try {
    history.replaceState(null, "", address);
  } catch {
    // a page in a sandbox has no address of its own
  }
}

// Other settings altogether, and with them maybe another surface.
function begin({ settings, ignored = [] }) {
  page.ignored = ignored;
  sayIgnored();
  change(settings);
  shade();
}

function sayIgnored() {
  const names = page.ignored.join(say("list"));
  $("ignored").textContent = names && say("ignored", { names });
}

function choosePreset(name) {
  if (name === "own") return showSettings();
  const { surface, steps } = page.settings;
  const settings = { ...PLAIN, surface, steps, ...PRESETS[name] };
  return begin({ settings });
}

function compute() {
  const s = page.settings;
  const refused = refusal(s);
  page.paths = {};
  page.verdicts = {};
  const tried = {};
  for (const name of NAMES) {
    if (name === "ours" && refused) continue;
    page.paths[name] = run(name, s);
  }
  for (const name of NAMES) {
    const path = page.paths[name];
    if (!path) page.verdicts[name] = { kind: "refused", why: refused };
    else if (path.end) page.verdicts[name] = { kind: "end", ...path.end };
    else if (name === "ours") page.verdicts[name] = { kind: "own" };
    else if (refused) page.verdicts[name] = { kind: "unchecked" };
    else page.verdicts[name] = compare(name, s, page.paths.ours, path, tried);
  }
}

function verdictText(name) {
  const verdict = page.verdicts[name];
  const { kind, step, why, axis, reasons, difference } = verdict;
  if (kind === "refused") return say(`refusal.${why}`);
  if (kind === "end") {
    const where = { step, axis: say(`axis.${axis}`), formula: FORMULAS[name] };
    return say(`end.${why}`, where);
  }
  if (kind === "own") return "";
  if (kind === "same" && difference > 1e-4) {
    return say("near", { percent: brief(100 * difference) });
  }
  if (kind !== "differs") return say(kind);
  const said = reasons.map((reason) => say(`reason.${reason}`));
  return say("differs", { step, reasons: said.join(say("separator")) });
}

const lookedAt = () => page.look ?? page.settings.steps;

// The place of a path at the step that is looked at, or its last before the end.
function placeOf(path) {
  const step = Math.min(lookedAt(), path.points.length - 1);
  const [x, y] = path.points[step].map(brief);
  return { step, x, y, loss: brief(path.losses[step]) };
}

function draw() {
  const { steps, surface } = page.settings;
  $("look").max = steps;
  $("look").value = lookedAt();
  $("look-value").textContent = `${lookedAt()} / ${steps}`;
  const refused = refusal(page.settings);
  $("refusal").hidden = !refused;
  $("refusal").textContent = refused ? say(`refusal.${refused}`) : "";

  for (const name of NAMES) {
    const path = page.paths[name];
    const gone = path?.end && path.end.step <= lookedAt();
    let where = "";
    if (path) where = gone ? say("gone") : say("at", placeOf(path));
    $(`where-${name}`).textContent = where;
    $(`why-${name}`).textContent = verdictText(name);
    $(`why-${name}`).classList.toggle("ended", Boolean(path?.end || !path));
  }

  const { lowest } = SURFACES[surface];
  $("loss-title").textContent = say(lowest ? "chart.loss.gap" : "chart.loss");
  const least = lowest ? SURFACES[surface].loss(...lowest) : 0;
  drawMap();
  drawChart("loss", (path) => path.losses.map((loss) => loss - least), {
    log: lowest !== null,
    first: 0,
    text: (all) => say("loss.text", { steps, all }),
  });
  for (const axis of [0, 1]) {
    drawChart(`rate-${axis}`, (path) => path.rates.map((rate) => rate[axis]), {
      log: true,
      first: 1,
      text: (all) => say("rate.text", { steps, axis: say(`axis.${axis}`), all }),
    });
  }
  summarize();
}

// Said once the hand rests, not at every stop of a slider.
let resting;
function summarize() {
  clearTimeout(resting);
  resting = setTimeout(() => {
    const said = NAMES.filter((name) => page.shown.has(name)).map((name) => {
      const path = page.paths[name];
      const own = path && !path.end && name === "ours";
      const text = own ? say("summary.ours", placeOf(path)) : verdictText(name);
      return say("said", { name: say(`name.${name}`), text });
    });
    if ($("summary").textContent !== said.join(" ")) {
      $("summary").textContent = said.join(" ");
    }
  }, 600);
}

const shownPaths = () =>
  NAMES.filter((name) => page.shown.has(name) && page.paths[name]);

const round = (x) => Math.round(x * 10) / 10;

function lineThrough(points) {
  return points
    .map(([x, y], i) => `${i ? "L" : "M"}${round(x)} ${round(y)}`)
    .join("");
}

// A dot at each step that is far enough from the last dot to be told from it.
function beads(points) {
  let [last, text] = [[-Infinity, 0], ""];
  for (const [x, y] of points) {
    if (Math.hypot(x - last[0], y - last[1]) < 8) continue;
    text += `M${round(x)} ${round(y)}h0`;
    last = [x, y];
  }
  return text;
}

function cross(svg, [x, y], size) {
  const a = `M${x - size} ${y - size}L${x + size} ${y + size}`;
  const b = `M${x - size} ${y + size}L${x + size} ${y - size}`;
  fill(svg, "path", { class: "cross", d: a + b });
}

function emptied(svg) {
  const { clientWidth: width, clientHeight: height } = svg;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return [width, height];
}

// Those that share a place lie around each other, ours within.
function drawRings(svg, rings) {
  const drawn = rings.map(({ name, x, y }, i) => {
    const near = (ring) => Math.hypot(ring.x - x, ring.y - y) < 4;
    const r = 4.5 + 3.5 * rings.slice(0, i).filter(near).length;
    return { class: `place ${name}`, cx: x, cy: y, r };
  });
  for (const ring of drawn.reverse()) fill(svg, "circle", ring);
}

function drawMap() {
  const svg = $("path");
  const surface = SURFACES[page.settings.surface];
  const [left, right, bottom, top] = surface.view;
  const [width, height] = emptied(svg);
  // Far outside the frame, a number may be too large for a drawing.
  const held = (x, size) => Math.min(Math.max(x, -9 * size), 10 * size);
  const at = ([x, y]) => [
    held(((x - left) / (right - left)) * width, width),
    held(((top - y) / (top - bottom)) * height, height),
  ];
  for (const x of ticks(left, right, width / 110)) {
    const [place] = at([x, 0]);
    if (place < 24 || place > width - 36) continue;
    fill(svg, "path", { class: "now", d: `M${round(place)} ${height}v-5` });
    const label = { x: place, y: height - 9, "text-anchor": "middle" };
    fill(svg, "text", label, brief(x));
  }
  for (const y of ticks(bottom, top, height / 70)) {
    const [, place] = at([0, y]);
    if (place < 32 || place > height - 24) continue;
    fill(svg, "path", { class: "now", d: `M0 ${round(place)}h5` });
    fill(svg, "text", { x: 9, y: place + 4 }, brief(y));
  }
  const across = { class: "axis", x: width - 9, y: height - 9, "text-anchor": "end" };
  fill(svg, "text", across, say("axis.0"));
  fill(svg, "text", { class: "axis", x: 9, y: 17 }, say("axis.1"));
  if (surface.lowest) {
    const [x, y] = at(surface.lowest);
    fill(svg, "path", { class: "lowest", d: `M${x - 7} ${y}h14M${x} ${y - 7}v14` });
    fill(svg, "text", { x: x + 10, y: y + 16 }, say("minimum"));
  }

  const said = [];
  const ourPoints = [];
  for (const name of shownPaths()) {
    const path = page.paths[name];
    const { step, x, y } = placeOf(path);
    const points = path.points.slice(0, step + 1).map(at);
    fill(svg, "path", { class: `curve ${name}`, d: lineThrough(points) });
    if (name === "ours") ourPoints.push(...points);
    said.push(say("ends.at", { name: say(`name.${name}`), x, y, step }));
  }
  fill(svg, "path", { class: "beads", d: beads(ourPoints) });
  const [x0, y0] = at(surface.start);
  fill(svg, "circle", { class: "start", cx: x0, cy: y0, r: 6 });
  let row = 0;
  const rings = [];
  for (const name of shownPaths()) {
    const path = page.paths[name];
    const { step } = placeOf(path);
    const place = at(path.points[step]);
    const x = Math.min(Math.max(place[0], 10), width - 10);
    const y = Math.min(Math.max(place[1], 10), height - 10);
    if (path.end && path.end.step <= lookedAt()) {
      cross(svg, [x, y], 6);
      const side = x > width - 150 ? { x: x - 12, "text-anchor": "end" } : { x: x + 12 };
      const label = { class: "ended", y: y + 16 * row + (y < 30 ? 16 : -8), ...side };
      const what = path.end.why === "negative" ? "NaN" : "∞";
      fill(svg, "text", label, `${say(`name.${name}`)}: ${what}`);
      row += 1;
    } else {
      rings.push({ name, x, y });
    }
  }
  drawRings(svg, rings);
  const [x, y] = surface.start.map(brief);
  const named = say(`surface.${page.settings.surface}`);
  const text = say("path.text", { surface: named, x, y, all: said.join(" ") });
  svg.setAttribute("aria-label", text);
}

// Numbers at which an axis is marked: 1, 2 or 5 times a power of ten apart.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const first = Math.ceil(low / step);
  const last = Math.floor(high / step);
  return Array.from({ length: last - first + 1 }, (_, i) =>
    Number(((first + i) * step).toPrecision(6)),
  );
}

// Powers of ten, and 2 and 5 times them where there are few.
function logTicks(low, high, count) {
  const all = [];
  if (high - low < 2) {
    for (let power = Math.floor(low); power <= high; power++) {
      all.push(...[1, 2, 5].map((m) => power + Math.log10(m)));
    }
    return all.filter((mark) => mark >= low && mark <= high);
  }
  const every = Math.max(1, Math.ceil((high - low) / count));
  const first = Math.ceil(low / every) * every;
  for (let power = first; power <= high; power += every) all.push(power);
  return all;
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function powerOfTen(power) {
  const digits = [...String(Math.abs(power))].map((d) => SUPERSCRIPTS[d]).join("");
  return `10${power < 0 ? "⁻" : ""}${digits}`;
}

function drawChart(id, valuesOf, { log, first, text }) {
  const svg = $(id);
  const [width, height] = emptied(svg);
  const { steps } = page.settings;
  const series = shownPaths().map((name) => [name, valuesOf(page.paths[name])]);
  // Below 1e-12 times the largest, a loss is rounding.
  const all = series.flatMap(([, values]) => values.filter(Number.isFinite));
  const most = all.reduce((a, b) => Math.max(a, b), log ? 1e-30 : -Infinity);
  const scale = log ? (x) => Math.log10(Math.max(x, most * 1e-12)) : (x) => x;
  // A path that flies off would flatten ours.
  const framed = (!log && series.find(([name]) => name === "ours")?.[1]) || all;
  let [low, high] = [Infinity, -Infinity];
  for (const value of framed.filter(Number.isFinite).map(scale)) {
    [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  if (!all.length) [low, high] = [0, 1];
  const least = log ? 1 : 1e-3;
  if (high - low < least) {
    [low, high] = [(low + high - least) / 2, (low + high + least) / 2];
  }
  const [padLeft, padBottom, padTop, padRight] = [48, 22, 8, 10];
  const x = (t) => padLeft + (t / steps) * (width - padLeft - padRight);
  const y = (value) => {
    const held = Math.min(Math.max(value, low), high);
    return padTop + ((high - held) / (high - low)) * (height - padTop - padBottom);
  };

  const marks = log ? logTicks(low, high, 5) : ticks(low, high, 4);
  for (const mark of marks) {
    const place = round(y(mark));
    fill(svg, "path", { class: "grid", d: `M${padLeft} ${place}H${width - padRight}` });
    const label = { x: padLeft - 6, y: place + 4, "text-anchor": "end" };
    const powers = log && high - low >= 2;
    fill(svg, "text", label, powers ? powerOfTen(mark) : brief(log ? 10 ** mark : mark));
  }
  for (const mark of ticks(0, steps, 3)) {
    const near = x(mark) > width - 24;
    const label = { x: x(mark), y: height - 4, "text-anchor": near ? "end" : "middle" };
    fill(svg, "text", label, String(mark));
  }
  const named = { x: padLeft - 10, y: height - 4, "text-anchor": "end" };
  fill(svg, "text", named, say("axis.step"));

  const now = round(x(lookedAt()));
  fill(svg, "path", { class: "now", d: `M${now} ${padTop}V${height - padBottom}` });
  const said = [];
  for (const [name, values] of series) {
    const points = values
      .map((value, i) => [x(i + first), y(scale(value))])
      .filter(([, place]) => Number.isFinite(place));
    fill(svg, "path", { class: `curve ${name}`, d: lineThrough(points) });
    if (page.paths[name].end && points.length) cross(svg, points.at(-1), 4);
    if (!values.length) continue;
    const ends = { first: brief(values[0]), last: brief(values.at(-1)) };
    said.push(say("from.to", { name: say(`name.${name}`), ...ends }));
  }
  svg.setAttribute("aria-label", text(said.join(" ")));
}

function colorOf(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// Bands and lines of equal loss, drawn to the screen's own pixels.
const BANDS = 16;
const BENDS = { valley: 3e-3, saddle: 0.3, rosenbrock: 1e-4, plateau: 0.1, slope: 100 };
function shade() {
  const canvas = $("shade");
  const { surface: name } = page.settings;
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (!width || !height) return;
  [canvas.width, canvas.height] = [width, height];
  const { loss, view } = SURFACES[name];
  const [left, right, bottom, top] = view;
  const levels = new Float64Array(width * height);
  let [least, most] = [Infinity, -Infinity];
  for (let j = 0, k = 0; j < height; j++) {
    const y = top - ((j + 0.5) / height) * (top - bottom);
    for (let i = 0; i < width; i++, k++) {
      const value = loss(left + ((i + 0.5) / width) * (right - left), y);
      levels[k] = value;
      least = Math.min(least, value);
      most = Math.max(most, value);
    }
  }
  const bend = (most - least) * (BENDS[name] ?? 1e-2);
  const stretch = BANDS / Math.log1p((most - least) / bend);
  for (let k = 0; k < levels.length; k++) {
    levels[k] = stretch * Math.log1p((levels[k] - least) / bend);
  }
  const [low, high, line] = ["--low", "--high", "--line"].map(colorOf);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let j = 0, k = 0; j < height; j++) {
    for (let i = 0; i < width; i++, k++) {
      const level = levels[k];
      const dx = levels[i + 1 < width ? k + 1 : k - 1] - level;
      const dy = levels[j + 1 < height ? k + width : k - width] - level;
      const slope = Math.hypot(dx, dy) + 1e-9;
      const distance = Math.abs(level - Math.floor(level) - 0.5) / slope;
      const ink = Math.min(Math.max(0.5 * ratio + 0.5 - distance, 0), 1);
      const band = Math.round(level) / BANDS;
      for (let c = 0; c < 3; c++) {
        const ground = low[c] + (high[c] - low[c]) * band;
        image.data[4 * k + c] = ground + (line[c] - ground) * ink;
      }
      image.data[4 * k + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

function speak(language) {
  page.language = language;
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  $("language").value = language;
  for (const node of document.querySelectorAll("[data-label]")) {
    node.textContent = say(node.dataset.label);
  }
  for (const node of document.querySelectorAll("[data-slider]")) {
    node.setAttribute("aria-label", say("slider", { name: say(node.dataset.slider) }));
  }
  document.title = say("title");
  $("copied").textContent = "";
  sayIgnored();
  showSettings();
  draw();
}

let frame = null;
function play() {
  if (frame !== null) return stop();
  const { steps } = page.settings;
  const from = lookedAt() < steps ? lookedAt() : 0;
  const began = performance.now() - (from / steps) * 4000;
  $("play").textContent = say("pause");
  const advance = (time) => {
    const step = Math.round(((time - began) / 4000) * steps);
    page.look = Math.min(Math.max(step, 0), steps);
    draw();
    if (page.look === steps) return stop();
    frame = requestAnimationFrame(advance);
  };
  frame = requestAnimationFrame(advance);
}

function stop() {
  cancelAnimationFrame(frame);
  frame = null;
  $("play").textContent = say("play");
}

async function copyCall() {
  try {
    await navigator.clipboard.writeText(pythonCall(page.settings));
    $("copied").textContent = say("copied");
  } catch {
    getSelection().selectAllChildren($("call"));
    $("copied").textContent = say("copy.failed");
  }
}

// On the site, what was chosen there of light and dark holds here as well.
function keepTheme() {
  let theme = null;
  try {
    theme = localStorage.getItem("mode");
  } catch {
    // a page in a sandbox has no storage
  }
  if (theme !== "light" && theme !== "dark") return;
  document.documentElement.style.colorScheme = theme;
  for (const { media } of document.styleSheets[0].cssRules) {
    if (!media?.mediaText.includes("prefers-color-scheme")) continue;
    media.mediaText = theme === "dark" ? "screen" : "not all";
  }
}

function start() {
  if ($("home")) keepTheme();
  buildControls();
  const asked = new URLSearchParams(location.search).get("lang");
  page.chosenLanguage = Object.hasOwn(LABELS, asked) ? asked : null;
  const native = navigator.language.startsWith("zh") ? "zh" : "en";
  compute();
  speak(page.chosenLanguage ?? native);
  rewriteAddress();
  shade();

  $("language").addEventListener("change", () => {
    page.chosenLanguage = $("language").value;
    stop();
    speak(page.chosenLanguage);
    rewriteAddress();
  });
  $("preset").addEventListener("change", () => choosePreset($("preset").value));
  $("surface").addEventListener("change", () => {
    change({ surface: $("surface").value });
    shade();
  });
  $("reset").addEventListener("click", () => {
    begin({ settings: { ...START } });
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("look").addEventListener("input", () => {
    stop();
    page.look = Number($("look").value);
    draw();
  });
  // A touch moves a slider at once; if it then scrolls the page, it changes nothing.
  let before = null;
  window.addEventListener("pointerdown", ({ isPrimary }) => {
    if (isPrimary) before = { ...page }; // not what a second finger finds
  });
  window.addEventListener("pointercancel", ({ target }) => {
    if (target.type !== "range") return;
    change(before.settings);
    page.look = before.look;
    draw();
  });
  $("play").addEventListener("click", play);
  $("copy").addEventListener("click", copyCall);
  window.addEventListener("hashchange", () => begin(fromHash(location.hash)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", shade);
  matchMedia("print").addEventListener("change", () => {
    shade();
    draw();
  });
  let size = "";
  new ResizeObserver(() => {
    const now = `${$("path").clientWidth} ${$("path").clientHeight}`;
    if (now === size) return;
    size = now;
    shade();
    draw();
  }).observe($("path"));
}

start();
