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


/*
 * Two attacks on one plane: the paper's on scores, a correct one on logits. The reader moves the image; everything is
 * computed here, from the centroids and the variance that the data carry.
 *
 * First the mathematics, which tests hold against clustr_core; then what is shown of it; then the drawing.
 */

// ---------------------------------------------------------------------------------------------- the surfaces

const sum = (values) => values.reduce((total, value) => total + value, 0);
const largestOf = (values) => values.indexOf(Math.max(...values));
const clamped = (value, low, high) => Math.min(Math.max(value, low), high);

/** g_c = -d_c^2 / (2 sigma^2), one cluster a class. */
function logitsAt({ centroids, variance }, [x, y]) {
  return centroids.map(([a, b]) => -((x - a) ** 2 + (y - b) ** 2) / (2 * variance));
}

const rivalOf = (outputs, label) => largestOf(outputs.map((output, c) => (c === label ? -Infinity : output)));

/** Cross-entropy or margin of outputs; without the 1 of the label in the logarithm, a loss of 1e-9 keeps its digits. */
function lossOf(kind, outputs, label) {
  const lead = outputs[rivalOf(outputs, label)] - outputs[label];
  if (kind === "margin") return lead;
  const top = outputs[label] + Math.max(lead, 0);
  const others = sum(outputs.map((output, c) => (c === label ? 0 : Math.exp(output - top))));
  return lead > 0 ? lead + Math.log(others + Math.exp(-lead)) : Math.log1p(others);
}

/** The loss's derivative by each output; the label's own is minus the sum of the others, which loses no digit. */
function slopesOf(kind, outputs, label) {
  const rival = rivalOf(outputs, label);
  const top = Math.max(...outputs);
  const powers = outputs.map((output) => Math.exp(output - top));
  const total = sum(powers);
  const slopes = outputs.map((_, c) => (c === label ? 0 : kind === "margin" ? Number(c === rival) : powers[c] / total));
  slopes[label] = -sum(slopes);
  return slopes;
}

/** What an attack takes for logits. */
function outputsAt(toy, kind, at) {
  const logits = logitsAt(toy, at);
  return kind === "scores" ? logits.map(Math.exp) : logits;
}

/**
 * What an attack sees at a point: the loss that it climbs, its gradient, and whether the point is misclassified.
 *
 * `kind` is "scores" (cross-entropy of softmax(s), s_c = exp(g_c), as the paper's), "ce" or "margin" (of the logits g).
 */
export function climbed(toy, kind, label, at) {
  const outputs = outputsAt(toy, kind, at);
  const slopes = slopesOf(kind, outputs, label);
  const weights = kind === "scores" ? slopes.map((slope, c) => slope * outputs[c]) : slopes;
  const gradient = [0, 1].map((k) =>
    sum(toy.centroids.map((centroid, c) => weights[c] * (centroid[k] - at[k]))) / toy.variance);
  return { loss: lossOf(kind, outputs, label), gradient, wrong: largestOf(outputs) !== label };
}

/**
 * The largest log-margin of another class over the ball, and where it is. Positive: the image is not robust.
 *
 * g_c - g_y is linear in the image, so each channel goes up or down as far as the ball and [0, 1] let it.
 */
export function largestMargin(toy, image, label, eps) {
  const own = toy.centroids[label];
  const rivals = toy.centroids.map((rival, c) => {
    const at = image.map((value, k) => (rival[k] > own[k] ? Math.min(value + eps, 1)
      : rival[k] < own[k] ? Math.max(value - eps, 0) : value));
    const logits = logitsAt(toy, at);
    return { at, rival: c, margin: c === label ? -Infinity : logits[c] - logits[label] };
  });
  return rivals.reduce((best, each) => (each.margin > best.margin ? each : best));
}

/** The region of the view in which the label is predicted: a polygon. */
export function cellOf({ centroids, view: [low, high] }, label) {
  let corners = [[low, low], [high, low], [high, high], [low, high]];
  const own = centroids[label];
  centroids.forEach((rival, c) => {
    if (c === label) return;
    const lead = ([x, y]) => (x - rival[0]) ** 2 + (y - rival[1]) ** 2 - (x - own[0]) ** 2 - (y - own[1]) ** 2;
    corners = corners.flatMap((corner, n) => {
      const next = corners[(n + 1) % corners.length];
      const [here, there] = [lead(corner), lead(next)];
      const share = here / (here - there);
      const crossing = [0, 1].map((k) => corner[k] + share * (next[k] - corner[k]));
      return [...(here >= 0 ? [corner] : []), ...(here * there < 0 ? [crossing] : [])];
    });
  });
  return corners;
}

// ----------------------------------------------------------------------------------------------- the attacks

/** Numbers in [0, 1) from a seed, always the same (mulberry32). */
export function draws(seed, count) {
  let state = (Math.imul(seed, 0x9e3779b1) + 0x6d2b79f5) | 0;
  return Array.from({ length: count }, () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  });
}

/**
 * One restart of sign steps: every point, the start first; it ends where it is misclassified, or after `steps`.
 *
 * `noise` has a draw in [0, 1) for each pixel, the first channel's before the second's; a point of the plane is the
 * mean of each channel. `clipped` says whether the start is kept within [0, 1], which the paper's is not.
 */
