/**
 * What the book's widgets share: a root that reads its data or says what is wrong with it, a theme that follows the page,
 * scales and axes, marks, controls, and dragging by pointer and by keyboard.
 *
 * A widget is a module of its own beside this one. `clustr_core.drawing.widgets.module` joins the two into one file,
 * since a published page copies one file a widget; so no name of a widget may be a name of this module.
 */

const STYLE = `
.cw { --ink: #1b1b1b; --muted: #5a5a5a; --paper: #ffffff; --panel: #f4f4f4; --line: #d0d0d0; --accent: #0b5fa5;
  --warn: #a02c00; color: var(--ink); background: var(--paper); font: 14px/1.4 system-ui, sans-serif;
  border: 1px solid var(--line); border-radius: 6px; padding: 12px; position: relative; }
.cw.dark { --ink: #ececec; --muted: #b4b4b4; --paper: #17191c; --panel: #24272b; --line: #4a4d52; --accent: #6cb6ff;
  --warn: #ff9d76; }
.cw * { box-sizing: border-box; }
.cw svg { display: block; max-width: 100%; font: 12px/1.2 system-ui, sans-serif; }
.cw svg text { fill: var(--ink); }
.cw svg text.faint { fill: var(--muted); }
.cw .bar { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin: 0 0 10px; }
.cw .bar:last-child { margin-bottom: 0; }
.cw label, .cw fieldset { display: inline-flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.cw fieldset { border: 0; padding: 0; margin: 0; gap: 4px 12px; }
.cw legend { float: left; margin-right: 8px; color: var(--muted); }
.cw button, .cw select, .cw input[type=text], .cw input[type=search] { font: inherit; color: inherit;
  background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: 4px 9px; min-height: 32px; }
.cw button { cursor: pointer; }
.cw button[aria-pressed=true] { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
.cw input[type=range] { accent-color: var(--accent); min-width: 110px; }
.cw input[type=checkbox] { accent-color: var(--accent); width: 16px; height: 16px; margin: 0; }
.cw output { font-variant-numeric: tabular-nums; }
.cw :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.cw .scroll { overflow-x: auto; }
.cw table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.cw th, .cw td { text-align: left; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.cw .faint { color: var(--muted); }
.cw .note { color: var(--muted); margin: 8px 0 0; }
.cw .wrong { color: var(--warn); margin: 8px 0 0; overflow-wrap: anywhere; }
.cw .tip { position: absolute; pointer-events: none; background: var(--panel); border: 1px solid var(--line);
  border-radius: 4px; padding: 4px 8px; max-width: 260px; z-index: 2; white-space: pre-line; }
.cw .unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.cw .drag { cursor: grab; touch-action: none; }
.cw .drag:active { cursor: grabbing; }
`;

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

/** What is wrong with a widget's data, in words for the reader of the page. */
class DataError extends Error {}

/** An element; attributes that are functions become listeners, and undefined ones are left out. */
function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An element of a drawing. */
function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined));
  return element;
}

/**
 * The `render` of a widget: builds it from `model.get("data")`, says in its box what is wrong with the data, and hides the
 * static picture of the figure that `model.get("replaces")` names once there is something to see in its place.
 *
 * `build` is given `{ root, data, announce, onCleanup }`; what it appends to `root` is the widget. `announce` tells a
 * screen reader what changed. Without a kernel a model can only be read, so nothing is ever written to it.
 */
function widget(title, build) {
  return {
    render({ model, el }) {
      const cleanups = [];
      const start = () => {
        cleanups.splice(0).forEach((cleanup) => cleanup());
        const said = html("p", { class: "unseen", "aria-live": "polite" });
        const root = html("section", { class: "cw", "aria-label": title });
        el.replaceChildren(html("style", {}, STYLE), root);
        cleanups.push(followTheme(root));
        const announce = (text) => { said.textContent = text; };
        try {
          const data = model.get("data");
          if (data === null || typeof data !== "object" || Array.isArray(data) || !Object.keys(data).length) {
            throw new DataError("no data were given");
          }
          build({ root, data, announce, onCleanup: (cleanup) => cleanups.push(cleanup) });
          root.append(said);
          cleanups.push(hideStatic(model.get("replaces")));
        } catch (error) {
          root.replaceChildren(html("p", { class: "wrong", role: "alert" }, `${title}: ${error.message}`));
          if (!(error instanceof DataError)) console.warn(error);
        }
      };
      start();
      model.on?.("change:data", start);
      return () => cleanups.splice(0).forEach((cleanup) => cleanup());
    },
  };
}

/** The page's colours, light or dark, now and when they change. */
function followTheme(root) {
  const page = document.documentElement;
  const set = () => {
    const lab = document.body.dataset.jpThemeLight;
    const dark = lab !== undefined ? lab === "false" : page.classList.contains("dark") || page.dataset.theme === "dark";
    root.classList.toggle("dark", dark);
  };
  set();
  const observer = new MutationObserver(set);
  for (const element of [page, document.body]) observer.observe(element, { attributes: true });
  return () => observer.disconnect();
}

/** Hides the pictures of a figure of the page, not its caption; a page redrawn by its framework is hidden again. */
function hideStatic(id) {
  if (!id) return () => {};
  const style = html("style", {}, `#${CSS.escape(id)} :is(img, svg, picture) { display: none; }`);
  document.head.append(style);
  return () => style.remove();
}

/** A field of the data, of the kind that is expected: "number", "string", "object", "array", "numbers", "strings". */
function field(data, name, kind) {
  const value = data[name];
  const of = { numbers: Number.isFinite, strings: (each) => typeof each === "string" }[kind];
  const right = kind === "number" ? Number.isFinite(value)
    : kind === "array" ? Array.isArray(value)
    : kind === "object" ? value !== null && typeof value === "object" && !Array.isArray(value)
    : of ? Array.isArray(value) && value.every(of)
    : typeof value === kind;
  if (!right) throw new DataError(`${name}: expected ${kind}, got ${described(value)}`);
  return value;
}

/** A field that holds points: rows of as many finite numbers each. */
function points(data, name, columns) {
  const rows = field(data, name, "array");
  const wrong = rows.findIndex((row) => !Array.isArray(row) || row.length !== columns || !row.every(Number.isFinite));
  if (wrong >= 0) throw new DataError(`${name}: expected rows of ${columns} numbers, got ${described(rows[wrong])}`);
  return rows;
}

