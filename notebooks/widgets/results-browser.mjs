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


const VIEWS = {
  correct: { text: "accuracy under correct attacks", norms: ["linf", "l2"], bands: true },
  paper: { text: "accuracy under the paper's protocol", norms: ["linf"], bands: true },
  both: { text: "accuracy under both protocols", norms: ["linf"] },
  alone: { text: "accuracy, attack by attack", norms: ["linf", "l2"], single: true, bands: true },
  certified: { text: "certified accuracy", norms: ["l2", "linf"], grid: true, bands: true },
  sandwich: { text: "certified and attacked", norms: ["l2"], single: true, grid: true },
};
const NORM_TEXTS = { linf: "L∞", l2: "L₂" };
const BOUNDS = ["triangle", "nearest", "pairwise", "exact", "margin", "smoothing"];
const OWN_MARKS = ["x", "+", "d", "h", "p", "8"];
const OWN_LOOK = { color: "#b0007a", dark: "#ff6ec7" };
// pixels above and below the axes
const [ABOVE, BELOW] = [12, 42];
// the columns of the table: what a row has, and its heading
const COLUMNS = {
  name: "method", evaluation: "evaluation", at: "radius", share: "accuracy, %", low: "95 % interval, %", n: "images",
};
const OWN_STYLE = `
.cw [hidden] { display: none !important; }
.cw .toned { --tone: var(--light); }
.cw.dark .toned { --tone: var(--dark); }
.cw .swatch { margin-right: 6px; flex: none; }
.cw .pick, .cw fieldset label > span { display: inline-flex; align-items: center; }
.cw input[type=search] { width: 230px; }
.cw h4 { font: inherit; font-weight: 600; margin: 12px 0 4px; }
.cw .plot { touch-action: pan-y; }
.cw .cursor:focus { outline: none; }
.cw .cursor:focus-visible .ring { stroke: var(--accent); stroke-width: 3; }
.cw .drop { border: 1.5px dashed var(--muted); border-radius: 6px; padding: 10px 12px; margin-top: 14px; }
.cw .drop.over { border-color: var(--accent); background: var(--panel); }
.cw .drop p:first-child { margin: 0 0 8px; }
.cw :is(.wrong, .bar):empty { display: none; }
.cw .drop ul { margin: 0; padding: 0; list-style: none; }
.cw .drop li { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; margin-top: 8px; }
.cw input[type=file] { font: inherit; color: inherit; max-width: 100%; }
.cw ::file-selector-button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 4px; min-height: 32px; margin-right: 10px; cursor: pointer; }
.cw .rows { max-height: 336px; overflow: auto; border: 1px solid var(--line); border-radius: 4px; }
.cw .rows table { width: 100%; margin: 0; }
.cw .rows thead th { position: sticky; top: 0; background: var(--panel); padding: 0; z-index: 1; }
.cw .rows thead button { border: 0; background: none; font-weight: 600; padding: 4px 8px; width: 100%;
  text-align: left; }
.cw .rows thead button:focus-visible { outline-offset: -2px; }
.cw .rows tbody :is(th, td:nth-child(2)) { white-space: normal; }
.cw .rows tbody th { font-weight: 400; min-width: 130px; }
.cw .rows tbody :is(th, td) { padding: 3px 8px; }
.cw .rows :is(tr.at, tbody tr:hover) { background: var(--panel); }
`;

// ---- proportions

const logFactorials = [0];

function logFactorial(n) {
  for (let m = logFactorials.length; m <= n; m += 1) logFactorials.push(logFactorials[m - 1] + Math.log(m));
  return logFactorials[n];
}

/** The chance of `kept` or more of `n` at a chance of p each, p at most kept / n: the terms fall from the first on. */
function upperTail(kept, n, p) {
  const ways = logFactorial(n) - logFactorial(kept) - logFactorial(n - kept);
  let term = Math.exp(ways + kept * Math.log(p) + (n - kept) * Math.log1p(-p));
  let sum = term;
  for (let m = kept; m < n && term > 1e-17 * sum; m += 1) {
    term *= ((n - m) / (m + 1)) * (p / (1 - p));
    sum += term;
  }
  return sum;
}

/** The p at which `kept` or more of `n` has the chance 0.025, by bisection. */
function lowerEnd(kept, n) {
  let [low, high] = [0, kept / n];
  for (let step = 0; step < 54 && kept > 0; step += 1) {
    const middle = (low + high) / 2;
    if (upperTail(kept, n, middle) < 0.025) low = middle;
    else high = middle;
  }
  return low;
}

const intervalsFound = new Map();

/** The exact (Clopper-Pearson) 95 % interval of `kept` out of `n`. */
function interval(kept, n) {
  const key = `${kept}/${n}`;
  if (!intervalsFound.has(key)) intervalsFound.set(key, [lowerEnd(kept, n), 1 - lowerEnd(n - kept, n)]);
  return intervalsFound.get(key);
}

// ---- the data of the page

/** Checks of a part of the data: its name comes before what they complain of. */
function within(name, check) {
  try {
    return check();
  } catch (error) {
    throw error instanceof DataError ? new DataError(`${name}.${error.message}`) : error;
  }
}

function oneOf(data, name, known) {
  const value = field(data, name, "string");
  if (Object.hasOwn(known, value)) return;
  throw new DataError(`${name}: expected one of ${Object.keys(known).join(", ")}, got ${value}`);
}