export function walk(toy, { kind, image, label, eps, noise, steps, stepSize, clipped }) {
  const each = noise.length / 2;
  const channel = (n) => (n < each ? 0 : 1);
  let pixels = noise.map((draw, n) => image[channel(n)] + eps * (2 * draw - 1));
  if (clipped) pixels = pixels.map((pixel) => clamped(pixel, 0, 1));
  const route = [];
  for (;;) {
    const at = [sum(pixels.slice(0, each)) / each, sum(pixels.slice(each)) / each];
    const found = climbed(toy, kind, label, at);
    route.push({ at, ...found });
    if (found.wrong || route.length > steps) return route;
    pixels = pixels.map((pixel, n) => {
      const moved = pixel + stepSize * Math.sign(found.gradient[channel(n)]);
      return clamped(clamped(moved, image[channel(n)] - eps, image[channel(n)] + eps), 0, 1);
    });
  }
}

/** Which restart the paper's rule keeps: that of the highest loss, of equal ones the last; -1 before the first. */
export function keptByLoss(ends) {
  return ends.reduce((kept, end, n) => (kept < 0 || end.loss >= ends[kept].loss ? n : kept), -1);
}

/** Every restart of the paper's rule: all are run, whatever was found. */
function paperWalks(toy, { image, label, eps, starts }) {
  const rule = { kind: "scores", steps: toy.paperSteps, stepSize: toy.paperStepSize, clipped: false };
  return starts.map((noise) => walk(toy, { ...rule, image, label, eps, noise }));
}

/** Both attacks on an image, to their ends, and the truth. */
export function attacked(toy, { image, label, eps, loss, starts }) {
  const both = { image, label, eps };
  const imageWrong = climbed(toy, loss, label, image).wrong;
  const paper = paperWalks(toy, { ...both, starts });
  const pgd = [];
  // a success ends a correct attack; an image that is misclassified as it stands is one
  for (const noise of imageWrong ? [] : starts) {
    const stepSize = eps * toy.pgdStepOfEps;
    pgd.push(walk(toy, { ...both, kind: loss, noise, steps: toy.pgdSteps, stepSize, clipped: true }));
    if (pgd.at(-1).at(-1).wrong) break;
  }
  return { paper, pgd, imageWrong, truth: largestMargin(toy, image, label, eps) };
}

/** The starts of a seed: in the plane those of the data's seed are the package's own, which the data carry. */
function startsOf(toy, { seed, wide }) {
  if (!wide && seed === toy.seed) return toy.starts;
  const size = wide ? 2 * toy.wideSide ** 2 : 2;
  const all = draws(seed, size * toy.starts.length);
  return toy.starts.map((_, n) => all.slice(n * size, (n + 1) * size));
}

/**
 * The least eps, in tenths of 1/255, and the seed with which the paper's rule loses a success on an image of the plane;
 * nothing if none of 40 seeds does within 1/255 above the eps from which on the image is not robust.
 */
export function lostSuccess(toy, { image, label }) {
  if (climbed(toy, "margin", label, image).wrong) return undefined;
  const most = Math.round(2550 * toy.largestEps);
  const breaks = (tenths) => largestMargin(toy, image, label, tenths / 2550).margin > 0;
  let least = 10;
  while (least <= most && !breaks(least)) least += 1;
  for (let tenths = least; tenths <= Math.min(least + 10, most); tenths += 1) {
    for (let seed = 0; seed < 40; seed += 1) {
      const starts = startsOf(toy, { seed, wide: false });
      const ends = paperWalks(toy, { image, label, eps: tenths / 2550, starts }).map((route) => route.at(-1));
      if (ends.some(({ wrong }) => wrong) && !ends[keptByLoss(ends)].wrong) return { eps: tenths / 2550, seed };
    }
  }
  return undefined;
}

// --------------------------------------------------------------------------------------------------- the data

function positive(data, name) {
  const value = field(data, name, "number");
  if (!(value > 0)) throw new DataError(`${name}: expected a number above 0, got ${value}`);
  return value;
}

function count(data, name, most) {
  const value = field(data, name, "number");
  if (!Number.isInteger(value) || value < 1 || value > most) {
    throw new DataError(`${name}: expected a whole number from 1 to ${most}, got ${value}`);
  }
  return value;
}

function interval(data, name) {
  const [low, high, ...more] = field(data, name, "numbers");
  if (!(low < high) || more.length) throw new DataError(`${name}: expected two numbers, the lower first`);
  return [low, high];
}

function toyOf(data) {
  const toy = {
    centroids: points(data, "centroids", 2), variance: positive(data, "variance"), images: points(data, "images", 2),
    view: interval(data, "view"), eps: positive(data, "eps"), largestEps: positive(data, "largest_eps"),
    paperSteps: count(data, "paper_steps", 500), paperStepSize: positive(data, "paper_step_size"),
    pgdSteps: count(data, "pgd_steps", 500), pgdStepOfEps: positive(data, "pgd_step_of_eps"),
    starts: points(data, "starts", 2), seed: field(data, "seed", "number"), wideSide: count(data, "wide_side", 64),
  };
  const { centroids, images, starts } = toy;
  if (centroids.length < 2) throw new DataError(`centroids: expected two or more, got ${centroids.length}`);
  if (images.length !== centroids.length) {
    throw new DataError(`images: expected one for each of ${centroids.length} centroids, got ${images.length}`);
  }
  if (!starts.length) throw new DataError("starts: expected one or more, got none");
  if (toy.eps > toy.largestEps) {
    throw new DataError(`eps: expected at most largest_eps ${toy.largestEps}, got ${toy.eps}`);
  }
  return toy;
}