function described(value) {
  const text = value === undefined ? "nothing" : JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

/** A number for the reader. */
function shown(value, digits = 3) {
  return Number.isFinite(value) ? Number(value.toPrecision(digits)).toString().replace("-", "−") : value > 0 ? "∞" : "–";
}

/** A share with its interval, in per cent, as the book prints them. */
function withInterval(share, low, high) {
  const percent = (value) => (100 * value).toFixed(1);
  return `${percent(share)}\u00a0[${percent(low)},\u00a0${percent(high)}]`;
}

/** A straight scale from a domain to a range of pixels. */
function linear([from, to], [start, end]) {
  const scale = (value) => start + ((value - from) / (to - from || 1)) * (end - start);
  scale.invert = (pixel) => from + ((pixel - start) / (end - start || 1)) * (to - from);
  scale.domain = [from, to];
  return scale;
}

/** Round numbers within an interval, about `count` of them. */
function ticks([from, to], count = 5) {
  const rough = (to - from) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(from / step - 1e-9);
  const last = Math.floor(to / step + 1e-9);
  return Array.from({ length: Math.max(last - first + 1, 0) }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

/**
 * Axes with their grid: `x` and `y` are scales, `box` is {left, right, top, bottom} in pixels.
 *
 * `xTicks` and `yTicks` are values, and `xText` and `yText` say how they are written.
 */
function axes({ x, y, box, xLabel, yLabel, xTicks, yTicks, xText = shown, yText = shown }) {
  const group = svg("g", { "aria-hidden": "true" });
  const line = (x1, y1, x2, y2, colour) => svg("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 1 });
  for (const value of xTicks ?? ticks(x.domain)) {
    const at = x(value);
    const text = svg("text", { x: at, y: box.bottom + 16, "text-anchor": "middle" }, xText(value));
    group.append(line(at, box.top, at, box.bottom, "var(--line)"), text);
  }
  for (const value of yTicks ?? ticks(y.domain)) {
    const at = y(value);
    const text = svg("text", { x: box.left - 7, y: at + 4, "text-anchor": "end" }, yText(value));
    group.append(line(box.left, at, box.right, at, "var(--line)"), text);
  }
  group.append(line(box.left, box.bottom, box.right, box.bottom, "var(--ink)"));
  group.append(line(box.left, box.top, box.left, box.bottom, "var(--ink)"));
  const middle = { x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2 };
  if (xLabel) group.append(svg("text", { x: middle.x, y: box.bottom + 34, "text-anchor": "middle" }, xLabel));
  if (yLabel) {
    const turned = { transform: `translate(14 ${middle.y}) rotate(-90)`, "text-anchor": "middle" };
    group.append(svg("text", turned, yLabel));
  }
  return group;
}

/** The path of a line through pixels; a hole where a pixel is not finite. */
function path(pixels) {
  let drawn = "";
  let pen = "M";
  for (const [x, y] of pixels) {
    if (Number.isFinite(x) && Number.isFinite(y)) {
      drawn += `${pen}${x.toFixed(2)} ${y.toFixed(2)}`;
      pen = "L";
    } else pen = "M";
  }
  return drawn;
}

const CORNERS = { "^": [3, -90], v: [3, 90], "<": [3, 180], ">": [3, 0], s: [4, -45], D: [4, 0], d: [4, 0], p: [5, -90],
  h: [6, -90], 8: [8, -67.5] };

/** A mark as the book's figures have it (`o s ^ v D P X < > * p h d 8`), with its middle in a pixel. */
function mark(kind, x, y, size, attributes = {}) {
  if (kind === "o") return svg("circle", { cx: x, cy: y, r: size, ...attributes });
  const at = (radius, degrees) => {
    const angle = (degrees * Math.PI) / 180;
    const narrow = kind === "d" ? 0.6 : 1;
    return [x + narrow * radius * Math.cos(angle), y + radius * Math.sin(angle)];
  };
  let corners;
  if (kind in CORNERS) {
    const [count, turn] = CORNERS[kind];
    corners = Array.from({ length: count }, (_, n) => at(1.2 * size, turn + (360 * n) / count));
  } else if (kind === "*") {
    corners = Array.from({ length: 10 }, (_, n) => at(n % 2 ? 0.6 * size : 1.45 * size, -90 + 36 * n));
  } else {
    const turn = kind === "X" || kind === "x" ? 45 : 0;
    const arm = 0.4 * size;
    const plus = [[-arm, -size], [arm, -size], [arm, -arm], [size, -arm], [size, arm], [arm, arm], [arm, size],
      [-arm, size], [-arm, arm], [-size, arm], [-size, -arm], [-arm, -arm]];
    const [cosine, sine] = [Math.cos((turn * Math.PI) / 180), Math.sin((turn * Math.PI) / 180)];
    corners = plus.map(([a, b]) => [x + a * cosine - b * sine, y + a * sine + b * cosine]);
  }
  return svg("path", { d: `${path(corners)}Z`, ...attributes });
}

/**
 * Calls `draw(width)` with the width that there is, at once and whenever it changes.
 *
 * Where there is none yet, in a hidden tab, nothing can be used before it is drawn.
 */
function responsive(container, draw, onCleanup) {
  const root = container.closest(".cw");
  let last = 0;
  const measure = () => {
    const width = Math.floor(container.clientWidth);
    if (width > 0 && width !== last) draw((last = width));
    root.inert = !last;
  };
  const observer = new ResizeObserver(measure);
  observer.observe(container);
  onCleanup(() => observer.disconnect());
  measure();
}

/** A labelled slider; returns its element and `set(value)`. */
function slider(label, { min, max, step, value, text = shown, input }) {
  const output = html("output", {}, text(value));
  const range = html("input", { type: "range", min, max, step, value, "aria-label": label, "aria-valuetext": text(value) });
  const show = (now) => {
    output.textContent = text(now);
    range.setAttribute("aria-valuetext", text(now));
  };
  range.addEventListener("input", () => {
    show(Number(range.value));
    input(Number(range.value));
  });
  return { element: html("label", {}, html("span", {}, label), range, output), set: (now) => show((range.value = now)), range };
}

/** A labelled list of which one is chosen; `options` are [value, text] pairs. */
function choice(label, options, chosen, change) {
  const select = html("select", { "aria-label": label, change: () => change(select.value) },
    options.map(([value, text]) => html("option", { value, selected: value === chosen }, text)));
  return html("label", {}, html("span", {}, label), select);
}

/** Boxes to tick; `options` are [value, text] pairs, `chosen` a set that is kept up to date. */
function boxes(label, options, chosen, change) {
  const box = ([value, text]) => {
    const input = html("input", { type: "checkbox", checked: chosen.has(value), change: () => {
      if (input.checked) chosen.add(value);
      else chosen.delete(value);
      change(chosen);
    } });
    return html("label", {}, input, html("span", {}, text));
  };
  return html("fieldset", {}, html("legend", {}, label), options.map(box));
}

/** A button. */
function button(text, click, attributes = {}) {
  return html("button", { type: "button", click, ...attributes }, text);
}

/** A button that copies what `text()` returns, and says so. */
function copyButton(label, text, announce) {
  return button(label, async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      // without permission, or on a page that is not served over https
      const area = html("textarea", { class: "unseen" });
      area.value = text();
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    announce("copied");
  });
}

/**
 * A mark that is dragged with a pointer or moved with the arrow keys (Shift: five steps at once).
 *
 * `at()` is its place, `move(x, y)` moves it; both in the units of the scales that `scales()` returns. `label()` is what a
 * screen reader says. `plot` is the drawing, in whose pixels the scales count.
 */
function draggable(node, plot, { label, at, move, scales, step }) {
  const describe = () => node.setAttribute("aria-label", label());
  for (const [name, value] of Object.entries({ tabindex: 0, role: "img", "aria-roledescription": "point that moves" })) {
    node.setAttribute(name, value);
  }
  node.classList.add("drag");
  describe();
  const go = (x, y) => {
    move(x, y);
    describe();
  };
  node.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    node.focus();
    node.setPointerCapture(event.pointerId);
  });
  // browsers do not heed the touch-action of what lies inside a drawing: without this a finger scrolls the page instead
  node.addEventListener("touchmove", (event) => event.preventDefault(), { passive: false });
  node.addEventListener("pointermove", (event) => {
    if (!node.hasPointerCapture(event.pointerId)) return;
    const box = plot.getBoundingClientRect();
    const [x, y] = scales();
    go(x.invert(event.clientX - box.left), y.invert(event.clientY - box.top));
  });
  node.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    const size = event.shiftKey ? 5 * step : step;
    const [x, y] = at();
    go(x + direction[0] * size, y + direction[1] * size);
  });
}