function checkLook(look) {
  for (const name of ["name", "color", "dark", "dash", "marker"]) field(look, name, "string");
}

/** A curve with `points`: a radius, how many images hold there, and of how many. */
function checkedCurve(curve, study, methods, parts) {
  for (const [name, known] of Object.entries({ what: VIEWS, norm: NORM_TEXTS, method: methods, part: parts })) {
    oneOf(curve, name, known);
  }
  const at = curve.at === undefined ? study.grid : field(curve, "at", "numbers");
  const kept = field(curve, "kept", "numbers");
  const counts = Array.isArray(curve.n) ? field(curve, "n", "numbers") : at.map(() => field(curve, "n", "number"));
  if (!kept.length || kept.length > Math.min(at.length, counts.length)) {
    throw new DataError(`kept: expected a number for each of ${at.length} radii, got ${kept.length}`);
  }
  const points = kept.map((count, n) => ({ at: at[n], kept: count, n: counts[n] }));
  const wrong = points.find((point) => point.kept < 0 || point.kept > point.n || point.n < 1);
  if (wrong) throw new DataError(`kept: expected at most n = ${wrong.n} images, got ${wrong.kept}`);
  return { ...curve, autoattack: curve.autoattack === true, points };
}

function checkedStudy(study, methods, parts) {
  field(study, "data", "string");
  field(study, "pixels", "number");
  field(study, "photographs", "boolean");
  for (const name of ["grid", "radii"]) field(study, name, "numbers");
  field(study, "notes", "object");
  const one = (curve, n) => within(`curves[${n}]`, () => checkedCurve(curve ?? {}, study, methods, parts));
  return { ...study, curves: field(study, "curves", "array").map(one) };
}

/** The data, every field of it checked. */
function checked(data) {
  const looks = {};
  for (const group of ["methods", "parts"]) {
    looks[group] = field(data, group, "object");
    for (const [name, look] of Object.entries(looks[group])) within(`${group}.${name}`, () => checkLook(look ?? {}));
  }
  const studies = field(data, "studies", "array");
  if (!studies.length) throw new DataError("studies: expected at least one, got none");
  const start = field(data, "start", "object");
  within("start", () => {
    field(start, "methods", "strings");
    field(start, "method", "string");
    oneOf(start, "shown", VIEWS);
    oneOf(start, "norm", NORM_TEXTS);
  });
  const one = (study, n) => within(`studies[${n}]`, () => checkedStudy(study ?? {}, looks.methods, looks.parts));
  return { ...looks, start, studies: studies.map(one) };
}

/** A radius as the book prints it: 8/255 for photographs where that is a whole number of bytes, else 0.1. */
function amount(study, radius) {
  const steps = Math.round(255 * radius);
  if (radius === 0) return "0";
  return study.photographs && Math.abs(255 * radius - steps) < 1e-3 ? `${steps}/255` : shown(radius);
}

// ---- a file of the reader's own

const KINDS = {
  attacks: ["attack", "norm", "eps", "loss", "index", "correct", "robust"],
  certificates: ["bound", "index", "correct", "radius"],
};
const TRUTHS = { True: true, False: false };
const number = (text) => (text === "inf" ? Infinity : text.trim() === "" ? NaN : Number(text));
const only = (value, right) => (right ? value : undefined);
const word = ["a name", (text) => only(text, text !== "")];
const truth = ["True or False", (text) => only(TRUTHS[text], Object.hasOwn(TRUTHS, text))];
const CELLS = {
  attack: word,
  loss: word,
  norm: ["linf or l2", (text) => only(text, Object.hasOwn(NORM_TEXTS, text))],
  eps: ["a positive number", (text) => only(number(text), number(text) > 0 && number(text) < Infinity)],
  index: ["a whole number", (text) => only(Number(text), /^\d+$/.test(text))],
  correct: truth,
  robust: truth,
  bound: [`one of ${BOUNDS.join(", ")}`, (text) => only(text, BOUNDS.includes(text))],
  radius: ["a number", (text) => only(number(text), !Number.isNaN(number(text)))],
};

/** The rows of a table of `clustr attack` or `clustr certify`, each value read and checked. */
function ownRows(text) {
  const lines = parseCsv(text);
  if (!lines.length) throw new DataError("the file has no rows under the names of its columns");
  const kind = "bound" in lines[0] ? "certificates" : "attacks";
  const missing = KINDS[kind].filter((column) => !(column in lines[0]));
  if (missing.length) {
    throw new DataError(`column ${missing.join(", ")}: missing; ${kind} have ${KINDS[kind].join(", ")}`);
  }
  const first = new Map();
  const rows = lines.map((cells, n) => {
    const row = { method: cells.method ?? "" };
    for (const column of KINDS[kind]) {
      const [expected, read] = CELLS[column];
      row[column] = read(cells[column]);
      if (row[column] === undefined) {
        throw new DataError(`line ${n + 2}, column ${column}: expected ${expected}, got “${cells[column]}”`);
      }
    }
    const key = [row.method, row.attack, row.norm, row.eps, row.loss, row.bound, row.index].join("|");
    if (first.has(key)) {
      throw new DataError(`line ${n + 2}: expected each image once, got the same as line ${first.get(key)}`);
    }
    first.set(key, n + 2);
    return row;
  });
  return { kind, rows };
}