// ---------------------------------------------------------------------------------------------- what is said

const minus = (text) => text.replace("-", "−");
const nats = (value) => minus(value && Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toFixed(4));
const twoDigits = (value) => value.toFixed(2);
const of255 = (eps) => `${(255 * eps).toFixed(1)}/255`;
const SURFACES = {
  paper: { title: "The paper’s attack, on scores s", loss: "cross-entropy of softmax(s)" },
  pgd: { title: "A correct PGD, on logits g" },
};
const LOSSES = { margin: "margin", ce: "cross-entropy" };
const LOSS_NAMES = { margin: "margin of g", ce: "cross-entropy of softmax(g)" };
const lossName = (name, state) => SURFACES[name].loss ?? LOSS_NAMES[state.loss];
const kindOf = (name, state) => (name === "paper" ? "scores" : state.loss);

/** The last points of the restarts that have ended by now. */
function endsOf(routes, clock) {
  const ended = (route, n) => n < clock.restart || (n === clock.restart && clock.step >= route.length - 1);
  return routes.filter(ended).map((route) => ({ ...route.at(-1), steps: route.length - 1 }));
}

/** What an attack has to say by now: the ends of its restarts, which one it keeps, and which success it lost. */
function ledgerOf(name, found, clock) {
  const ends = endsOf(found[name], clock);
  const success = ends.findIndex((end) => end.wrong);
  const kept = name === "paper" ? keptByLoss(ends) : success;
  const broken = name === "paper" ? kept >= 0 && ends[kept].wrong : success >= 0 || found.imageWrong;
  const over = ends.length === found[name].length;
  return { ends, kept, broken, over, lost: broken || name === "pgd" ? -1 : success };
}

function truthText({ truth, imageWrong }, eps) {
  if (imageWrong) return "The image itself is misclassified: there is nothing to attack.";
  const margin = `log-margin ${nats(truth.margin)} nats`;
  return truth.margin < 0
    ? `Robust within ${of255(eps)}: no image of the ball is in another class. The one nearest to it has ${margin}.`
    : `Not robust within ${of255(eps)}: an image of the ball is in class ${truth.rival}, with ${margin}.`;
}

function paperText({ ends, kept, broken, over, lost }) {
  if (kept < 0) return ["No restart has ended yet.", ""];
  const after = over ? "" : ", so far";
  const which = `It keeps restart ${kept + 1}, of the highest loss (${nats(ends[kept].loss)})`;
  if (broken) return [`The protocol says “broken”${after}.`, `${which}: misclassified.`];
  const found = lost < 0 ? "No restart ended in another class."
    : `The success of restart ${lost + 1} (${nats(ends[lost].loss)}) is lost.`;
  return [`The protocol says “robust”${after}.`, `${which}: classified correctly. ${found}`];
}

function pgdText({ ends, kept, over }, imageWrong) {
  if (imageWrong) return ["The attack says “broken”.", "The image counts as a success as it stands."];
  if (kept >= 0) {
    const steps = ends[kept].steps === 1 ? "1 step" : `${ends[kept].steps} steps`;
    const why = `Restart ${kept + 1} is in another class after ${steps}. It is kept, and the attack stops.`;
    return ["The attack says “broken”.", why];
  }
  if (!ends.length) return ["No restart has ended yet.", ""];
  return [`The attack says “robust”${over ? "" : ", so far"}.`, `No success in ${ends.length} of its restarts.`];
}

function positionText(state) {
  const [x, y] = state.image.map((value) => value.toFixed(4));
  return `image of class ${state.label}, at ${x} and ${y}; arrow keys move it`;
}

// ------------------------------------------------------------------------------------------------ the drawing

const LOOK = `
.cw .pair { display: inline-flex; gap: 8px; align-items: center; }
.cw .hills { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 20px; }
.cw .hills.stacked { grid-template-columns: minmax(0, 1fr); }
.cw .hill { display: grid; grid-template-rows: subgrid; grid-row: span 6; margin-top: 16px; align-items: start; }
.cw .hill-title { font-weight: 600; font-size: 15px; }
.cw .hill .note { margin: 0 0 6px; font-size: 13px; }
.cw .hill svg text.on-map { fill: #fff; stroke: #000; stroke-width: 3px; paint-order: stroke; font-weight: 600; }
.cw .handle .halo { fill: transparent; stroke: none; }
.cw .handle:focus { outline: none; }
.cw .handle:focus .halo { stroke: #000; stroke-width: 5; }
.cw .handle:focus .halo + .halo { stroke: #5ce1ff; stroke-width: 2.5; }
.cw .verdict { background: var(--panel); border-left: 4px solid var(--line); border-radius: 0 4px 4px 0;
  padding: 7px 10px; margin: 0; }
.cw .hill .verdict { margin: 4px 0 8px; min-height: 82px; align-self: stretch; }
.cw .verdict.false { border-left-color: var(--warn); }
.cw .verdict.true { border-left-color: var(--accent); }
.cw .verdict .agrees { display: block; color: var(--muted); font-size: 13px; }
.cw .verdict.false .agrees { color: var(--warn); font-weight: 600; }
.cw .hill table { width: 100%; font-size: 13px; }
.cw .hill th, .cw .hill td { padding: 2px 6px 2px 0; }
.cw .hill th { font-weight: 600; }
.cw .hill td.lost { color: var(--warn); font-weight: 600; }
.cw .marks { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; padding: 0; margin: 14px 0 0;
  font-size: 13px; }
.cw .marks li { display: inline-flex; gap: 6px; align-items: center; }
.cw .marks svg { flex: none; }
`;
// every 32nd colour of cividis, the figures' colour map: it is read in grey, and by colour-blind eyes
const CIVIDIS = [[0, 35, 79], [28, 57, 111], [68, 79, 108], [98, 101, 111], [126, 124, 120], [156, 149, 118],
  [189, 174, 108], [223, 202, 87], [254, 232, 56]];