/** A note beside the pointer or the focus: `show(x, y, text)` in pixels of `root`, and `hide()`. */
function tip(root) {
  const box = html("div", { class: "tip", role: "status", hidden: true });
  root.append(box);
  return {
    show(x, y, text) {
      box.textContent = text;
      box.hidden = false;
      box.style.left = `${Math.max(Math.min(x + 12, root.clientWidth - box.offsetWidth - 6), 0)}px`;
      box.style.top = `${y + 14}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

/** The rows of a CSV as objects, quoted fields included. */
function parseCsv(text) {
  const rows = [[""]];
  let quoted = false;
  for (let n = 0; n < text.length; n += 1) {
    const character = text[n];
    const row = rows[rows.length - 1];
    if (quoted && character === '"' && text[n + 1] === '"') row[row.length - 1] += text[(n += 1)];
    else if (character === '"') quoted = !quoted;
    else if (quoted) row[row.length - 1] += character;
    else if (character === ",") row.push("");
    else if (character === "\n") rows.push([""]);
    else if (character !== "\r") row[row.length - 1] += character;
  }
  const [names, ...values] = rows.filter((row) => row.length > 1 || row[0] !== "");
  if (!names) throw new DataError("the file is empty");
  return values.map((row, n) => {
    if (row.length !== names.length) {
      throw new DataError(`line ${n + 2}: expected ${names.length} values, got ${row.length}`);
    }
    return Object.fromEntries(names.map((name, column) => [name, row[column]]));
  });
}


const HARD_BOUNDS = ["triangle", "nearest", "pairwise", "exact"];
const SOFT_BOUNDS = ["soft-global", "soft-local", "soft-lse", "soft-dual"];
const UNSOUND = { nearest: "second-nearest", soft: "uncorrected" };
const RULES = ["nearest", "soft"];
const FEWEST = 2;
const MOST = 8;
const BISECTIONS = 48;
const REFINEMENTS = 12;
const TINY = 2.3e-308;

const LOOK = `
.cw .ce-two { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: flex-start; margin-bottom: 10px; }
.cw .ce-plot { flex: 1 1 320px; min-width: 0; max-width: 520px; }
.cw .ce-side { flex: 1 1 310px; min-width: 0; }
.cw .ce-halo { pointer-events: none; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.cw .ce-lesson { margin: 0 0 10px; max-width: 46em; }
.cw .ce-side table { width: 100%; }
.cw .ce-side td, .cw .ce-side th { padding-right: 8px; }
.cw .ce-side td:last-child { white-space: normal; }
.cw .ce-side td label { display: flex; flex-wrap: nowrap; white-space: normal; line-height: 1.2; }
.cw .ce-side label > :not(span) { flex: none; }
.cw .ce-number { text-align: right !important; }
.cw .ce-group td { color: var(--muted); padding-top: 9px; }
.cw .ce-broken td { color: var(--warn); }
.cw .ce-key { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 8px; }
.cw .ce-key span { display: inline-flex; align-items: center; gap: 4px; }
.cw pre { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: 8px;
  margin: 8px 0; font: 12px/1.5 ui-monospace, monospace; color: var(--ink); }
.cw details { margin-top: 8px; }
.cw summary { cursor: pointer; width: fit-content; }
.cw dt { font-weight: 600; }
`;

// ---- the maths; a plane is {z, centroids, labels, variance} ----

const minus = (a, b) => [a[0] - b[0], a[1] - b[1]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
const norm = (a) => Math.hypot(a[0], a[1]);
const scaled = (a, by) => [a[0] * by, a[1] * by];
const sum = (values) => values.reduce((total, value) => total + value, 0);
const indexOfLeast = (values) => values.reduce((best, value, n) => (value < values[best] ? n : best), 0);
const indexOfMost = (values) => values.reduce((best, value, n) => (value > values[best] ? n : best), 0);

function squaredDistances(point, centroids) {
  return centroids.map((centroid) => (point[0] - centroid[0]) ** 2 + (point[1] - centroid[1]) ** 2);
}

function logSumExp(values) {
  const highest = Math.max(...values);
  return Number.isFinite(highest) ? highest + Math.log(sum(values.map((value) => Math.exp(value - highest)))) : highest;
}

function softmax(values) {
  const total = logSumExp(values);
  return values.map((value) => Math.exp(value - total));
}

/** The logits of both rules at a point: class c's at c, minus infinity for a class without a centroid. */
function logitsAt(point, { centroids, labels, variance }, rule) {
  const logits = new Array(Math.max(...labels) + 1).fill(-Infinity);
  for (let j = 0; j < labels.length; j += 1) {
    const vote = -((point[0] - centroids[j][0]) ** 2 + (point[1] - centroids[j][1]) ** 2) / (2 * variance);
    const [low, high] = vote < logits[labels[j]] ? [vote, logits[labels[j]]] : [logits[labels[j]], vote];
    logits[labels[j]] = rule === "soft" ? high + Math.log1p(Math.exp(low - high)) : high;
  }
  return logits;
}

const predictedAt = (point, plane, rule) => indexOfMost(logitsAt(point, plane, rule));

/** The least of some candidates by their radius; none is below 0, and what is not a number is 0. */
function leastOf(candidates) {
  const found = candidates[indexOfLeast(candidates.map((candidate) => candidate.radius))];
  return found.radius > 0 ? found : { ...found, radius: 0, step: [0, 0] };
}

/**
 * The shortest v with <v, N_i> >= g_i for all i in the plane: a projection on one wall, or a corner of two.
 *
 * `walls` are {normal, gap}; returned with the walls that v touches, and the multipliers with v = sum_i lambda_i N_i.
 */
function leastStep(walls) {
  const nothing = { step: [0, 0], touched: [], multipliers: [] };
  if (walls.every(({ gap }) => gap <= 0)) return nothing;
  const candidates = walls.map(({ normal, gap }, i) => {
    const by = gap / dot(normal, normal);
    return { step: scaled(normal, by), touched: [i], multipliers: [by] };
  });
  walls.forEach(({ normal: first, gap: a }, i) => walls.slice(0, i).forEach(({ normal: second, gap: b }, k) => {
    const determinant = first[0] * second[1] - first[1] * second[0];
    if (Math.abs(determinant) <= 1e-14 * norm(first) * norm(second)) return;
    const step = scaled([a * second[1] - b * first[1], b * first[0] - a * second[0]], 1 / determinant);
    const multipliers = [step[0] * second[1] - step[1] * second[0], first[0] * step[1] - first[1] * step[0]];
    candidates.push({ step, touched: [i, k], multipliers: scaled(multipliers, 1 / determinant) });
  }));
  const allowed = candidates.filter(({ step }) => walls.every(({ normal, gap }) =>
    dot(normal, step) >= gap - 1e-11 * (norm(normal) * norm(step) + Math.abs(gap))));
  return allowed[indexOfLeast(allowed.map(({ step }) => norm(step)))] ?? nothing;
}

/** What the hard bounds look at: own centroids, rivals, and the wall of each pair. */
function contest(plane, rule, corrected) {
  const { z, centroids, labels, variance } = plane;
  const squares = squaredDistances(z, centroids);
  const prediction = predictedAt(z, plane, rule);
  const own = labels.flatMap((label, i) => (label === prediction ? [i] : []));
  const rivals = labels.flatMap((label, j) => (label === prediction ? [] : [j]));
  const taken = (j) => (corrected ? variance * Math.log(labels.filter((label) => label === labels[j]).length) : 0);
  const gap = (j, i) => (squares[j] - squares[i]) / 2 - taken(j);
  const wall = (j, i) => {
    const normal = minus(centroids[j], centroids[i]);
    const length = norm(normal);
    const walls = [{ normal, gap: gap(j, i) }];
    if (!(length > 0)) return { radius: -Infinity, rival: j, own: [i], walls: [], step: [0, 0] };
    return { radius: gap(j, i) / length, rival: j, own: [i], walls, step: scaled(normal, gap(j, i) / length ** 2) };
  };
  const nearest = own[indexOfLeast(own.map((i) => squares[i]))];
  return { squares, own, rivals, gap, wall, nearest, centroids, z };
}

/** The hard bounds, with who decides and the step to where each stops; for the soft rule less sigma^2 log k. */
function hardLadder(plane, rule) {
  const { squares, own, rivals, gap, wall, nearest, centroids, z } = contest(plane, rule, rule === "soft");
  const pairwise = (j) => {
    const walls = own.map((i) => wall(j, i));
    return walls[indexOfMost(walls.map((each) => each.radius))];
  };
  return {
    triangle: leastOf(rivals.map((j) => {
      const radius = gap(j, nearest) / (Math.sqrt(squares[j]) + Math.sqrt(squares[nearest]));
      const towards = minus(centroids[j], z);
      return { ...wall(j, nearest), radius, step: scaled(towards, radius / (norm(towards) || 1)) };
    })),
    nearest: leastOf(rivals.map((j) => wall(j, nearest))),
    pairwise: leastOf(rivals.map(pairwise)),
    exact: leastOf(rivals.map((j) => {
      const there = own.map((i) => wall(j, i)).filter(({ walls }) => walls.length);
      const { step, touched } = leastStep(there.flatMap(({ walls }) => walls));
      const all = (part) => touched.flatMap((n) => there[n][part]);
      const together = { radius: norm(step), rival: j, own: all("own"), walls: all("walls"), step };
      const alone = pairwise(j);
      return together.radius >= alone.radius ? together : alone;
    })),
  };
}

/** What is no certificate: the nearest rival's wall alone, or the soft rule's votes not counted. */
function unsoundClaim(plane, rule) {
  const { squares, rivals, wall, nearest } = contest(plane, rule, false);
  const second = rivals[indexOfLeast(rivals.map((j) => squares[j]))];
  return leastOf((rule === "soft" ? rivals : [second]).map((j) => wall(j, nearest)));
}

/** The log-votes of the predicted class and of one rival class; what follows is `clustr_core.certificates.soft`. */
function ballot(plane, prediction, rivalClass) {
  const { z, centroids, labels, variance } = plane;
  const of = (label) => centroids.filter((_, j) => labels[j] === label);
  const [own, rivals] = [of(prediction), of(rivalClass)];
  const vote = (centroid) => -squaredDistances(z, [centroid])[0] / (2 * variance);
  const middle = meanOf(centroids.map(() => 1 / centroids.length), centroids);
  const rounding = 8 * (2 + 8) * Number.EPSILON * Math.max(...squaredDistances(middle, centroids));
  return { own, rivals, variance, rounding, ownVotes: own.map(vote), rivalVotes: rivals.map(vote) };
}

const meanOf = (weights, places) => [0, 1].map((axis) => sum(places.map((place, i) => weights[i] * place[axis])));

/** ||mu_j - mu_q|| / sigma^2 for each rival j: how fast its vote can gain. */
function pulls({ own, rivals, variance, rounding }, weights) {
  return squaredDistances(meanOf(weights, own), rivals).map((square) => Math.sqrt(square + rounding) / variance);
}

/** The largest rho at which the rivals' votes add up to no more than the own ones, by bisection. */
function reach(votes, weights) {
  const { ownVotes, rivalVotes } = votes;
  const speeds = pulls(votes, weights);
  const entropy = -sum(weights.map((weight) => (weight > 0 ? weight * Math.log(weight) : 0)));
  const plain = sum(weights.map((weight, i) => weight * ownVotes[i])) + entropy;
  const level = plain - 64 * Number.EPSILON * (Math.max(...rivalVotes.map(Math.abs)) + Math.abs(plain) + 1);
  const gap = level - logSumExp(rivalVotes);
  if (!(gap > 0)) return 0;
  let low = Math.max(gap / Math.max(...speeds), 0);
  let high = Math.max(Math.min(...rivalVotes.map((vote, j) => (level - vote) / speeds[j])), low);
  for (let n = 0; n < BISECTIONS; n += 1) {
    const half = (low + high) / 2;
    if (logSumExp(rivalVotes.map((vote, j) => vote + half * speeds[j])) <= level) low = half;
    else high = half;
  }
  return low;
}

/** The own log-votes, up to a constant, where an attack of this radius is expected. */
function expectedVotes(votes, weights, radius) {
  const { own, rivals, variance, ownVotes, rivalVotes } = votes;
  const speeds = pulls(votes, weights).map((speed) => Math.max(speed, TINY));
  const force = softmax(rivalVotes.map((vote, j) => vote + radius * speeds[j])).map((share, j) => share / speeds[j]);
  const mean = meanOf(weights, own);
  const push = meanOf(force, rivals.map((rival) => minus(mean, rival)));
  return own.map((centroid, i) => ownVotes[i] - (dot(push, centroid) * radius) / variance ** 2);
}

/** The multipliers of the nearest rule's exact radius to the rival class's nearest centroid, as weights. */
function hardWeights({ own, rivals, ownVotes, rivalVotes, variance }, shares) {
  const j = indexOfMost(rivalVotes);
  const { touched, multipliers } = leastStep(own.map((centroid, i) =>
    ({ normal: minus(rivals[j], centroid), gap: (ownVotes[i] - rivalVotes[j]) * variance })));
  const total = sum(multipliers);
  return total > 0 ? own.map((_, i) => Math.max(multipliers[touched.indexOf(i)] ?? 0, 0) / total) : shares;
}

/** The best radius over weights: the shares at z, each own centroid alone, the hard rule's, and refined ones. */
function dualReach(votes, shares) {
  let [best, weights] = [reach(votes, shares), shares];
  const improves = (trial) => {
    const found = reach(votes, trial);
    if (!(found > best)) return false;
    [best, weights] = [found, trial];
    return true;
  };
  shares.forEach((_, alone) => improves(shares.map((__, i) => Number(i === alone))));
  improves(hardWeights(votes, shares));
  let step = 1;
  for (let n = 0; n < REFINEMENTS; n += 1) {
    const known = weights.map((weight) => Math.log(Math.max(weight, TINY)));
    const expected = expectedVotes(votes, weights, best);
    if (!improves(softmax(known.map((value, i) => value + step * (expected[i] - value))))) step /= 2;
  }
  return best;
}

/** soft-global, soft-local, soft-lse and soft-dual: each the least over the rival classes. */
function softLadder(plane) {
  const prediction = predictedAt(plane.z, plane, "soft");
  const classes = [...new Set(plane.labels)].filter((label) => label !== prediction);
  const found = classes.map((rivalClass) => {
    const votes = ballot(plane, prediction, rivalClass);
    const shares = softmax(votes.ownVotes);
    const margin = logSumExp(votes.ownVotes) - logSumExp(votes.rivalVotes);
    const farthest = Math.max(...votes.own.flatMap((centroid) => squaredDistances(centroid, votes.rivals)));
    return {
      rivalClass,
      "soft-global": (margin * plane.variance) / Math.sqrt(farthest),
      "soft-local": margin / Math.max(...pulls(votes, shares)),
      "soft-lse": reach(votes, shares),
      "soft-dual": dualReach(votes, shares),
    };
  });
  return Object.fromEntries(SOFT_BOUNDS.map((bound) => [
    bound, leastOf(found.map((each) => ({ radius: each[bound] || 0, rivalClass: each.rivalClass }))),
  ]));
}

/** The shortest step seen to change the soft rule's class along rays a degree apart; null if none. */
function shortestFlip(plane, rays = 360, lengths = 40) {
  const { z, centroids } = plane;
  const prediction = predictedAt(z, plane, "soft");
  const far = 1.5 * Math.sqrt(Math.max(...squaredDistances(z, centroids)));
  // close to z the lengths are dense: there a flip counts most
  const lengthOf = (n) => far * (n / lengths) ** 2;
  let best = null;
  for (let ray = 0; ray < rays; ray += 1) {
    const direction = [Math.cos((2 * Math.PI * ray) / rays), Math.sin((2 * Math.PI * ray) / rays)];
    const flips = (by) => predictedAt([z[0] + by * direction[0], z[1] + by * direction[1]], plane, "soft") !== prediction;
    for (let n = 1; n <= lengths && !(lengthOf(n - 1) >= best?.radius); n += 1) {
      if (!flips(lengthOf(n))) continue;
      let [low, high] = [lengthOf(n - 1), lengthOf(n)];
      for (let turn = 0; turn < BISECTIONS; turn += 1) {
        const half = (low + high) / 2;
        [low, high] = flips(half) ? [low, half] : [half, high];
      }
      if (!(high >= best?.radius)) best = { radius: high, step: scaled(direction, high) };
      break;
    }
  }
  return best;
}

// ---- regions: convex polygons, each edge with the one who made it ----

const rectangle = ([left, right, bottom, top]) =>
  ({ corners: [[left, bottom], [right, bottom], [right, top], [left, top]], walls: [-1, -1, -1, -1] });

/** The part of a polygon where values, linear between its corners, are at most 0. */
function clipped({ corners, walls }, values, wall) {
  const cut = { corners: [], walls: [] };
  const add = (corner, edge) => { cut.corners.push(corner); cut.walls.push(edge); };
  corners.forEach((corner, k) => {
    const n = (k + 1) % corners.length;
    const [here, there] = [values[k], values[n]];
    if (here <= 0) add(corner, walls[k]);
    if (here <= 0 === there <= 0) return;
    const share = here / (here - there);
    add([0, 1].map((axis) => corner[axis] + share * (corners[n][axis] - corner[axis])), here <= 0 ? wall : walls[k]);
  });
  return cut;
}

/** The edges of a polygon whose maker is wanted. */
function edgesOf({ corners, walls }, wanted) {
  return corners.flatMap((corner, k) => (wanted(walls[k]) ? [[corner, corners[(k + 1) % corners.length]]] : []));
}

/** The Voronoi cells within a rectangle [left, right, bottom, top]; an edge is made by a neighbour, or by -1. */
function voronoiCells(centroids, view) {
  return centroids.map((centroid, i) => centroids.reduce((cell, other, j) => {
    const normal = minus(other, centroid);
    // of two centroids at one place the first is taken to be the nearest
    if (norm(normal) === 0) return j < i ? { corners: [], walls: [] } : cell;
    const middle = scaled([centroid[0] + other[0], centroid[1] + other[1]], 0.5);
    return clipped(cell, cell.corners.map((corner) => dot(normal, minus(corner, middle))), j);
  }, rectangle(view)));
}

/** The soft rule's regions, on a grid: polygons to fill, and pieces of their borders. */
function softRegions(plane, [left, right, bottom, top], cells) {
  const place = (row, column) => [left + ((right - left) * column) / cells, bottom + ((top - bottom) * row) / cells];
  const at = (n) => [Math.floor(n / (cells + 1)), n % (cells + 1)];
  const grid = Array.from({ length: (cells + 1) ** 2 }, (_, n) => {
    const logits = logitsAt(place(...at(n)), plane, "soft");
    const first = indexOfMost(logits);
    return { logits, first, second: Math.max(...logits.filter((__, label) => label !== first)) };
  });
  const behind = (label) => ({ logits, first, second }) => (label === first ? second : logits[first]) - logits[label];
  // where three classes meet, straight borders in a cell would leave a hole: there the grid is finer
  const meets = (n) => at(n)[1] < cells && new Set([0, 1, cells + 1, cells + 2].map((k) => grid[n + k]?.first)).size > 2;
  const finer = grid.flatMap((_, n) => (cells > 8 && n < cells * (cells + 1) && meets(n) ? [n] : []));
  const regions = [...new Set(plane.labels)].map((label) =>
    ({ label, ...regionOf(grid.map(behind(label)), cells, place, new Set(finer)) }));
  return [...regions, ...finer.flatMap((n) => {
    const [[x1, y1], [x2, y2]] = [place(...at(n)), place(...at(n + cells + 2))];
    return softRegions(plane, [x1, x2, y1, y2], 8);
  })];
}

/** Where a grid of values is at most 0: whole cells, merged in a row, and cut ones with their piece of border. */
function regionOf(values, cells, place, skipped) {
  const [polygons, border] = [[], []];
  const square = (row, from, to) => [place(row, from), place(row, to), place(row + 1, to), place(row + 1, from)];
  for (let row = 0; row < cells; row += 1) {
    let start = -1;
    for (let column = 0; column <= cells; column += 1) {
      const n = row * (cells + 1) + column;
      const around = skipped.has(n) ? [1] : [values[n], values[n + 1], values[n + cells + 2], values[n + cells + 1]];
      const whole = column < cells && Math.max(...around) <= 0;
      if (whole && start < 0) start = column;
      if (whole) continue;
      if (start >= 0) polygons.push(square(row, start, column));
      start = -1;
      if (column === cells || Math.min(...around) > 0) continue;
      const cut = clipped({ corners: square(row, column, column + 1), walls: [-1, -1, -1, -1] }, around, 0);
      polygons.push(cut.corners);
      border.push(...edgesOf(cut, (wall) => wall === 0));
    }
  }
  return { polygons, border };
}

// ---- data and text ----

/** A check of a part of the data, whose name comes first in a complaint. */
function within(name, check) {
  try {
    return check();
  } catch (error) {
    throw error instanceof DataError ? new DataError(`${name}.${error.message}`) : error;
  }
}

function readPreset(preset, classes) {
  const need = (name, right, expected) => {
    if (!right) throw new DataError(`${name}: expected ${expected}, got ${JSON.stringify(preset[name])}`);
    return preset[name];
  };
  const positive = (name) => need(name, field(preset, name, "number") > 0, "a positive number");
  const point = (name) => points({ [name]: [preset[name]] }, name, 2)[0];
  const [centroids, labels] = [points(preset, "centroids", 2), field(preset, "labels", "numbers")];
  const count = centroids.length;
  need("centroids", count >= FEWEST && count <= MOST, `${FEWEST} to ${MOST} points`);
  const known = labels.length === count && labels.every((label) => classes[label]);
  need("labels", known, `a class below ${classes.length} for each of ${count} centroids`);
  return {
    centroids, labels, z: point("z"), centre: point("centre"), half: positive("half"), variance: positive("variance"),
    lipschitz: positive("lipschitz"), rule: need("rule", RULES.includes(preset.rule), RULES.join(" or ")),
    shown: field(preset, "shown", "strings"), title: field(preset, "title", "string"),
    lesson: field(preset, "lesson", "string"),
  };
}

/** An object of texts. */
function readTexts(data, name, texts) {
  const look = field(data, name, "object");
  within(name, () => texts.forEach((text) => field(look, text, "string")));
  return look;
}

function read(data) {
  const [classes, presets] = [field(data, "classes", "array"), field(data, "presets", "array")];
  if (!presets.length) throw new DataError("presets: expected at least one, got none");
  classes.forEach((_, n) => within("classes", () => readTexts(classes, n, ["color", "marker"])));
  const bounds = field(data, "bounds", "object");
  for (const name of [...HARD_BOUNDS, ...SOFT_BOUNDS, ...Object.values(UNSOUND)]) {
    within("bounds", () => readTexts(bounds, name, ["name", "about", "color", "dash", "marker"]));
  }
  return { classes, bounds, presets: presets.map((_, n) =>
    within("presets", () => within(n, () => readPreset(field(presets, n, "object"), classes)))) };
}

/** A Python program that prints `certified_radius` for some bounds; classes are counted from 0 without holes. */
function pythonText(state, bounds) {
  const present = [...new Set(state.labels)].sort((a, b) => a - b);
  const rows = state.centroids.map(([x, y]) => `        [${x}, ${y}],`).join("\n");
  const names = bounds.map((bound) => `"${bound}"`).join(", ");
  return `import torch

import clustr_core as cc

z = torch.tensor([[${state.z.join(", ")}]], dtype=torch.float64)
centroids = torch.tensor(
    [
${rows}
    ],
    dtype=torch.float64,
)
labels = torch.tensor([${state.labels.map((label) => present.indexOf(label)).join(", ")}])
variance = torch.full((${state.labels.length},), ${state.variance}, dtype=torch.float64)
clusters = cc.Clusters(centroids, labels, variance)

for bound in (${names}):
    radius = cc.certified_radius(z, clusters, bound=bound, lipschitz=${state.lipschitz}, rule="${state.rule}")
    print(f"{bound:11} {float(radius):.9f}")
`;
}

const subscript = (j) => `μ${"₁₂₃₄₅₆₇₈"[j]}`;
const rounded = (value) => Math.round(value * 1e4) / 1e4;
const ink = (color) => (color === "#000000" ? "var(--ink)" : color);

/** Who decides, in a few signs. */
function decider(found) {
  if (!(found.radius > 0)) return "–";
  if (found.rivalClass !== undefined) return `class ${found.rivalClass}`;
  return `${subscript(found.rival)} vs ${found.own.map(subscript).join(", ")}`;
}

// ---- what is seen ----

export default widget("Certificate explorer", ({ root, data, announce, onCleanup }) => {
  const { classes, bounds, presets } = read(data);
  const state = {};
  const start = (preset) => Object.assign(state, structuredClone(preset), { shown: new Set(preset.shown), selected: 0 });
  start(presets[0]);
  let chosen = 0;

  const lesson = html("p", { class: "ce-lesson" });
  const plot = svg("svg", { role: "group", "aria-label": "The plane of embeddings, with points that move" });
  const holder = html("div", { class: "ce-plot" }, plot);
  const verdict = html("p", { class: "ce-key" });
  const body = html("tbody");
  const heads = ["bound", "radius", "decided by"].map((text) =>
    html("th", { scope: "col", class: text === "radius" && "ce-number" }, text));
  const table = html("table", {}, html("thead", {}, html("tr", {}, heads)), body);
  const remark = html("p", { class: "note" });
  const code = html("pre", { tabindex: 0, "aria-label": "Python" });
  const glossary = html("dl");
  const clip = `ce-${Math.random().toString(36).slice(2)}`;
  let width = 0;

  const boundsNow = () => (state.rule === "soft" ? [...HARD_BOUNDS, ...SOFT_BOUNDS] : HARD_BOUNDS);
  const unsound = () => UNSOUND[state.rule];

  /** Every radius at once, in units of the embedding. */
  function ladderNow() {
    if (new Set(state.labels).size < 2) return undefined;
    const soft = state.rule === "soft" ? { ...softLadder(state), found: shortestFlip(state) } : {};
    return { ...hardLadder(state, state.rule), ...soft, [unsound()]: unsoundClaim(state, state.rule) };
  }

  let timer;
  onCleanup(() => clearTimeout(timer));
  function tell(text) {
    clearTimeout(timer);
    timer = setTimeout(() => announce(text()), 250);
  }

  /** At once, and instead of what is still to be told. */
  function tellNow(text) {
    clearTimeout(timer);
    announce(text);
  }

  function summary(ladder) {
    if (!ladder) return "one class is left: no radius";
    const radii = boundsNow().filter((bound) => state.shown.has(bound));
    const texts = radii.map((bound) => `${bounds[bound].name} ${shown(ladder[bound].radius / state.lipschitz)}`);
    return [`z is in class ${predictedAt(state.z, state, state.rule)}`, ...texts].join(", ");
  }

  const layers = Object.fromEntries(["axes", "regions", "discs", "handles", "labels"].map((name) => [name, svg("g")]));
  const opening = svg("clipPath", { id: clip });
  plot.append(svg("defs", {}, opening), ...Object.values(layers));
  for (const name of ["regions", "discs"]) layers[name].setAttribute("clip-path", `url(#${clip})`);
  for (const name of ["regions", "discs", "labels"]) layers[name].setAttribute("aria-hidden", "true");

  function frame() {
    const side = Math.min(width, 520) - 58;
    const box = { left: 48, right: 48 + side, top: 10, bottom: 10 + side };
    const [cx, cy] = state.centre;
    return {
      box,
      x: linear([cx - state.half, cx + state.half], [box.left, box.right]),
      y: linear([cy - state.half, cy + state.half], [box.bottom, box.top]),
      view: [cx - state.half, cx + state.half, cy - state.half, cy + state.half],
    };
  }

  const pixels = ({ x, y }, places) => places.map((place) => [x(place[0]), y(place[1])]);
  const closed = (area, places) => (places.length ? `${path(pixels(area, places))}Z` : "");

  const lines = (area, pieces) => pieces.map((piece) => path(pixels(area, piece))).join("");

  /** A place on the way to where a bound stops. */
  const along = ({ step }, share) => [0, 1].map((axis) => state.z[axis] + share * step[axis]);

  function drawFrame(area) {
    const { box } = area;
    plot.setAttribute("width", box.right + 10);
    plot.setAttribute("height", box.bottom + 42);
    const side = box.right - box.left;
    opening.replaceChildren(svg("rect", { x: box.left, y: box.top, width: side, height: side }));
    layers.axes.replaceChildren(axes({ ...area, xLabel: "first coordinate", yLabel: "second coordinate" }));
  }

  function fills(area) {
    if (state.rule === "soft") {
      return softRegions(state, area.view, 48).map(({ label, polygons, border }) => ({
        label, fill: polygons.map((polygon) => closed(area, polygon)).join(""),
        border: lines(area, border), inner: "",
      }));
    }
    return voronoiCells(state.centroids, area.view).map((cell, i) => {
      const edges = (same) => lines(area, edgesOf(cell, (j) => j > i && (state.labels[j] === state.labels[i]) === same));
      return { label: state.labels[i], fill: closed(area, cell.corners), border: edges(false), inner: edges(true) };
    });
  }

  function drawRegions(area) {
    const parts = fills(area);
    const line = (kind, look) =>
      svg("path", { d: parts.map((part) => part[kind]).join(""), fill: "none", stroke: "var(--ink)", ...look });
    const colour = ({ label, fill }) => svg("path", { d: fill, fill: classes[label].color, "fill-opacity": 0.2,
      "shape-rendering": "crispEdges", "data-region": label });
    layers.regions.replaceChildren(
      ...parts.map(colour),
      line("inner", { "stroke-width": 1.1, "stroke-dasharray": "1.5 3" }),
      line("border", { "stroke-width": 1.3 }),
    );
  }

  function disc(area, bound, found) {
    const look = bounds[bound];
    const stroke = { stroke: ink(look.color), "stroke-dasharray": look.dash || undefined, fill: "none" };
    const [cx, cy] = [area.x(state.z[0]), area.y(state.z[1])];
    const r = area.x(found.radius / state.lipschitz) - area.x(0);
    const width = bound === "pairwise" ? 3 : 2;
    const parts = [svg("circle", { cx, cy, r, ...stroke, "stroke-width": width, "data-disc": bound })];
    if (found.step && found.radius > 0) parts.push(...stop(area, bound, found, stroke));
    return svg("g", {}, parts);
  }

  /** The way to where a bound stops, its marker there, and the wall of the pair that decides. */
  function stop(area, bound, found, stroke) {
    const [[x1, y1], [x2, y2]] = pixels(area, [state.z, along(found, 1)]);
    const parts = found.walls.map(({ normal, gap }) => {
      const whole = rectangle(area.view);
      const cut = clipped(whole, whole.corners.map((corner) => dot(normal, minus(corner, state.z)) - gap), 0);
      return svg("path", { d: lines(area, edgesOf(cut, (wall) => wall === 0)), ...stroke, "stroke-width": 1 });
    });
    parts.push(svg("line", { x1, y1, x2, y2, stroke: stroke.stroke, "stroke-width": 1.6 }));
    if (bound === "exact") parts.push(arrowHead(x1, y1, x2, y2, stroke.stroke));
    else parts.push(mark(bounds[bound].marker, x2, y2, 4.5, { fill: stroke.stroke, stroke: "var(--paper)" }));
    return parts;
  }

  function arrowHead(x1, y1, x2, y2, fill) {
    const angle = Math.atan2(y2 - y1, x2 - x1);
    const side = (turn) => [x2 - 10 * Math.cos(angle + turn), y2 - 10 * Math.sin(angle + turn)];
    return svg("path", { d: `${path([[x2, y2], side(0.42), side(-0.42)])}Z`, fill });
  }

  function drawDiscs(area, ladder) {
    if (!ladder) return layers.discs.replaceChildren();
    const order = [unsound(), "pairwise", "nearest", "triangle", ...SOFT_BOUNDS, "exact"];
    const drawn = order.filter((bound) => state.shown.has(bound) && ladder[bound]);
    layers.discs.replaceChildren(...drawn.map((bound) => disc(area, bound, ladder[bound])));
    if (ladder.found) {
      const [x, y] = pixels(area, [along(ladder.found, 1)])[0];
      layers.discs.append(mark("x", x, y, 6, { fill: "var(--warn)", stroke: "var(--paper)", "stroke-width": 1 }));
    }
  }

  let handles = [];

  /** Where a point is drawn: at the edge if it is out of sight. */
  const clamped = ({ view }, place) =>
    place.map((value, axis) => Math.min(Math.max(value, view[2 * axis]), view[2 * axis + 1]));

  function pointLabel(j) {
    const place = state.centroids[j].map((value) => shown(value)).join(", ");
    const keys = "arrow keys move it, C changes its class, Delete removes it";
    return `centroid ${j + 1} of class ${state.labels[j]} at ${place}; ${keys}`;
  }

  function makeHandle(at, move, label) {
    // what is pressed stays, however often the picture under it is drawn: else no click would follow
    const picture = svg("g");
    const node = svg("g", {}, picture, svg("circle", { r: 15, fill: "transparent" }));
    draggable(node, plot, { label, at, step: 0.05, scales: () => { const { x, y } = frame(); return [x, y]; },
      move: (x, y) => {
        move([rounded(x), rounded(y)]);
        draw();
      } });
    layers.handles.append(node);
    return { node, picture, at, label };
  }

  function centroidHandle(j) {
    const handle = makeHandle(() => state.centroids[j], (place) => { state.centroids[j] = place; }, () => pointLabel(j));
    handle.node.dataset.centroid = j;
    let pressed = [0, 0];
    handle.node.addEventListener("focus", () => redraw({ selected: j }));
    handle.node.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; });
    handle.node.addEventListener("click", (event) => {
      if (Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < 4) nextClass(j);
    });
    handle.node.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey) return;
      if (["c", "C", "Enter", " "].includes(event.key)) nextClass(j);
      else if (["Delete", "Backspace"].includes(event.key)) remove(j);
      else return;
      event.preventDefault();
    });
    return handle;
  }

  function makeHandles() {
    layers.handles.replaceChildren();
    handles = state.centroids.map((_, j) => centroidHandle(j));
    const z = makeHandle(() => state.z, (place) => { state.z = place; }, () =>
      `z at ${shown(state.z[0])}, ${shown(state.z[1])}; arrow keys move it`);
    z.node.dataset.point = "z";
    handles.push(z);
  }

  function handleMark(j, inside) {
    if (j === state.centroids.length) {
      return svg("circle", { r: 6.5, fill: "var(--ink)", stroke: "var(--paper)", "stroke-width": 2 });
    }
    const { color, marker } = classes[state.labels[j]];
    const width = j === state.selected ? 2.4 : 1.1;
    return mark(marker, 0, 0, 7.5, { fill: inside ? color : "var(--paper)", stroke: "var(--ink)", "stroke-width": width });
  }

  function drawHandles(area, ladder = {}) {
    // labels keep off the ways from z, too
    const taken = Object.keys(ladder).filter((bound) => state.shown.has(bound) && ladder[bound].step).flatMap((bound) =>
      pixels(area, [0.4, 0.7, 1].map((share) => along(ladder[bound], share))).map((place) => [...place, 3, 3]));
    const names = handles.map(({ node, picture, at, label }, j) => {
      const place = at();
      const near = clamped(area, place);
      const inside = near[0] === place[0] && near[1] === place[1];
      const [x, y] = pixels(area, [near])[0];
      node.setAttribute("transform", `translate(${x} ${y})`);
      node.setAttribute("aria-label", label());
      Object.assign(node.dataset, { x: place[0], y: place[1], class: state.labels[j] ?? "" });
      picture.replaceChildren(handleMark(j, inside));
      taken.push([x, y, 9, 9]);
      const name = j < state.centroids.length ? subscript(j) : "z";
      return { x, y, text: inside ? name : `${name} at (${place.map((value) => shown(value)).join(", ")})` };
    });
    layers.labels.replaceChildren(...names.map((name) => placedLabel(area.box, name, taken)));
  }

  /** A label beside its point, on the first side where nothing stands yet. */
  function placedLabel(box, { x, y, text }, taken) {
    const half = 3.6 * text.length + 2;
    const sides = [[half + 8, -11], [-half - 8, -11], [half + 8, 14], [-half - 8, 14], [0, -19], [0, 21],
      [half, 27], [-half, 27], [half, -27], [-half, -27]];
    const free = ([dx, dy]) => {
      const [cx, cy] = [x + dx, y + dy];
      const seen = cx - half >= box.left && cx + half <= box.right && cy - 8 > box.top && cy + 8 < box.bottom;
      return seen && taken.every(([tx, ty, w, h]) => Math.abs(tx - cx) > w + half || Math.abs(ty - cy) > h + 7);
    };
    const [dx, dy] = sides.find(free) ?? sides[0];
    taken.push([x + dx, y + dy, half, 7]);
    return svg("text", { x: x + dx, y: y + dy + 4, "text-anchor": "middle", class: "ce-halo", "font-size": 13 }, text);
  }

  const icon = (width, ...parts) => svg("svg", { width, height: 16, "aria-hidden": "true" }, parts);

  function swatch(bound) {
    const look = bounds[bound];
    const stroke = ink(look.color);
    const end = bound === "exact" ? arrowHead(0, 8, 31, 8, stroke) : mark(look.marker, 26, 8, 4.2, { fill: stroke });
    return icon(34,
      svg("line", { x1: 1, x2: 33, y1: 8, y2: 8, stroke, "stroke-width": 2, "stroke-dasharray": look.dash || undefined }),
      end);
  }

  function boundRow(bound) {
    const box = html("input", { type: "checkbox", checked: state.shown.has(bound), change: () => {
      if (box.checked) state.shown.add(bound);
      else state.shown.delete(bound);
      draw();
    } });
    return row(bound, bounds[bound].name, box, swatch(bound));
  }

  function row(bound, name, ...before) {
    const label = html("label", {}, before, html("span", {}, name));
    return html("tr", { "data-bound": bound }, html("td", {}, label), html("td", { class: "ce-number" }), html("td"));
  }

  function groupRow(text) {
    return html("tr", { class: "ce-group" }, html("td", { colspan: 3 }, text));
  }

  function makeTable() {
    const soft = state.rule === "soft";
    const cross = icon(56, mark("x", 39, 8, 6, { fill: "var(--warn)" }));
    body.replaceChildren(
      groupRow(soft ? "Bounds of the nearest rule, less σ² log k" : "Certificates, each at least the one above"),
      ...HARD_BOUNDS.map(boundRow),
      ...(soft ? [groupRow("Bounds of the soft rule"), ...SOFT_BOUNDS.map(boundRow)] : []),
      groupRow("Unsound, to be refuted"), boundRow(unsound()),
      ...(soft ? [groupRow("By search: no certificate exceeds it"), row("found", "flip found", cross)] : []),
    );
    const listed = [...boundsNow(), unsound()];
    glossary.replaceChildren(...listed.map((bound) => bounds[bound]).flatMap(({ name, about }) =>
      [html("dt", {}, name), html("dd", {}, about)]));
  }

  function fillTable(ladder) {
    const truth = ladder && (state.rule === "soft" ? ladder.found : ladder.exact);
    for (const row of body.querySelectorAll("[data-bound]")) {
      const bound = row.dataset.bound;
      const found = ladder?.[bound];
      const [, number, by] = row.children;
      row.dataset.radius = found ? String(found.radius / state.lipschitz) : "";
      row.dataset.stop = found?.step ? along(found, 1).join(",") : "";
      number.textContent = found ? (found.radius / state.lipschitz).toFixed(3) : "–";
      by.textContent = !found ? "–" : bound === "found" ? "search" : decider(found);
      const broken = bound === unsound() && truth && found.radius > truth.radius * (1 + 1e-9);
      row.classList.toggle("ce-broken", Boolean(broken));
      if (broken) by.textContent = `broken at ${(truth.radius / state.lipschitz).toFixed(3)}`;
    }
  }

  function drawVerdict() {
    const prediction = predictedAt(state.z, state, state.rule);
    const sign = ({ marker, color }) => icon(18, mark(marker, 9, 8, 6, { fill: color, stroke: "var(--ink)" }));
    const present = [...new Set(state.labels)].sort((a, b) => a - b);
    verdict.replaceChildren(html("strong", {}, `z is in class ${prediction}`),
      ...present.map((label) => html("span", {}, sign(classes[label]), `class ${label}`)));
    Object.assign(plot.dataset, { prediction, rule: state.rule, z: state.z.join(",") });
  }

  function remarkText(ladder) {
    if (!ladder) return "Only one class is left, and without a rival there is nothing to certify.";
    const walls = state.rule === "nearest" ? "Dotted: walls between cells of one class."
      : "Cross: where the shortest step found changes the class.";
    const stretched = state.lipschitz === 1 ? [] : [
      "Discs have the certified input radius, distance over L; the lines from z keep their length.",
    ];
    return [
      "Drag z or a centroid, or move it with the arrow keys; a click or the key C changes a centroid's class.",
      `Solid: borders between classes. ${walls} Each bound's radius is a disc in its own line; from z a line leads to`,
      "where it stops, at the wall of the pair that decides.", ...stretched,
    ].join(" ");
  }

  function nextClass(j) {
    state.labels[j] = (state.labels[j] + 1) % classes.length;
    draw();
  }

  function remove(j) {
    if (state.centroids.length <= FEWEST) return tell(() => `at least ${FEWEST} centroids stay`);
    state.centroids.splice(j, 1);
    state.labels.splice(j, 1);
    state.selected = Math.min(j, state.centroids.length - 1);
    const hadFocus = layers.handles.contains(root.getRootNode().activeElement);
    renew();
    if (hadFocus) handles[state.selected].node.focus();
  }

  function add() {
    // golden angles: no two new centroids at one place
    const turn = 2.4 * state.centroids.length;
    const away = scaled([Math.cos(turn), Math.sin(turn)], 0.75 * state.half);
    state.centroids.push([rounded(state.centre[0] + away[0]), rounded(state.centre[1] + away[1])]);
    state.labels.push(state.labels[state.selected]);
    state.selected = state.centroids.length - 1;
    renew();
  }

  function redraw(changes) {
    Object.assign(state, changes);
    draw();
  }

  const selection = html("select", { "aria-label": "Centroid", change: () => redraw({ selected: +selection.value }) });
  const addButton = button("Add", add, { "aria-label": "Add a centroid" });
  const removeButton = button("Remove", () => remove(state.selected), { "aria-label": "Remove the centroid" });

  function fillSelection() {
    selection.replaceChildren(...state.labels.map((label, j) =>
      html("option", { value: j, selected: j === state.selected }, `${subscript(j)}, class ${label}`)));
    addButton.disabled = state.centroids.length >= MOST;
    removeButton.disabled = state.centroids.length <= FEWEST;
  }

  const lipschitzSlider = slider("Lipschitz constant L", {
    min: 0.5, max: 4, step: 0.1, value: state.lipschitz, input: (value) => redraw({ lipschitz: value }),
  });
  const sigmaSlider = slider("σ of the votes", {
    min: 0.1, max: 3, step: 0.01, value: 1, input: (value) => redraw({ variance: Number((value ** 2).toPrecision(12)) }),
  });
  const ruleChoice = choice("Rule", RULES.map((rule) => [rule, rule]), state.rule, (rule) => {
    state.rule = rule;
    makeTable();
    draw();
  });
  const presetChoice = choice("Start from", presets.map(({ title }, n) => [String(n), title]), "0", (value) => {
    chosen = Number(value);
    restart();
  });
  const copy = copyButton("Copy as Python", () => code.textContent, tellNow);

  /** After another preset, or a centroid more or less. */
  function renew() {
    lesson.textContent = presets[chosen].lesson;
    ruleChoice.querySelector("select").value = state.rule;
    lipschitzSlider.set(state.lipschitz);
    sigmaSlider.set(Math.sqrt(state.variance));
    makeHandles();
    makeTable();
    draw();
  }

  function restart() {
    start(presets[chosen]);
    renew();
  }

  function draw(said = true) {
    if (!width) return;
    const [area, ladder] = [frame(), ladderNow()];
    drawFrame(area);
    drawRegions(area);
    drawDiscs(area, ladder);
    drawHandles(area, ladder);
    drawVerdict();
    fillSelection();
    fillTable(ladder);
    remark.textContent = remarkText(ladder);
    sigmaSlider.element.style.display = state.rule === "nearest" ? "none" : "";
    copy.disabled = !ladder;
    code.textContent = pythonText(state, boundsNow());
    if (said) tell(() => summary(ladder));
  }

  root.append(
    html("style", {}, LOOK),
    html("div", { class: "bar" }, presetChoice, button("Reset", restart), ruleChoice),
    lesson,
    html("div", { class: "ce-two" }, holder,
      html("div", { class: "ce-side" }, verdict, html("div", { class: "scroll" }, table))),
    remark,
    html("div", { class: "bar", style: "margin-top: 10px" },
      html("label", {}, html("span", {}, "Centroid"), selection),
      button("Next class", () => nextClass(state.selected)), removeButton, addButton,
      button("Zoom in", () => redraw({ half: state.half * 0.8 })),
      button("Zoom out", () => redraw({ half: state.half * 1.25 }))),
    html("div", { class: "bar" }, lipschitzSlider.element, sigmaSlider.element),
    html("div", { class: "bar" }, copy),
    html("details", {}, html("summary", {}, "Python"), code),
    html("details", {}, html("summary", {}, "What each bound is"), glossary),
  );
  renew();
  responsive(holder, (available) => {
    width = available;
    draw(false);
  }, onCleanup);
});