function grouped(rows, key) {
  const groups = new Map();
  for (const row of rows) {
    const name = key(row);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row);
  }
  return groups;
}

/** The rows of the images that every attack and loss at that eps has seen; of one method and norm. */
function onCommonImages(rows) {
  return [...grouped(rows, (row) => row.eps).values()].flatMap((here) => {
    const kinds = grouped(here, (row) => `${row.attack}|${row.loss}`).size;
    return [...grouped(here, (row) => row.index).values()].filter((seen) => seen.length === kinds).flat();
  });
}

/** Robust accuracy against eps: the worst case over all attacks on each image; at eps 0 the clean accuracy. */
function worstCase(rows) {
  const images = [...grouped(rows, (row) => row.index).values()];
  const clean = { at: 0, kept: images.filter(([row]) => row.correct).length, n: images.length };
  const attacked = [...grouped(onCommonImages(rows), (row) => row.eps)].map(([at, here]) => {
    const verdicts = [...grouped(here, (row) => row.index).values()];
    return { at, kept: verdicts.filter((seen) => seen.every((row) => row.robust)).length, n: verdicts.length };
  });
  return [clean, ...attacked].sort((a, b) => a.at - b.at);
}

const isPaper = (row) => row.attack === "paper";
const notPaper = (row) => !isPaper(row);

/** `worstCase` under the paper's protocol and under all other attacks, on the same images. */
function bothProtocols(rows) {
  const [theirs, others] = [isPaper, notPaper].map((kind) => new Set(rows.filter(kind).map((row) => row.eps)));
  const common = onCommonImages(rows.filter((row) => theirs.has(row.eps) && others.has(row.eps)));
  const parts = { paper: common.filter(isPaper), correct: common.filter(notPaper) };
  return common.length ? Object.entries(parts).map(([part, some]) => [part, worstCase(some)]) : [];
}

/** All curves of one method's attack rows, as `clustr_core.drawing.results_browser.data` makes them. */
function attackCurves(method, rows) {
  const curves = [];
  for (const [norm, here] of grouped(rows, (row) => row.norm)) {
    const add = (what, part, points, autoattack = false) => {
      curves.push({ what, norm, method, part, points, autoattack });
    };
    const paper = here.filter(isPaper);
    for (const autoattack of new Set([false, here.some((row) => row.attack === "autoattack")])) {
      const counted = here.filter((row) => autoattack || row.attack !== "autoattack");
      const correct = counted.filter(notPaper);
      if (correct.length) add("correct", "correct", worstCase(correct), autoattack);
      if (norm === "linf") for (const [part, points] of bothProtocols(counted)) add("both", part, points, autoattack);
    }
    if (paper.length) add("paper", "paper", worstCase(paper));
    for (const [part, own] of grouped(here, (row) => `${row.attack}, ${row.loss}`)) {
      const points = [...grouped(own, (row) => row.eps)].map(([at, seen]) => (
        { at, kept: seen.filter((row) => row.robust).length, n: seen.length }));
      const clean = [...grouped(own, (row) => row.index).values()].map(([row]) => row);
      points.push({ at: 0, kept: clean.filter((row) => row.correct).length, n: clean.length });
      add("alone", part, points.sort((a, b) => a.at - b.at));
    }
  }
  return curves;
}

/** Certified accuracy at the radii of a grid, by the best bound of one method's rows. */
function certifiedCurve(method, rows, grid) {
  const part = BOUNDS.findLast((bound) => rows.some((row) => row.bound === bound));
  const best = rows.filter((row) => row.bound === part);
  const reach = (radius) => best.filter((row) => row.correct && row.radius >= radius).length;
  const points = grid.map((at) => ({ at, kept: reach(at), n: best.length }));
  return { what: "certified", norm: "l2", method, part, points, autoattack: false };
}

// ---- what a view shows

/** The curves of a view: of each method and part the one with AutoAttack, or without it, if there are both. */
function curvesOf(curves, { view, norm, autoattack }) {
  const asked = view === "certified" ? "l2" : norm;
  const found = new Map();
  for (const curve of curves.filter((each) => each.what === view && each.norm === asked)) {
    const key = `${curve.method}|${curve.part}`;
    if (!found.has(key) || curve.autoattack === autoattack) found.set(key, { ...curve, key });
  }
  return [...found.values()];
}

/** A curve as a view shows it: its shares with their intervals, its radii in the view's norm, its names and looks. */
function seriesOf(curve, { view, study, methodLook, partLook, shrink }) {
  const kind = VIEWS[view];
  const { name } = methodLook;
  const open = view === "both" && curve.part === "paper";
  const evaluation = `${partLook.name}${curve.autoattack && curve.part === "correct" ? " and AutoAttack" : ""}`;
  const points = curve.points.map(({ at, kept, n }, place) => {
    const [low, high] = interval(kept, n);
    const known = at === 0 || study.radii.some((radius) => Math.abs(radius - at) < 1e-9);
    return { place, at: at * shrink, named: known || !kind.grid, kept, n, share: kept / n, low, high };
  });
  return {
    key: curve.key, method: curve.method, part: curve.part, name, evaluation, open, points,
    looks: kind.single ? partLook : methodLook,
    label: kind.single ? partLook.name : open ? `${name}, paper's` : name,
    title: `${name}, ${view === "certified" ? `certified (bound: ${evaluation})` : evaluation}`,
  };
}