const NODES = 121;
const ARROWS = 12;
const BELOW = 98;
const SUCCESS = "#ff5a36";
const EDGE = { fill: "#fff", stroke: "#000", "stroke-width": 1.5, "stroke-linejoin": "round" };
const MARKS = {
  image: (x, y) => [mark("o", x, y, 7, { fill: "#000", stroke: "#fff", "stroke-width": 2.5 })],
  start: (x, y) => [mark("o", x, y, 3.5, { ...EDGE, fill: "none", stroke: "#000", "stroke-width": 4 }),
    mark("o", x, y, 3.5, { fill: "none", stroke: "#fff", "stroke-width": 2 })],
  right: (x, y) => [mark("s", x, y, 5.5, EDGE)],
  wrong: (x, y) => [mark("*", x, y, 6.5, { ...EDGE, fill: SUCCESS, stroke: "#000" })],
  kept: (x, y) => [mark("o", x, y, 12, { fill: "none", stroke: "#000", "stroke-width": 5 }),
    mark("o", x, y, 12, { fill: "none", stroke: "#fff", "stroke-width": 2.5 })],
  truth: (x, y) => [mark("d", x, y, 8, { ...EDGE, fill: "#7df0b0" })],
  centroid: (x, y) => [mark("X", x, y, 5.5, EDGE)],
};

function colourAt(share) {
  const place = clamped(share, 0, 1) * (CIVIDIS.length - 1);
  const below = Math.min(Math.floor(place), CIVIDIS.length - 2);
  return CIVIDIS[below].map((low, k) => Math.round(low + (place - below) * (CIVIDIS[below + 1][k] - low)));
}

const css = (colour) => `rgb(${colour.join(" ")})`;
const isLight = ([red, green, blue]) => 0.3 * red + 0.59 * green + 0.11 * blue > 115;

/** Bands of equal height between round numbers: their borders, and the colour of a value. */
function bandsOf(low, high) {
  const inner = ticks([low, high], 18);
  const step = inner[1] - inner[0];
  const first = step * Math.floor(low / step + 1e-9);
  const number = Math.ceil((high - first) / step - 1e-9);
  const colours = Array.from({ length: number }, (_, band) => colourAt(band / Math.max(number - 1, 1)));
  const colourOf = (value) => colours[clamped(Math.floor((value - first) / step), 0, number - 1)];
  return { first, step, number, colours, colourOf };
}

/** The loss at NODES x NODES points of the view, from the lower left, row by row. */
function lossOnGrid(toy, kind, label) {
  const [low, high] = toy.view;
  const place = (n) => low + ((high - low) * n) / (NODES - 1);
  return Float64Array.from({ length: NODES * NODES }, (_, n) =>
    lossOf(kind, outputsAt(toy, kind, [place(n % NODES), place(Math.floor(n / NODES))]), label));
}