/** The rows of the table that pass its filter, in order; and all rows. */
function tableRows(series, { study, everyPoint, filter, sort }) {
  const all = series.flatMap((each) => each.points.filter((point) => everyPoint || point.named).map((point) => (
    { ...point, series: each, name: each.name, evaluation: each.evaluation, amount: amount(study, point.at) })));
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all.filter((row) => words.every((word) => fits(row, word, all)));
  if (sort) {
    const key = (row) => (typeof row[sort.id] === "string" ? row[sort.id].toLowerCase() : row[sort.id]);
    rows.sort((a, b) => (sort.down ? -1 : 1) * (key(a) < key(b) ? -1 : Number(key(a) > key(b))));
  }
  return { rows, all };
}

/** Whether a row has a word of the filter: a radius if it is a number, else a part of a name. */
function fits(row, word, all) {
  if (!/^[\d./]+$/.test(word)) return `${row.name} ${row.evaluation}`.toLowerCase().includes(word);
  return all.some((each) => each.amount === word) ? row.amount === word : row.amount.startsWith(word);
}

// ---- where things stand in the drawing

/** Places for labels, at least `gap` apart and within bounds, near to where they are wanted (in ascending order). */
function spread(wanted, gap, [top, bottom]) {
  const places = [];
  wanted.forEach((place, n) => places.push(Math.max(place, n ? places[n - 1] + gap : top)));
  for (let n = places.length - 1, most = bottom; n >= 0; n -= 1, most -= gap) places[n] = Math.min(places[n], most);
  return places;
}

/** Values of which the texts, centred on their pixels, leave room between each other. */
function apart(values, scale, text) {
  let last = -Infinity;
  return values.filter((value) => {
    const half = 3.6 * text(value).length;
    if (scale(value) - half < last + 6) return false;
    last = scale(value) + half;
    return true;
  });
}

/** Where the axis is labelled: at the attacks' eps, or at round radii. */
function radiiOnAxis(series, { study, view, reach }) {
  if (!VIEWS[view].grid) {
    return [...new Set([0, ...series.flatMap((each) => each.points.map((point) => point.at))])].sort((a, b) => a - b);
  }
  const unit = study.photographs ? 255 : 1;
  const round = ticks([0, (reach || 1) * unit], 6);
  return (study.photographs ? round.filter(Number.isInteger) : round).map((value) => value / unit);
}

/** Labels for the lines that end at the right edge, if there is room for all near their lines. */
function labelsAtEnds(series, { width, height, reach }) {
  const ending = series.filter((each) => each.points.at(-1).at > 0.99 * reach);
  const margin = Math.max(0, ...ending.map((each) => Math.ceil(6.5 * each.label.length))) + 46;
  const y = linear([0, 1], [height - BELOW, ABOVE]);
  const mean = ({ points }) => points.reduce((sum, point) => sum + point.share, 0) / points.length;
  const order = ending.map((each) => ({ each, wanted: y(each.points.at(-1).share), mean: mean(each) }));
  // where lines meet at the end, in the order in which they came
  order.sort((a, b) => a.wanted - b.wanted || b.mean - a.mean);
  const places = spread(order.map((label) => label.wanted), 16, [ABOVE + 6, height - BELOW - 4]);
  const near = places.every((place, n) => Math.abs(place - order[n].wanted) < 130);
  if (!near || !ending.length || width - margin < 420) return { margin: 26, labels: [] };
  return { margin, labels: order.map(({ each }, n) => ({ each, place: places[n] })) };
}

const pixelsOf = ({ points }, { x, y }, value) => points.map((point) => [x(point.at), y(point[value])]);

// ---- marks

/** Attributes that give an element its colour as `var(--tone)`, in both themes. */
function toned(looks, name = "") {
  return { class: `toned ${name}`, style: `--light:${looks.color};--dark:${looks.dark}` };
}

function symbol(looks, x, y, open = false) {
  const filled = { fill: "var(--tone)", stroke: "var(--paper)", "stroke-width": 0.7 };
  const hollow = { fill: "var(--paper)", stroke: "var(--tone)", "stroke-width": 1.6 };
  return looks.marker ? mark(looks.marker, x, y, 4.6, open ? hollow : filled) : undefined;
}

function strokeOf(looks, open = false) {
  const dashes = { "stroke-dasharray": looks.dash || undefined };
  return { fill: "none", stroke: "var(--tone)", "stroke-width": open ? 1.3 : 2, ...dashes };
}

/** A piece of a line with its mark, as it stands in the drawing. */
function swatch(looks, open = false) {
  const line = svg("path", { d: "M1 8H33", ...strokeOf(looks, open) });
  const size = { width: 34, height: 16, "aria-hidden": "true" };
  return svg("svg", { ...size, ...toned(looks, "swatch") }, line, symbol(looks, 17, 8, open));
}

const named = (looks, open) => html("span", { class: "pick" }, swatch(looks, open), looks.name);

// ---- the drawing

/** The area between two lines of pixels, in the colour of a series unless told otherwise. */
function between(upper, lower, { looks, key }, attributes = {}) {
  const d = `${path(upper)}${path([...lower].reverse()).replace("M", "L")}Z`;
  const filling = { d, fill: "var(--tone)", "fill-opacity": 0.13, ...attributes };
  return svg("path", { ...toned(looks), "data-series": key, ...filling });
}

const bandOf = (each, scales) => between(pixelsOf(each, scales, "high"), pixelsOf(each, scales, "low"), each);

function lineOf(each, scales) {
  const every = each.points.length > 20 ? Math.floor((each.points.length - 1) / 6) : 1;
  const marked = each.points.filter((point) => point.place % every === 0);
  const line = svg("path", { d: path(pixelsOf(each, scales, "share")), ...strokeOf(each.looks, each.open) });
  const marks = marked.map((point) => symbol(each.looks, scales.x(point.at), scales.y(point.share), each.open));
  return svg("g", { ...toned(each.looks, "curve"), "data-series": each.key }, line, marks);
}

/** Of a sandwich: what is certified as an area, and hatched what lies between that and the worst case. */
function sandwichAreas(series, scales) {
  const [certified, worst] = ["certified", "worst case"].map((part) => series.find((each) => each.part === part));
  if (!certified) return [];
  const line = svg("line", { y2: 7, stroke: "var(--muted)", "stroke-width": 1.5 });
  const hatch = { id: "open", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
  const lower = pixelsOf(certified, scales, "share");
  const ground = lower.map(([at]) => [at, scales.y(0)]);
  const grey = { fill: "var(--muted)", "fill-opacity": 0.3 };
  const areas = [svg("pattern", hatch, line), between(lower, ground, certified, grey)];
  const open = { fill: "url(#open)", "fill-opacity": 1 };
  return worst ? [...areas, between(pixelsOf(worst, scales, "share"), lower, certified, open)] : areas;
}

function gapAreas(series, scales) {
  const pairs = [...grouped(series, (each) => each.method).values()].filter((pair) => pair.length === 2);
  return pairs.map((pair) => between(...pair.map((each) => pixelsOf(each, scales, "share")), pair[0]));
}

function endLabels(labels, { x, y, box }) {
  return labels.map(({ each, place }) => {
    const end = each.points.at(-1);
    const leader = path([[x(end.at) + 6, y(end.share)], [box.right + 22, place]]);
    const line = svg("path", { d: leader, fill: "none", stroke: "var(--tone)", "stroke-opacity": 0.6 });
    const text = svg("text", { x: box.right + (each.looks.marker ? 40 : 26), y: place + 4 }, each.label);
    const sign = symbol(each.looks, box.right + 30, place, each.open);
    return svg("g", { ...toned(each.looks), "data-series": each.key }, line, sign, text);
  });
}

/** The numbers of a point with all of their digits, to be read by a program. */
const exactly = ({ key }, { at, share, low, high, kept, n }) => ({ series: key, at, share, low, high, kept, n });

/** The ring around the point that is read, with the bracket of its interval. */
function ringOf({ x, y }) {
  const ring = svg("circle", { r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 1.6, class: "ring" });
  const bracket = svg("path", { fill: "none", stroke: "var(--ink)", "stroke-width": 1.4 });
  const does = "point of a curve; arrows move along it and between curves";
  const element = svg("g", { class: "cursor", tabindex: 0, role: "img", "aria-roledescription": does }, bracket, ring);
  const place = (each, point, words) => {
    const [left, low, high] = [x(point.at), y(point.low), y(point.high)];
    ring.setAttribute("cx", left);
    ring.setAttribute("cy", y(point.share));
    bracket.setAttribute("d", `M${left - 5} ${high}h10m-5 0V${low}m-5 0h10`);
    element.setAttribute("aria-label", words);
    Object.assign(element.dataset, exactly(each, point));
  };
  return { element, place };
}

// ---- the widget

export default widget("Results browser", ({ root, data, announce, onCleanup }) => {
  const { studies, methods, parts, start } = checked(data);
  const own = { files: [], methods: {}, count: 0 };
  const state = {
    study: studies[0], view: start.shown, norm: start.norm, method: start.method, chosen: new Set(start.methods),
    off: new Set(), autoattack: false, intervals: true, everyPoint: false, filter: "", sort: undefined, at: undefined,
  };
  const methodLook = (method) => own.methods[method] ?? methods[method];
  const partLook = (part) => parts[part] ?? { ...OWN_LOOK, name: part, dash: "1.5 3", marker: "x" };

  /** The curves of the reader's files; certificates count at the radii of the data shown. */
  const ownCurves = () => own.files.flatMap(({ curves, groups }) => (
    curves ?? groups.map(([method, rows]) => certifiedCurve(method, rows, state.study.grid))));

  /** What follows from the state: the view's norm, its methods, its curves, and the series that are ticked. */
  const seen = () => {
    const { study, view, autoattack } = state;
    const { norms, single } = VIEWS[view];
    const norm = norms.includes(state.norm) ? state.norm : norms[0];
    const curves = curvesOf([...study.curves, ...ownCurves()], { view, norm, autoattack });
    const there = [...new Set(curves.map((curve) => curve.method))];
    const method = there.includes(state.method) ? state.method : there[0];
    const mine = curves.filter((curve) => !single || curve.method === method);
    const ticked = (curve) => (single ? !state.off.has(`${view}|${curve.part}`) : state.chosen.has(curve.method));
    const shrink = view === "certified" && norm === "linf" ? 1 / Math.sqrt(study.pixels) : 1;
    const series = mine.filter(ticked).map((curve) => seriesOf(curve, {
      view, study, shrink, methodLook: methodLook(curve.method), partLook: partLook(curve.part),
    }));
    const reach = Math.max(0, ...mine.flatMap((curve) => curve.points.map((point) => point.at * shrink)));
    const of = single ? `, ${methodLook(method).name}` : "";
    const title = `${study.data}, ${NORM_TEXTS[norm]}${of}: ${VIEWS[view].text}`;
    return { study, view, norm, there, method, mine, series, reach, title, single };
  };

  const [controls, tickBoxes, options] = [1, 2, 3].map(() => html("div", { class: "bar" }));
  const heading = html("h4");
  const plot = html("div", { class: "plot" });
  const note = html("p", { class: "note" });
  root.append(html("style", {}, OWN_STYLE), controls, tickBoxes, options, heading, plot, note);
  const hint = tip(root);
  const focused = () => root.getRootNode().activeElement;
  let width = 0;
  let drawn;

  // choosing

  const change = (what) => {
    Object.assign(state, what);
    const label = focused()?.getAttribute("aria-label");
    buildControls();
    if (label) controls.querySelector(`select[aria-label="${label}"]`)?.focus();
    refresh();
  };

  const buildControls = () => {
    const now = seen();
    const views = Object.entries(VIEWS).filter(([name]) => now.study.curves.some((curve) => curve.what === name));
    const texts = studies.map((study, n) => [String(n), study.data]);
    const norms = choice("norm", Object.entries(NORM_TEXTS), now.norm, (norm) => change({ norm }));
    for (const option of norms.querySelectorAll("option")) {
      option.disabled = !VIEWS[now.view].norms.includes(option.value);
    }
    controls.replaceChildren(
      choice("data", texts, String(studies.indexOf(now.study)), (n) => change({ study: studies[n] })),
      choice("shown", views.map(([name, each]) => [name, each.text]), now.view, (view) => change({ view })),
      norms,
    );
    if (now.single) {
      const names = now.there.map((name) => [name, methodLook(name).name]);
      controls.append(choice("method", names, now.method, (method) => change({ method })));
    }
    tickBoxes.replaceChildren(now.single ? partBoxes(now) : methodBoxes(now));
    buildOptions(now);
  };

  const methodBoxes = ({ there }) => {
    const set = boxes("methods", there.map((name) => [name, named(methodLook(name))]), state.chosen, () => refresh());
    const all = (name, tick) => button(name, () => {
      there.forEach(tick);
      set.querySelectorAll("input").forEach((input, n) => { input.checked = state.chosen.has(there[n]); });
      refresh();
    });
    set.append(all("all", (name) => state.chosen.add(name)), all("none", (name) => state.chosen.delete(name)));
    return set;
  };

  const partBoxes = ({ view, mine }) => {
    const all = mine.map((curve) => curve.part);
    const ticked = new Set(all.filter((part) => !state.off.has(`${view}|${part}`)));
    return boxes("curves", all.map((part) => [part, named(partLook(part))]), ticked, () => {
      all.forEach((part) => state.off[ticked.has(part) ? "delete" : "add"](`${view}|${part}`));
      refresh();
    });
  };

  const tickBox = (text, name) => {
    const input = html("input", { type: "checkbox", checked: state[name], change: () => {
      state[name] = input.checked;
      refresh();
    } });
    return html("label", {}, input, html("span", {}, text));
  };

  const buildOptions = ({ study, view, norm }) => {
    const variants = study.curves.some((curve) => curve.what === view && curve.norm === norm && curve.autoattack);
    options.replaceChildren();
    if (VIEWS[view].bands) options.append(tickBox("95 % intervals of every curve", "intervals"));
    if (variants) options.append(tickBox("count AutoAttack (on fewer images)", "autoattack"));
  };

  const refresh = () => {
    const now = seen();
    heading.textContent = now.title;
    note.textContent = now.study.notes[now.view]?.[now.norm] ?? "";
    draw(now);
    buildTable(now);
    announce(`${now.title}; curves: ${now.series.length}`);
  };

  // drawing

  const draw = (now) => {
    if (!width) return;
    const { series, study, reach, view } = now;
    const height = width < 500 ? 300 : 390;
    const { margin, labels } = labelsAtEnds(series, { width, height, reach });
    const box = { left: 50, right: width - margin, top: ABOVE, bottom: height - BELOW };
    const x = linear([0, reach || 1], [box.left, box.right]);
    const scales = { x, y: linear([0, 1], [box.bottom, box.top]), box };
    const text = (value) => amount(study, value);
    const label = `${now.title}. The table has the same numbers.`;
    const figure = svg("svg", { width, height, role: "group", "aria-label": label });
    figure.append(axes({
      ...scales, xText: text, xTicks: apart(radiiOnAxis(series, now), x, text),
      xLabel: `${NORM_TEXTS[now.norm]} radius ${VIEWS[view].grid ? "r" : "eps"} (pixels in [0, 1])`,
      yLabel: "accuracy, %", yTicks: [0, 0.2, 0.4, 0.6, 0.8, 1], yText: (share) => String(Math.round(100 * share)),
    }));
    const shapes = svg("g", { "aria-hidden": "true" });
    if (view === "sandwich") shapes.append(...sandwichAreas(series, scales));
    if (view === "both") shapes.append(...gapAreas(series, scales));
    if (VIEWS[view].bands && state.intervals) shapes.append(...series.map((each) => bandOf(each, scales)));
    shapes.append(...series.map((each) => lineOf(each, scales)), ...endLabels(labels, scales));
    const nothing = { x: (box.left + box.right) / 2, y: height / 2, "text-anchor": "middle" };
    if (!series.length) shapes.append(svg("text", nothing, "Nothing is ticked."));
    const ring = ringOf(scales);
    figure.append(shapes);
    const hadFocus = plot.contains(focused());
    plot.replaceChildren(figure);
    hint.hide();
    drawn = { series, scales, ring, figure, shapes };
    if (!series.length) return;
    ring.place(...reading(), inWords(...reading()).replaceAll("\n", ", "));
    ring.element.setAttribute("opacity", 0);
    for (const [event, does] of [["focus", () => read(...reading())], ["blur", leave], ["keydown", step]]) {
      ring.element.addEventListener(event, does);
    }
    figure.append(ring.element);
    if (hadFocus) ring.element.focus();
  };

  // reading

  /** The curve and the point that were read last, or the first. */
  const reading = () => {
    const each = drawn.series.find((one) => one.key === state.at?.key) ?? drawn.series[0];
    return [each, each.points[Math.min(state.at?.place ?? 0, each.points.length - 1)]];
  };

  const inWords = (each, point) => {
    const radius = `${VIEWS[state.view].grid ? "r" : "eps"} ${amount(state.study, point.at)}`;
    const percent = withInterval(point.share, point.low, point.high);
    return `${each.title}\n${radius}: ${percent} %\n${point.kept} of ${point.n} images`;
  };

  /** The ring at a point, its numbers, the other curves fainter, its row of the table marked. */
  const read = (each, point) => {
    state.at = { key: each.key, place: point.place };
    const words = inWords(each, point);
    drawn.ring.place(each, point, words.replaceAll("\n", ", "));
    drawn.ring.element.setAttribute("opacity", 1);
    for (const shape of drawn.shapes.querySelectorAll("[data-series]")) {
      shape.setAttribute("opacity", shape.dataset.series === each.key ? 1 : 0.25);
    }
    const [outer, inner] = [root.getBoundingClientRect(), drawn.figure.getBoundingClientRect()];
    const [left, top] = [drawn.scales.x(point.at), drawn.scales.y(point.share)];
    hint.show(inner.left - outer.left + left, inner.top - outer.top + top, words);
    for (const row of body.rows) {
      row.classList.toggle("at", row.dataset.series === each.key && Number(row.dataset.at) === point.at);
    }
  };

  const leave = () => {
    drawn.ring.element.setAttribute("opacity", Number(plot.contains(focused())));
    for (const shape of drawn.shapes.querySelectorAll("[data-series]")) shape.removeAttribute("opacity");
    for (const row of body.rows) row.classList.remove("at");
    hint.hide();
  };

  const step = (event) => {
    const [each, point] = reading();
    const last = each.points.length - 1;
    const size = event.shiftKey ? 5 : 1;
    const along = { ArrowLeft: point.place - size, ArrowRight: point.place + size, Home: 0, End: last }[event.key];
    const across = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (along === undefined && across === undefined) return;
    event.preventDefault();
    if (along !== undefined) read(each, each.points[Math.max(0, Math.min(along, last))]);
    else read(...beside(each, point, across));
  };

  /** The next curve above or below, at the radius that is nearest. */
  const beside = (each, point, across) => {
    const away = (one) => Math.abs(one.at - point.at);
    const nearest = (points) => points.reduce((a, b) => (away(b) < away(a) ? b : a));
    const here = drawn.series.map((one) => [one, nearest(one.points)]).sort((a, b) => a[1].share - b[1].share);
    const place = here.findIndex(([one]) => one === each) + across;
    return here[Math.max(0, Math.min(place, here.length - 1))];
  };

  const readAtPointer = (event) => {
    if (!drawn?.series.length) return;
    const { left, top } = drawn.figure.getBoundingClientRect();
    const { x, y } = drawn.scales;
    const away = (point) => Math.hypot(x(point.at) - event.clientX + left, y(point.share) - event.clientY + top);
    const all = drawn.series.flatMap((each) => each.points.map((point) => ({ each, point, away: away(point) })));
    const best = all.reduce((a, b) => (b.away < a.away ? b : a));
    if (best.away < 40) read(best.each, best.point);
    else leave();
  };
  plot.addEventListener("pointermove", readAtPointer);
  plot.addEventListener("pointerdown", readAtPointer);
  plot.addEventListener("pointerleave", (event) => {
    // what a finger touched stays to be read
    if (event.pointerType === "mouse" && !plot.contains(focused())) leave();
  });

  // a file of the reader's own

  const chooser = html("input", { type: "file", accept: ".csv,text/csv", multiple: true, change: () => {
    readFiles([...chooser.files]);
    chooser.value = "";
  }, "aria-label": "choose a CSV of your own model" });
  const wrong = html("p", { class: "wrong", role: "alert" });
  const list = html("ul");
  const command = (name) => html("code", {}, `clustr ${name} --output FILE.csv`);
  const zone = html("div", { class: "drop", role: "group", "aria-label": "your own model" },
    html("p", {}, html("b", {}, "Your own model. "), "Drop a table here that ", command("attack"), " or ",
      command("certify"), " wrote, or choose it: its curves stand beside the others. The file is read in this page and "
      + "sent nowhere. Whether its images and attacks are those of the data shown, only you can know."),
    chooser, wrong, list);
  root.append(zone);

  const readFiles = async (files) => {
    wrong.textContent = "";
    for (const file of files) {
      try {
        addFile(file.name, ownRows(await file.text()));
      } catch (error) {
        if (!(error instanceof DataError)) throw error;
        wrong.textContent = `${file.name}: ${error.message}`;
      }
    }
  };

  const addFile = (name, { kind, rows }) => {
    own.count += 1;
    const groups = [...grouped(rows, (row) => row.method)].map(([method, mine], n) => {
      const key = `file ${own.count}: ${method}`;
      own.methods[key] = ownLook(method, own.count, n);
      return [key, mine];
    });
    const curves = kind === "attacks" ? groups.flatMap(([key, mine]) => attackCurves(key, mine)) : undefined;
    own.files.push({ name, groups, curves });
    groups.forEach(([key]) => state.chosen.add(key));
    const [first] = ownCurves().filter((curve) => curve.method === groups[0][0]);
    state.method = first.method;
    if (!seen().there.includes(first.method)) Object.assign(state, { view: first.what, norm: first.norm });
    buildFiles();
    change({});
    announce(`${name}: ${groups.map(([key]) => own.methods[key].name).join(", ")} added, from ${rows.length} rows`);
  };

  const ownLook = (method, file, n) => ({
    ...OWN_LOOK, name: `${methods[method]?.name ?? (method || "your model")} (yours${file > 1 ? ` ${file}` : ""})`,
    dash: n ? "6 3" : "", marker: OWN_MARKS[(file + n - 1) % OWN_MARKS.length],
  });

  const removeFile = (file) => {
    own.files.splice(own.files.indexOf(file), 1);
    buildFiles();
    change({});
    chooser.focus();
    announce(`${file.name} removed`);
  };

  const buildFiles = () => {
    list.replaceChildren(...own.files.map((file) => {
      const remove = button("remove", () => removeFile(file), { "aria-label": `remove ${file.name}` });
      return html("li", {}, file.name, file.groups.map(([key]) => named(own.methods[key])), remove);
    }));
  };

  for (const kind of ["dragover", "dragleave", "drop"]) {
    root.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      zone.classList.toggle("over", kind === "dragover");
      if (kind === "drop") readFiles([...event.dataTransfer.files]);
    });
  }

  // the table

  const counted = html("output", { class: "faint count" });
  const search = html("input", { type: "search", "aria-label": "filter the table", input: () => {
    state.filter = search.value;
    buildTable(seen());
    announce(counted.textContent);
  }, placeholder: "method, attack or radius" });
  const everyPoint = tickBox("every point of the curves", "everyPoint");
  const sortBy = (id, title) => {
    state.sort = { id, down: state.sort?.id === id ? !state.sort.down : false };
    buildTable(seen());
    announce(`sorted by ${title}, ${state.sort.down ? "descending" : "ascending"}`);
  };
  const headings = Object.entries(COLUMNS).map(([id, title]) => (
    html("th", { scope: "col" }, button(title, () => sortBy(id, title)))));
  const body = html("tbody");
  const numbers = html("table", {}, html("thead", {}, html("tr", {}, headings)), body);
  root.append(
    html("h4", {}, "The same in numbers"),
    html("div", { class: "bar" }, html("label", {}, html("span", {}, "filter"), search), everyPoint, counted),
    html("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "the numbers of the curves" }, numbers),
  );

  const buildTable = ({ study, view, series, single }) => {
    const { grid } = VIEWS[view];
    everyPoint.hidden = !grid;
    const { rows, all } = tableRows(series, { ...state, study });
    const left = new Set([single ? "name" : "", view === "correct" || view === "paper" ? "evaluation" : ""]);
    const titles = { evaluation: view === "certified" ? "bound" : "evaluation", at: grid ? "radius" : "eps" };
    Object.entries(COLUMNS).forEach(([id, title], n) => {
      const down = state.sort?.id === id ? state.sort.down : undefined;
      headings[n].hidden = left.has(id);
      headings[n].setAttribute("aria-sort", down === undefined ? "none" : down ? "descending" : "ascending");
      headings[n].firstChild.textContent = `${titles[id] ?? title}${down === undefined ? "" : down ? " ▼" : " ▲"}`;
    });
    counted.textContent = `${rows.length} of ${all.length} rows`;
    body.replaceChildren(...rows.map((row) => rowElement(row, left)));
  };

  const rowElement = (row, left) => {
    const { series: each, at, share, low, high, kept, n } = row;
    const percent = (value) => (100 * value).toFixed(1);
    const first = left.has("name") ? "evaluation" : "name";
    const cells = {
      name: row.name, evaluation: row.evaluation, at: at === 0 ? "0 (clean)" : row.amount, share: percent(share),
      low: `${percent(low)} to ${percent(high)}`, n: `${kept} of ${n}`,
    };
    cells[first] = named({ ...each.looks, name: row[first] }, each.open);
    const element = html("tr", { pointerenter: () => read(each, row), pointerleave: () => leave() },
      Object.entries(cells).map(([id, content]) => (
        html(id === first ? "th" : "td", { scope: id === first ? "row" : undefined, hidden: left.has(id) }, content))));
    Object.assign(element.dataset, exactly(each, row));
    return element;
  };

  buildControls();
  refresh();
  responsive(plot, (across) => {
    width = across;
    draw(seen());
  }, onCleanup);
});