/** A picture of the bands, the losses between the nodes interpolated so that borders are smooth. */
function pictureOf(losses, bands, size) {
  const canvas = html("canvas", { width: size, height: size });
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  for (let row = 0; row < size; row += 1) {
    const up = ((size - row - 0.5) / size) * (NODES - 1);
    const bottom = Math.min(Math.floor(up), NODES - 2);
    for (let column = 0; column < size; column += 1) {
      const along = ((column + 0.5) / size) * (NODES - 1);
      const left = Math.min(Math.floor(along), NODES - 2);
      const at = bottom * NODES + left;
      const share = along - left;
      const lower = losses[at] + share * (losses[at + 1] - losses[at]);
      const upper = losses[at + NODES] + share * (losses[at + NODES + 1] - losses[at + NODES]);
      const colour = bands.colourOf(lower + (up - bottom) * (upper - lower));
      const pixel = 4 * (row * size + column);
      for (let channel = 0; channel < 3; channel += 1) image.data[pixel + channel] = colour[channel];
      image.data[pixel + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

/** A line that is seen on every colour: white on a black edge. */
function cased(d, width, edge = 1.25, attributes = {}) {
  const line = { d, fill: "none", "stroke-linejoin": "round", "stroke-linecap": "round" };
  return [svg("path", { ...line, stroke: "#000", "stroke-width": width + 2 * edge, ...attributes }),
    svg("path", { ...line, stroke: "#fff", "stroke-width": width, ...attributes })];
}

function arrowsOn(toy, kind, label, bands, [x, y]) {
  const [low, high] = toy.view;
  const place = (n) => low + ((high - low) * (n + 0.5)) / ARROWS;
  const length = (0.32 * Math.abs(x(high) - x(low))) / ARROWS;
  const one = (n) => {
    const at = [place(n % ARROWS), place(Math.floor(n / ARROWS))];
    const { loss, gradient: [dx, dy] } = climbed(toy, kind, label, at);
    const size = Math.hypot(dx, dy);
    if (!(size > 0)) return [];
    const [a, b] = [(length * dx) / size, (-length * dy) / size];
    const [toX, toY] = [x(at[0]) + a, y(at[1]) + b];
    const barb = (turn) => [toX - 0.62 * (a * Math.cos(turn) - b * Math.sin(turn)),
      toY - 0.62 * (a * Math.sin(turn) + b * Math.cos(turn))];
    const d = path([[x(at[0]) - a, y(at[1]) - b], [toX, toY]]) + path([barb(0.55), [toX, toY], barb(-0.55)]);
    const stroke = isLight(bands.colourOf(loss)) ? "#000" : "#fff";
    return [svg("path", { d, fill: "none", stroke, "stroke-width": 1.3, "stroke-opacity": 0.75 })];
  };
  return Array.from({ length: ARROWS * ARROWS }, (_, n) => one(n)).flat();
}

/** The sides of a cell that are no side of the view: where its label is lost. */
function borderOf(toy, label, [x, y]) {
  const corners = cellOf(toy, label);
  const onEdge = (one, other) => [0, 1].some((k) => one[k] === other[k] && toy.view.includes(one[k]));
  return corners.map((corner, n) => [corner, corners[(n + 1) % corners.length]])
    .filter(([one, other]) => !onEdge(one, other))
    .map((side) => path(side.map(([a, b]) => [x(a), y(b)]))).join("");
}

function colourBar(bands, title, left, top, width) {
  const each = width / bands.number;
  const every = Math.ceil(bands.number / 6);
  const group = svg("g", { "aria-hidden": "true" });
  bands.colours.forEach((colour, n) => group.append(
    svg("rect", { x: left + n * each, y: top, width: each + 0.5, height: 11, fill: css(colour) })));
  for (let n = 0; n <= bands.number; n += every) {
    const value = Number((bands.first + n * bands.step).toPrecision(6));
    const at = left + n * each;
    group.append(svg("line", { x1: at, x2: at, y1: top + 11, y2: top + 15, stroke: "var(--ink)" }),
      svg("text", { x: at, y: top + 27, "text-anchor": n ? (n === bands.number ? "end" : "middle") : "start" },
        minus(String(value))));
  }
  group.append(svg("text", { x: left + width / 2, y: top + 44, "text-anchor": "middle" }, `${title}, nats`));
  return group;
}

/** Everything on a surface that does not move with the image. */
function groundOf(toy, kind, label, title, box, scales) {
  const [x, y] = scales;
  const side = box.right - box.left;
  const losses = lossOnGrid(toy, kind, label);
  const bands = bandsOf(losses.reduce((a, b) => Math.min(a, b)), losses.reduce((a, b) => Math.max(a, b)));
  const size = Math.round(side * Math.min(window.devicePixelRatio || 1, 2));
  // names on the far side of the view's middle, where there is room
  const [middle, upward] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
  const centroids = toy.centroids.flatMap(([a, b], c) => [...MARKS.centroid(x(a), y(b)),
    svg("text", { class: "on-map", x: x(a) + (x(a) < middle ? -9 : 9), y: y(b) + (y(b) < upward ? -6 : 15),
      "text-anchor": x(a) < middle ? "end" : "start" }, c)]);
  return [
    axes({ x, y, box, xLabel: "channel 1, mean brightness", yLabel: "channel 2, mean brightness",
      xTicks: ticks(toy.view, 4), yTicks: ticks(toy.view, 4), xText: twoDigits, yText: twoDigits }),
    svg("image", { href: pictureOf(losses, bands, size), x: box.left, y: box.top, width: side, height: side }),
    ...arrowsOn(toy, kind, label, bands, scales),
    svg("path", { d: borderOf(toy, label, scales), fill: "none", stroke: "#fff", "stroke-width": 5.5 }),
    svg("path", { d: borderOf(toy, label, scales), fill: "none", stroke: "#000", "stroke-width": 2.5 }),
    ...centroids,
    svg("rect", { x: box.left, y: box.top, width: side, height: side, fill: "none", stroke: "var(--ink)" }),
    colourBar(bands, title, box.left, box.bottom + 48, side),
  ];
}

/** The ball, the walks up to now, and where they ended. */
function movingOf({ found, routes, ledger, clock, state }, box, [x, y]) {
  const [low, high] = [-1, 1].map((sign) => state.image.map((value) => clamped(value + sign * state.eps, 0, 1)));
  const ball = `M${x(low[0])} ${y(low[1])}H${x(high[0])}V${y(high[1])}H${x(low[0])}Z`;
  const pixel = ({ at }) => [x(at[0]), y(at[1])];
  const current = Math.min(clock.restart, routes.length - 1);
  const drawn = cased(ball, 1.5, 1.25, { "stroke-dasharray": "7 6" });
  ledger.ends.forEach((_, n) => {
    if (n !== current) drawn.push(...cased(path(routes[n].map(pixel)), 1, 1, { "stroke-opacity": 0.7 }));
  });
  drawn.push(...MARKS.truth(...pixel(found.truth)));
  if (current >= 0) {
    const walked = routes[current].slice(0, clock.step + 1).map(pixel);
    drawn.push(...cased(path(walked), 2.2), ...MARKS.start(...walked[0]));
    drawn.push(...walked.slice(1).map(([a, b]) => mark("o", a, b, 2.2, { fill: "#fff", stroke: "#000" })));
  }
  ledger.ends.forEach((end) => drawn.push(...MARKS[end.wrong ? "wrong" : "right"](...pixel(end))));
  return [...drawn, ...(ledger.kept < 0 ? [] : keptAt(pixel(ledger.ends[ledger.kept]), box))];
}

function keptAt([x, y], box) {
  const leftward = x > box.right - 60;
  const [aside, anchor] = leftward ? [-17, "end"] : [17, "start"];
  const place = { x: x + aside, y: Math.max(y - 8, box.top + 14), "text-anchor": anchor };
  return [...MARKS.kept(x, y), svg("text", { class: "on-map", ...place }, "kept")];
}

const LEDGER = ["restart", "steps", "loss (nats)", "misclassified", "kept"];

function ledgerTable({ ends, kept, lost, over }, restarts) {
  const head = html("tr", {}, LEDGER.map((name) => html("th", { scope: "col" }, name)));
  const rows = ends.map(({ steps, loss, wrong, at }, n) => {
    const isLost = wrong && lost >= 0;
    const fate = n === kept ? "◎ kept" : isLost ? "✗ lost" : "";
    const cells = [n + 1, steps, nats(loss), wrong ? "★ yes" : "■ no", fate];
    return html("tr", { "data-restart": n + 1, "data-steps": steps, "data-loss": loss, "data-wrong": String(wrong),
      "data-x": at[0], "data-y": at[1], "data-kept": String(n === kept), "data-lost": String(isLost) },
    cells.map((text, cell) => html("td", { class: cell === 4 && isLost ? "lost" : undefined }, text)));
  });
  const rest = (name, text) => html("tr", { class: "faint" }, html("td", {}, name), html("td", { colspan: 4 }, text));
  if (!over) for (let n = ends.length + 1; n <= restarts; n += 1) rows.push(rest(n, "–"));
  else if (ends.length < restarts) rows.push(rest(`${ends.length + 1} to ${restarts}`, "not needed"));
  return html("table", {}, html("thead", {}, head), html("tbody", {}, rows));
}

const MEANINGS = [["image", "the image; drag it"], ["centroid", "centroid of a class, with its number"],
  ["start", "random start"], ["right", "end, classified correctly"], ["wrong", "end, misclassified"],
  ["kept", "what the attack keeps"], ["truth", "largest log-margin in the ball, in closed form"]];

function legend() {
  const picture = (...drawn) => svg("svg", { width: 30, height: 30, viewBox: "-1 -1 32 32", "aria-hidden": "true" },
    svg("rect", { x: -1, y: -1, width: 32, height: 32, rx: 4, fill: css(CIVIDIS[3]) }), drawn);
  const item = (drawn, text) => html("li", {}, picture(...drawn), html("span", {}, text));
  return html("ul", { class: "marks" }, MEANINGS.map(([name, text]) => item(MARKS[name](15, 15), text)),
    item(cased("M4 6H26V24H4Z", 1.5, 1.25, { "stroke-dasharray": "5 4" }), "ball of radius eps, within [0, 1]"),
    item([svg("path", { d: "M3 15H27", stroke: "#fff", "stroke-width": 5.5 }),
      svg("path", { d: "M3 15H27", stroke: "#000", "stroke-width": 2.5 })], "border of the image’s class"),
    item([svg("path", { d: "M6 15H24M18 10L24 15L18 20", fill: "none", stroke: "#fff", "stroke-width": 1.5 })],
      "direction of the gradient; a step takes its two signs"));
}

/** One surface with its attack: a drawing whose image can be moved, and below it what the attack has to say. */
function panelOf(name, toy, state, move) {
  const how = html("p", { class: "note" });
  const read = html("p", { class: "note", "data-read": name });
  const verdict = html("p", { class: "verdict", "data-verdict": name });
  const ledger = html("div", { class: "scroll", "data-ledger": name });
  const [ground, moving] = [svg("g"), svg("g", { "clip-path": `url(#inside-${name})` })];
  const inside = svg("rect");
  const halo = [0, 1].map(() => mark("o", 0, 0, 15, { class: "halo" }));
  const handle = svg("g", { class: "handle" }, halo, MARKS.image(0, 0));
  const { title } = SURFACES[name];
  const plot = svg("svg", { role: "group", "aria-label": `${title}: the loss on the plane`, "data-plot": name },
    svg("clipPath", { id: `inside-${name}` }, inside), ground, moving, handle);
  const heading = html("div", { class: "hill-title" }, title);
  const element = html("div", { class: "hill" }, heading, how, plot, read, verdict, ledger);
  let box;
  let scales;
  let grounded;
  const label = () => `${title}: ${positionText(state)}`;
  draggable(handle, plot, { label, at: () => state.image, move, scales: () => scales, step: 0.001 });

  function resize(width) {
    const side = Math.min(width - 72, 430);
    box = { left: 54, right: 54 + side, top: 6, bottom: 6 + side };
    scales = [linear(toy.view, [box.left, box.right]), linear(toy.view, [box.bottom, box.top])];
    const set = (node, sizes) => Object.entries(sizes).forEach(([key, value]) => node.setAttribute(key, value));
    set(plot, { width: side + 72, height: box.bottom + BELOW });
    set(inside, { x: box.left, y: box.top, width: side, height: side });
  }

  function draw(found, clock) {
    const [kind, routes, entries] = [kindOf(name, state), found[name], ledgerOf(name, found, clock)];
    const key = [kind, state.label, box.right].join(" ");
    if (key !== grounded) {
      ground.replaceChildren(...groundOf(toy, kind, state.label, lossName(name, state), box, scales));
      grounded = key;
    }
    moving.replaceChildren(...movingOf({ found, routes, ledger: entries, clock, state }, box, scales));
    handle.setAttribute("transform", `translate(${scales[0](state.image[0])} ${scales[1](state.image[1])})`);
    handle.setAttribute("aria-label", label());
    how.textContent = howText(name, toy, state);
    readAt(read, toy, kind, state);
    walkerOn(plot, routes, clock);
    judge(verdict, name, found, entries);
    ledger.replaceChildren(ledgerTable(entries, toy.starts.length));
  }
  return { element, resize, draw };
}

function howText(name, toy, state) {
  const [size, steps] = name === "paper" ? [of255(toy.paperStepSize), toy.paperSteps]
    : [of255(state.eps * toy.pgdStepOfEps), toy.pgdSteps];
  const most = `ln\u00a0${toy.centroids.length} = ${nats(Math.log(toy.centroids.length))}`;
  const rule = name === "paper"
    ? `keeps the restart of the highest loss, right or wrong. A correctly classified image has at most ${most} nats.`
    : `keeps any success, and stops there.${state.loss === "margin" ? " A margin above 0: misclassified." : ""}`;
  return `Climbs the ${lossName(name, state)} by ${steps} sign steps of ${size} a restart; ${rule}`;
}

/** The loss and its gradient at the image: to the eye in a few digits, to a test in all. */
function readAt(element, toy, kind, { label, image }) {
  const { loss, gradient: [dx, dy] } = climbed(toy, kind, label, image);
  const short = (value) => minus(Math.abs(value) < 1000 ? value.toPrecision(3) : value.toFixed(0));
  const slope = `(${short(dx)}, ${short(dy)}) nats per unit of brightness`;
  element.textContent = `At the image: loss ${nats(loss)} nats, gradient ${slope}.`;
  Object.assign(element.dataset, { x: image[0], y: image[1], loss, dx, dy });
}

/** Where the current restart stands, in all digits. */
function walkerOn(plot, routes, clock) {
  const restart = Math.min(clock.restart, routes.length - 1);
  if (restart < 0) {
    for (const name of Object.keys(plot.dataset)) if (name !== "plot") delete plot.dataset[name];
    return;
  }
  const step = Math.min(clock.step, routes[restart].length - 1);
  const { at: [x, y], loss, gradient: [dx, dy], wrong } = routes[restart][step];
  Object.assign(plot.dataset, { restart: restart + 1, step, x, y, loss, dx, dy, wrong });
}

function judge(element, name, found, ledger) {
  const [says, why] = name === "paper" ? paperText(ledger) : pgdText(ledger, found.imageWrong);
  const agrees = ledger.broken === found.truth.margin >= 0;
  const held = !ledger.over ? "" : agrees ? "✓ As the closed form has it." : "✗ The closed form says otherwise.";
  element.replaceChildren(html("strong", {}, says), why && ` ${why}`, html("span", { class: "agrees" }, held));
  element.classList.toggle("true", ledger.over && agrees);
  element.classList.toggle("false", ledger.over && !agrees);
  const { broken, over, kept, lost } = ledger;
  Object.assign(element.dataset, { broken, over, kept: kept + 1, lost: lost + 1 });
}

/** What the random starts are worth. */
function luckText({ wideSide }, wide) {
  const pixels = wideSide ** 2;
  return wide
    ? `Now each channel has ${pixels} pixels, and each pixel its own random start and its own steps. The plane shows the ` +
      `mean of each channel, which decides everything. The mean of ${pixels} draws stays near the image, so no start is ` +
      "lucky. Move the image across its centroid: the walks on the left turn to the corner that leads away from it, " +
      "wherever the other classes are."
    : "In the plane a random start may land behind the border by luck, on either surface. " +
      `In ${2 * pixels} dimensions none does: tick the box.`;
}

const PACE = 150;

export default widget("Two hills", ({ root, data, announce, onCleanup }) => {
  const toy = toyOf(data);
  const state = { label: 0, image: [...toy.images[0]], eps: toy.eps, loss: "margin", seed: toy.seed, wide: false };
  // a step of Infinity: that restart has ended, however many steps it takes once the image is moved
  const clock = { restart: 0, step: Infinity };
  const last = toy.starts.length - 1;
  let starts = startsOf(toy, state);
  let found = attacked(toy, { ...state, starts });
  let timer;

  const truth = html("p", { class: "verdict true", "data-truth": "" });
  const luck = html("p", { class: "note" });
  const seed = html("output");
  const panels = Object.keys(SURFACES).map((name) => panelOf(name, toy, state, moveImage));
  const hills = html("div", { class: "hills" }, panels.map(({ element }) => element));
  const playing = button("Play", () => (timer ? pause() : play()), { "aria-pressed": "false" });
  const eps = slider("eps", { min: 1, max: 255 * toy.largestEps, step: 0.1, value: 255 * toy.eps,
    text: (value) => `${value.toFixed(1)}/255`, input: (value) => change({ eps: value / 255 }) });
  const wide = html("input", { type: "checkbox", change: () => change({ wide: wide.checked }, true) });

  function routeEnd() {
    return Math.max(found.paper[clock.restart].length, found.pgd[clock.restart]?.length ?? 0) - 1;
  }

  function draw() {
    truth.replaceChildren(html("strong", {}, "The truth, in closed form: "), truthText(found, state.eps));
    Object.assign(truth.dataset, { margin: found.truth.margin, x: found.truth.at[0], y: found.truth.at[1] });
    luck.textContent = luckText(toy, state.wide);
    seed.textContent = `seed ${state.seed}`;
    for (const panel of panels) panel.draw(found, clock);
  }

  function change(changes, redraws = false) {
    Object.assign(state, changes);
    if (redraws) starts = startsOf(toy, state);
    found = attacked(toy, { ...state, starts });
    draw();
    announce(truthText(found, state.eps));
  }

  function showLost() {
    const lost = lostSuccess(toy, state);
    if (!lost) {
      luck.textContent = "For this image no lost success was found near the least eps that breaks it. Try another image.";
      announce(luck.textContent);
      return;
    }
    wide.checked = false;
    eps.set(Math.round(2550 * lost.eps) / 10);
    change({ ...lost, wide: false }, true);
    jump(last, Infinity);
  }

  function moveImage(...to) {
    const [low, high] = [Math.max(toy.view[0], 0), Math.min(toy.view[1], 1)];
    change({ image: to.map((value) => clamped(value, low, high)) });
  }

  function setClock(restart, step) {
    Object.assign(clock, { restart, step });
    draw();
  }

  /** One step further, in the next restart where one has ended; false where all have. */
  function advance() {
    if (clock.step < routeEnd()) {
      setClock(clock.restart, clock.step + 1);
      if (clock.step >= routeEnd()) clock.step = Infinity;
    } else if (clock.restart < last) setClock(clock.restart + 1, 0);
    else return false;
    return true;
  }

  function tell() {
    const says = ["paper", "pgd"].map((name) => ledgerOf(name, found, clock));
    const at = clock.step === Infinity ? "ended" : `step ${clock.step}`;
    announce(`Restart ${clock.restart + 1}, ${at}. Paper’s attack: ${paperText(says[0]).join(" ")} ` +
      `Correct PGD: ${pgdText(says[1], found.imageWrong).join(" ")}`);
  }

  function jump(restart, step) {
    pause();
    setClock(restart, step);
    tell();
  }

  function play() {
    if (clock.restart === last && clock.step === Infinity) setClock(0, 0);
    timer = setInterval(() => {
      if (!advance()) pause();
      if (clock.step === Infinity) tell();
    }, PACE);
    showPlaying();
  }

  function pause() {
    clearInterval(timer);
    timer = undefined;
    showPlaying();
  }

  function showPlaying() {
    playing.textContent = timer ? "Pause" : "Play";
    playing.setAttribute("aria-pressed", String(Boolean(timer)));
  }

  const labels = toy.centroids.map((_, c) => [String(c), `class ${c}`]);
  const settings = html("div", { class: "bar" },
    choice("image of", labels, "0", (value) => change({ label: Number(value), image: [...toy.images[Number(value)]] })),
    button("Put it back", () => change({ image: [...toy.images[state.label]] })),
    eps.element,
    choice("PGD climbs", Object.entries(LOSSES), "margin", (loss) => change({ loss })),
    html("label", {}, wide, html("span", {}, `in ${2 * toy.wideSide ** 2} dimensions`)),
    button("Find a lost success", showLost));
  const transport = html("div", { class: "bar", role: "group", "aria-label": "the attacks’ steps" },
    button("Step", () => { pause(); advance(); tell(); }), playing,
    button(`Run all ${toy.starts.length} restarts`, () => jump(last, Infinity)),
    button("Back to the start", () => jump(0, 0)),
    html("span", { class: "pair" }, button("New random starts", () => change({ seed: state.seed + 1 }, true)), seed));
  root.append(html("style", {}, LOOK), settings, transport, truth, hills, legend(), luck);
  responsive(hills, (width) => {
    const stacked = width < 600;
    hills.classList.toggle("stacked", stacked);
    for (const panel of panels) panel.resize(stacked ? width : Math.floor((width - 20) / 2));
    draw();
  }, onCleanup);
  onCleanup(() => clearInterval(timer));
});
