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


const LOOK = `
.cw.embeddings .browser { display: grid; gap: 12px 16px; grid-template-columns: minmax(0, 1fr); }
.cw.embeddings .browser.wide { grid-template-columns: minmax(0, 1fr) 264px; }
.cw.embeddings .map { cursor: crosshair; user-select: none; -webkit-user-select: none; border-radius: 4px; }
.cw.embeddings .map.pointed { cursor: pointer; }
.cw.embeddings .map .dot.aside, .cw.embeddings .map .trail.aside { opacity: 0.12; }
.cw.embeddings .map .dot { stroke: var(--ink); stroke-width: 0.7; }
.cw.embeddings .map image { image-rendering: pixelated; }
.cw.embeddings .map .wrong-ring { fill: none; stroke: var(--warn); stroke-width: 1.4; }
.cw.embeddings .map .halo { fill: none; stroke: var(--accent); stroke-width: 2.5; }
.cw.embeddings .map .trail { fill: none; stroke: var(--muted); stroke-width: 1; opacity: 0.45; }
.cw.embeddings .map .own-path { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.cw.embeddings .map .casing { fill: none; stroke: var(--paper); stroke-width: 6; stroke-linejoin: round; opacity: 0.8; }
.cw.embeddings .map .step { fill: var(--accent); stroke: var(--paper); stroke-width: 1; }
.cw.embeddings .map text { paint-order: stroke; stroke: var(--paper); stroke-width: 3.5px; stroke-linejoin: round; }
.cw.embeddings .map .centroid { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.cw.embeddings .key { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center;
  margin: 6px 0 0; color: var(--muted); }
.cw.embeddings .key span { display: inline-flex; gap: 6px; align-items: center; }
.cw.embeddings .classes { display: flex; flex-wrap: wrap; gap: 3px; margin: 8px 0 0; }
.cw.embeddings .classes button { display: inline-flex; gap: 3px; align-items: center; padding: 2px 5px; }
.cw.embeddings .classes svg { stroke: var(--ink); stroke-width: 0.7; }
.cw.embeddings .zoom { display: inline-flex; gap: 4px; }
.cw.embeddings .status { margin: 0 0 10px; }
.cw.embeddings .side p { margin: 0; }
.cw.embeddings .who { min-height: 2.8em; }
.cw.embeddings .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin: 8px 0 12px; max-width: 300px; }
.cw.embeddings .pair figure { margin: 0; min-width: 0; }
.cw.embeddings .pair figcaption { margin-top: 4px; font-size: 13px; overflow-wrap: anywhere; }
.cw.embeddings canvas { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
.cw.embeddings .no-image { aspect-ratio: 1; border: 1px dashed var(--line); color: var(--muted); display: grid;
  place-items: center; padding: 8px; text-align: center; font-size: 13px; }
.cw.embeddings .near-title { font-weight: 600; margin: 10px 0 4px !important; }
.cw.embeddings .near { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--cell), 1fr)); gap: 6px;
  max-width: 300px; margin: 2px 0 8px; padding: 0; list-style: none; }
.cw.embeddings .near li { font-size: 12px; text-align: center; min-width: 0; margin: 0; }
.cw.embeddings .near canvas { border: 2px solid var(--line); max-width: 48px; margin: 0 auto; }
.cw.embeddings .near li.other canvas { border: 2px dashed var(--warn); }
.cw.embeddings .near li.other span { font-weight: 600; color: var(--warn); }
.cw.embeddings .near span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
`;
// an attacked pixel comes as its offset in eps / LEVELS, from -LEVELS to LEVELS, half a byte each
const LEVELS = 7;
const CLOSEST = 16;
const WIDE = 620;
const SIDE = 264;
const IMAGES_FROM = 3;
// the width of a letter, at most
const LETTER = 7.5;

/** What a function reads; a complaint about its data begins with `place`. */
function within(place, reads) {
  try {
    return reads();
  } catch (error) {
    if (error instanceof DataError) throw new DataError(`${place}.${error.message}`);
    throw error;
  }
}

function sized(list, name, count) {
  if (list.length !== count) throw new DataError(`${name}: expected ${count} entries, got ${list.length}`);
  return list;
}

/** Whole numbers below a limit, however deep the arrays are. */
function below(list, name, limit) {
  const wrong = list.flat(2).find((each) => !(Number.isInteger(each) && each >= 0 && each < limit));
  if (wrong !== undefined) throw new DataError(`${name}: expected whole numbers below ${limit}, got ${wrong}`);
  return list;
}

/** Rows of finite numbers, as many as there are stops, each with one entry an image. */
function table(data, name, stops, images) {
  return sized(points(data, name, images), name, stops);
}

function bytes(data, name, count) {
  const text = field(data, name, "string");
  let found;
  try {
    found = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  } catch {
    throw new DataError(`${name}: expected bytes in base64, got another text`);
  }
  if (found.length !== count) throw new DataError(`${name}: expected ${count} bytes in base64, got ${found.length}`);
  return found;
}

function readImages(data, classes, size) {
  const index = field(data, "index", "numbers");
  if (!index.length) throw new DataError("index: expected at least one image, got none");
  const label = below(sized(field(data, "label", "numbers"), "label", index.length), "label", classes);
  return { index, label, bytes: bytes(data, "pixels", index.length * size) };
}

function readMethod(data, { stops, test, train, classes, size }) {
  const images = test.index.length;
  const [x, y] = ["x", "y"].map((name) => table(data, name, stops.length, images));
  const labels = below(field(data, "centroid_labels", "numbers"), "centroid_labels", classes.length);
  const centroids = sized(points(data, "centroids", 2), "centroids", labels.length);
  const neighbours = sized(field(data, "neighbours", "array"), "neighbours", stops.length);
  const ranks = neighbours[0]?.[0]?.length ?? 1;
  within("neighbours", () => neighbours.forEach((_, stop) => sized(points(neighbours, stop, ranks), stop, images)));
  return {
    id: field(data, "id", "string"),
    name: field(data, "name", "string"),
    share: sized(field(data, "share", "numbers"), "share", 2),
    seen: sized(field(data, "seen", "numbers"), "seen", stops.length - 1),
    centroids: centroids.map((place, n) => ({ place, label: labels[n] })),
    positions: x.map((row, stop) => row.map((each, n) => [each, y[stop][n]])),
    still: data.still === undefined ? undefined : sized(points(data, "still", 2), "still", images),
    margin: table(data, "margin", stops.length, images),
    prediction: below(table(data, "prediction", stops.length, images), "prediction", classes.length),
    neighbours: below(neighbours, "neighbours", train.index.length),
    offsets: bytes(data, "offsets", Math.ceil(((stops.length - 1) * images * size) / 2)),
  };
}

/** The data, checked; what is wrong is named by its field. */
function read(data) {
  const attack = field(data, "attack", "object");
  const kinds = { norm: "string", eps: "number", steps: "number" };
  within("attack", () => Object.entries(kinds).forEach(([name, kind]) => field(attack, name, kind)));
  const stops = field(data, "stops", "numbers");
  if (stops.length < 2 || stops[0] !== 0 || stops.some((stop, n) => n && stop <= stops[n - 1])) {
    throw new DataError(`stops: expected numbers that rise from 0, got ${JSON.stringify(stops)}`);
  }
  const shape = sized(field(data, "shape", "numbers"), "shape", 3);
  const classes = field(data, "classes", "array");
  classes.forEach((_, n) => within("classes", () => {
    const look = field(classes, n, "object");
    within(n, () => ["name", "color", "marker"].forEach((name) => field(look, name, "string")));
  }));
  const size = shape[0] * shape[1] * shape[2];
  const [test, train] = ["test", "train"].map((name) => {
    const images = field(data, name, "object");
    return within(name, () => readImages(images, classes.length, size));
  });
  const known = { dataset: field(data, "dataset", "string"), attack, stops, shape, classes, size, test, train };
  const methods = field(data, "methods", "array").map((_, n) => within("methods", () => {
    const method = field(data.methods, n, "object");
    return within(n, () => readMethod(method, known));
  }));
  if (!methods.length) throw new DataError("methods: expected at least one, got none");
  return { ...known, methods };
}

// pictures

/** The pixels of one image; `moved(k)` is added to its k-th byte. */
function rgba(from, first, [channels, height, width], moved = () => 0) {
  const pixels = new Uint8ClampedArray(4 * height * width);
  for (let pixel = 0; pixel < height * width; pixel += 1) {
    for (let colour = 0; colour < 3; colour += 1) {
      const k = channels * pixel + Math.min(colour, channels - 1);
      pixels[4 * pixel + colour] = from[first + k] + moved(k);
    }
    pixels[4 * pixel + 3] = 255;
  }
  return pixels;
}

/** The pixels of a test image at a stop: clean, or moved by the offsets that the attack has found by then. */
function testPixels({ test, shape, size, attack }, { offsets }, stop, image) {
  if (!stop) return rgba(test.bytes, image * size, shape);
  const first = ((stop - 1) * test.index.length + image) * size;
  const unit = (255 * attack.eps) / LEVELS;
  const code = (n) => (offsets[n >> 1] >> (n % 2 ? 0 : 4)) & 15;
  return rgba(test.bytes, image * size, shape, (k) => unit * (code(first + k) - LEVELS));
}

function canvasOf(pixels, [, height, width], label) {
  const canvas = html("canvas", { width, height, role: "img", "aria-label": label });
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

// places

/** Where the images are between two stops: on the straight line from one to the next. */
function between(positions, at) {
  const before = Math.floor(at);
  const after = Math.min(before + 1, positions.length - 1);
  const share = at - before;
  return positions[before].map(([x, y], n) => {
    const [nextX, nextY] = positions[after][n];
    return [x + share * (nextX - x), y + share * (nextY - y)];
  });
}

function extent(places, axis) {
  const along = places.map((place) => place[axis]);
  return [Math.min(...along), Math.max(...along)];
}

/** The middle of places and the unit of a pixel, with which all of them fit into a box, with one unit for both axes. */
function wholeView(places, box) {
  const [[left, right], [bottom, top]] = [extent(places, 0), extent(places, 1)];
  const unit = 1.1 * Math.max((right - left) / (box.right - box.left), (top - bottom) / (box.bottom - box.top), 1e-9);
  return { x: (left + right) / 2, y: (bottom + top) / 2, unit, zoom: 1 };
}

function scalesOf({ x, y, unit, zoom }, box) {
  const half = [(box.right - box.left) / 2, (box.bottom - box.top) / 2].map((pixels) => (pixels * unit) / zoom);
  return [
    linear([x - half[0], x + half[0]], [box.left, box.right]),
    linear([y - half[1], y + half[1]], [box.bottom, box.top]),
  ];
}

/** A view closer by a factor, in which `anchor` stays where it is; the whole map where that is all there is to see. */
function zoomedView(view, factor, anchor, whole) {
  const zoom = Math.min(Math.max(view.zoom * factor, 1), CLOSEST);
  if (zoom === 1) return whole;
  const ratio = view.zoom / zoom;
  return { ...view, zoom, x: anchor[0] + (view.x - anchor[0]) * ratio, y: anchor[1] + (view.y - anchor[1]) * ratio };
}

/** The place nearest to a pixel, within a reach; -1 if there is none. */
function closest(pixels, [x, y], reach, open) {
  let [best, least] = [-1, reach];
  pixels.forEach((pixel, n) => {
    const distance = Math.hypot(pixel[0] - x, pixel[1] - y);
    if (open(n) && distance < least) [best, least] = [n, distance];
  });
  return best;
}

/** The next place in a direction: within 45 degrees of it, and rather straight on than far aside. */
function onwards(pixels, from, [right, down], open) {
  let [best, least] = [from, Infinity];
  pixels.forEach((pixel, n) => {
    const offset = [pixel[0] - pixels[from][0], pixel[1] - pixels[from][1]];
    const along = offset[0] * right + offset[1] * down;
    const across = Math.abs(offset[0] * down - offset[1] * right);
    const cost = along + 2 * across;
    if (n !== from && open(n) && along > 0 && across <= along && cost < least) [best, least] = [n, cost];
  });
  return best;
}

/** The side of a thumbnail, in pixels. */
const sizeOf = (zoom) => (zoom >= IMAGES_FROM ? 32 : 22);

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// words

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const nats = (margin) => `${margin > 0 ? "+" : ""}${shown(margin)} nats`;

function attackName({ norm, eps }, shape) {
  const inBytes = 255 * eps;
  const whole = shape[0] === 3 && Math.abs(inBytes - Math.round(inBytes)) < 1e-6;
  return `${norm === "linf" ? "L∞" : "L2"}, eps ${whole ? `${Math.round(inBytes)}/255` : shown(eps)}`;
}

const stopName = (step) => (step ? `after ${step} step${step === 1 ? "" : "s"}` : "clean");

/** What the map and the attack are, in a paragraph each. */
function explained({ attack, shape, stops }, method, { map, stop }) {
  const run = `The attack is PGD (${attackName(attack, shape)}, ${attack.steps} steps from one random start) on the `
    + "method's own classifier. One run of one attack: what it leaves is no robust accuracy.";
  if (map === "still") {
    return ["UMAP of the clean test embeddings. Neighbourhoods mean something; areas and distances between groups do "
      + "not. UMAP has no place for an attacked image: the marks stay; rings, margins and neighbours follow.", run];
  }
  const moved = stop
    ? ` After ${stops[stop]} steps it shows ${percent(method.seen[stop - 1])} of the squared displacement.` : "";
  return ["The map is linear: two principal axes of the clean training embeddings, which hold "
    + `${percent(method.share[0] + method.share[1])} of their variance. It places clean and attacked images alike; no `
    + `distance in it is larger than in the embedding, but many are smaller.${moved}`, run];
}

// drawing

function set(element, attributes) {
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
}

/** A mark of an image: its class's, or its thumbnail with the class's mark at a corner; around it what is wrong. */
function dotOf(look, picture, size) {
  if (!picture) {
    return [
      svg("circle", { class: "wrong-ring", r: 8.5 }),
      mark(look.marker, 0, 0, 4.5, { fill: look.color }),
    ];
  }
  const at = -size / 2;
  const frame = (grown, attributes) =>
    svg("rect", { x: at - grown, y: at - grown, width: size + 2 * grown, height: size + 2 * grown, ...attributes });
  return [
    frame(4.5, { class: "wrong-ring", rx: 3 }),
    frame(1.5, { fill: look.color, stroke: "none" }),
    svg("image", { href: picture, x: at, y: at, width: size, height: size }),
    mark(look.marker, at, at, 4.5, { fill: look.color }),
  ];
}

function crosshair([x, y]) {
  return svg("path", { class: "centroid",
    d: `M${x - 9} ${y}H${x + 9}M${x} ${y - 9}V${y + 9}M${x - 5} ${y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0` });
}

/** What the marks mean, but for those of the classes. */
function key(map, images) {
  const sample = (...children) => svg("svg", { class: "map", width: 20, height: 20, "aria-hidden": "true" }, children);
  const entry = (text, ...children) => html("span", {}, sample(...children), text);
  const outline = images ? svg("rect", { class: "wrong-ring", x: 3, y: 3, width: 14, height: 14, rx: 3 })
    : svg("circle", { class: "wrong-ring", cx: 10, cy: 10, r: 8 });
  const chosen = svg("circle", { class: "halo", cx: 10, cy: 10, r: 7 });
  return map === "still"
    ? [entry("misclassified", outline), entry("chosen", chosen), "names at the medians of the classes"]
    : [entry("misclassified", outline), entry("chosen, with its path", chosen),
      entry("centroid of training embeddings", crosshair([10, 10]))];
}

export default widget("Browser of embeddings", ({ root, data, announce, onCleanup }) => {
  const known = read(data);
  const { stops, shape, classes, test, train, methods, attack } = known;
  const count = test.index.length;
  const images = Array.from({ length: count }, (_, n) => n);
  const state = { method: 0, map: "moving", stop: 0, drawn: 0, chosen: 0, kept: false, only: undefined };
  const shows = new Set();
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const last = stops.length - 1;

  const method = () => methods[state.method];
  const wrong = (n, stop = state.stop) => method().prediction[stop][n] !== test.label[n];
  const open = (n) => state.only === undefined || test.label[n] === state.only;
  const places = (at = state.stop) => (state.map === "still" ? method().still : between(method().positions, at));
  state.chosen = Math.max(images.findIndex((n) => !wrong(n, 0) && wrong(n, last)), 0);

  // the parts
  const plot = svg("svg", { class: "map", tabindex: 0, role: "application", "aria-roledescription": "map" });
  const layers = Object.fromEntries(["axes", "inside"].map((name) => [name, svg(name === "inside" ? "svg" : "g")]));
  const inner = Object.fromEntries(["trails", "centroids", "dots", "chosen", "names"].map((name) => [name, svg("g")]));
  layers.inside.append(...Object.values(inner));
  plot.append(layers.axes, layers.inside);
  const way = { casing: svg("path", { class: "casing" }), line: svg("path", { class: "own-path" }) };
  const steps = stops.map(() => svg("circle", { class: "step", r: 3 }));
  const halo = { casing: svg("circle", { class: "casing" }), ring: svg("circle", { class: "halo" }) };
  const status = html("p", { class: "status", "data-part": "status" });
  const side = html("div", { class: "side" });
  const notes = html("div", { "data-part": "notes" });
  const legend = html("p", { class: "key" });
  const left = html("div", {});
  const body = html("div", { class: "browser" }, left, side);
  let [box, whole, view, pixels, dots, trails, frame] = [undefined, undefined, undefined, [], [], [], 0];

  const pictures = new Map();
  /** A thumbnail as an address, drawn once. */
  function picture(n) {
    const name = state.stop ? `${state.method} ${state.stop} ${n}` : `${n}`;
    if (!pictures.has(name)) {
      pictures.set(name, canvasOf(testPixels(known, method(), state.stop, n), shape, "").toDataURL());
    }
    return pictures.get(name);
  }

  /** Everything that a method, a map or a width decides. */
  function rebuild() {
    const moving = state.map === "moving";
    const everywhere = [...method().positions.flat(), ...method().centroids.map((each) => each.place)];
    whole = wholeView(moving ? everywhere : method().still, box);
    view = whole;
    trails = images.map(() => svg("path", { class: "trail" }));
    inner.trails.replaceChildren(...(moving ? trails : []));
    dots = images.map((n) => svg("g", { class: "dot", "data-index": test.index[n], "data-label": test.label[n] }));
    lift();
    refresh();
  }

  /** Everything that a stop of the attack decides, but for where marks are on their way to it. */
  function refresh() {
    const { margin, prediction } = method();
    const exact = places();
    images.forEach((n) => {
      Object.assign(dots[n].dataset, { x: exact[n][0], y: exact[n][1], margin: margin[state.stop][n],
        prediction: prediction[state.stop][n], wrong: wrong(n) });
    });
    Object.assign(plot.dataset, { method: method().id, map: state.map, step: stops[state.stop] });
    fill();
    summarise();
    describe();
  }

  /** Marks or thumbnails, by the box and by how close the view is. */
  function fill() {
    const thumbnails = shows.has("images") || view.zoom >= IMAGES_FROM;
    images.forEach((n) => {
      const look = classes[test.label[n]];
      dots[n].replaceChildren(...dotOf(look, thumbnails ? picture(n) : undefined, sizeOf(view.zoom)));
      if (!wrong(n)) dots[n].querySelector(".wrong-ring").remove();
    });
    plot.dataset.images = thumbnails;
    legend.replaceChildren(...key(state.map, thumbnails));
    place();
  }

  /** Where everything is in this view, at this moment of its way. */
  function place() {
    const [x, y] = scalesOf(view, box);
    const moving = state.map === "moving";
    const inside = ([a, b]) => [x(a) - box.left, y(b) - box.top];
    const at = places(state.drawn);
    pixels = at.map(inside);
    images.forEach((n) => {
      dots[n].setAttribute("transform", `translate(${pixels[n][0].toFixed(2)} ${pixels[n][1].toFixed(2)})`);
      dots[n].classList.toggle("aside", !open(n));
      trails[n].classList.toggle("aside", !open(n));
      trails[n].setAttribute("d", shows.has("paths") && moving ? path(wayOf(n).map(inside)) : "");
    });
    layers.axes.replaceChildren(moving ? scaled(x, y) : framed());
    inner.centroids.replaceChildren(...(moving ? method().centroids.map((each) => crosshair(inside(each.place))) : []));
    inner.names.replaceChildren(...(moving ? centroidNames(inside) : classNames()));
    placeChosen(moving, inside);
    plot.dataset.zoom = view.zoom;
    plot.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
  }

  /** The places of an image up to where it is on its way. */
  function wayOf(n) {
    const passed = method().positions.slice(0, Math.floor(state.drawn) + 1).map((row) => row[n]);
    return [...passed, between(method().positions.map((row) => [row[n]]), state.drawn)[0]];
  }

  function scaled(x, y) {
    const [first, second] = method().share.map(percent).map((share, n) => `principal axis ${n + 1} (${share} of the variance)`);
    const number = (pixelsWide) => Math.max(Math.round(pixelsWide / 55), 2);
    return axes({ x, y, box, xLabel: first, yLabel: second, xTicks: ticks(x.domain, number(box.right - box.left)),
      yTicks: ticks(y.domain, number(box.bottom - box.top)) });
  }

  function framed() {
    const { left: at, top } = box;
    const middle = (box.left + box.right) / 2;
    return svg("g", { "aria-hidden": "true" },
      svg("rect", { x: at, y: top, width: box.right - at, height: box.bottom - top, fill: "none",
        stroke: "var(--line)" }),
      svg("text", { x: middle, y: box.bottom + 20, "text-anchor": "middle" }, "UMAP: axes without units"));
  }

  function centroidNames(inside) {
    return method().centroids.map(({ place: at, label }) => {
      const [x, y] = inside(at);
      const { name } = classes[label];
      // left of its centroid where it would leave the map
      const beside = x + 16 + LETTER * name.length > box.right - box.left ? { x: x - 8, "text-anchor": "end" } : { x: x + 8 };
      return svg("text", { ...beside, y: y - 6, "font-weight": 600 }, name);
    });
  }

  function classNames() {
    return classes.flatMap(({ name }, label) => {
      const own = images.filter((n) => test.label[n] === label).map((n) => pixels[n]);
      if (!own.length) return [];
      const [x, y] = [0, 1].map((axis) => median(own.map((pixel) => pixel[axis])));
      return [svg("text", { x, y: y - 10, "text-anchor": "middle", "font-weight": 600 }, name)];
    });
  }

  /** The path of the chosen image, its mark above all others, and a halo around it. */
  function lift() {
    inner.dots.replaceChildren(...dots.filter((_, n) => n !== state.chosen));
    inner.chosen.replaceChildren(...Object.values(way), ...steps, halo.casing, dots[state.chosen], halo.ring);
  }

  function placeChosen(moving, inside) {
    const own = moving ? method().positions.map((row) => inside(row[state.chosen])) : [];
    Object.values(way).forEach((line) => line.setAttribute("d", path(own)));
    steps.forEach((step, n) => {
      const [cx, cy] = own[n] ?? [0, 0];
      set(step, { cx, cy, visibility: moving ? "visible" : "hidden" });
    });
    const r = plot.dataset.images === "true" ? 5 + sizeOf(view.zoom) / 1.35 : 12;
    const [cx, cy] = pixels[state.chosen];
    Object.values(halo).forEach((circle) => set(circle, { cx, cy, r }));
  }

  function summarise() {
    const right = stops.map((_, stop) => images.filter((n) => !wrong(n, stop)).length);
    Object.assign(status.dataset, { right: right[state.stop], clean: right[0] });
    const now = state.stop ? `, ${stopName(stops[state.stop])} ${right[state.stop]}` : "";
    status.replaceChildren(html("strong", {}, method().name), ` on ${count} test images of ${known.dataset}. `
      + `Classified correctly: clean ${right[0]}${now}.`);
    notes.replaceChildren(...explained(known, method(), state).map((text) => html("p", { class: "note" }, text)));
    plot.setAttribute("aria-label", `Map of ${count} test images in the embedding of ${method().name}. Arrow keys `
      + "choose the next image in a direction, Page Up and Page Down by number; plus and minus zoom, 0 shows the whole map.");
  }

  // the chosen image

  function verdict(n, stop) {
    const guess = classes[method().prediction[stop][n]].name;
    const taken = html("strong", {}, `→ ${guess}${wrong(n, stop) ? " (wrong)" : ""}`);
    return [taken, html("br"), `margin ${nats(method().margin[stop][n])}`];
  }

  function portrait(n, stop) {
    const when = stopName(stops[stop]);
    const label = `test image ${test.index[n]}, ${when}`;
    return html("figure", { "data-step": stops[stop], "data-margin": method().margin[stop][n] },
      canvasOf(testPixels(known, method(), stop, n), shape, label),
      html("figcaption", {}, when, html("br"), verdict(n, stop)));
  }

  function neighbour(n, near) {
    const [index, label] = [train.index[near], train.label[near]];
    const { name } = classes[label];
    const drawn = canvasOf(rgba(train.bytes, near * known.size, shape), shape, `training image ${index}`);
    return html("li", { class: label === test.label[n] ? "" : "other", "data-index": index, "data-label": label },
      drawn, html("span", { title: name }, name));
  }

  function nearest(n, stop) {
    const attributes = { class: "near", "data-step": stops[stop], "aria-label": `nearest, ${stopName(stops[stop])}` };
    return html("ol", attributes, method().neighbours[stop][n].map((near) => neighbour(n, near)));
  }

  function describe() {
    const n = state.chosen;
    const faint = (text) => html("p", { class: "faint" }, text);
    const hint = state.kept ? "kept: click beside it, or Esc, lets go" : "point at a mark; click keeps it";
    const who = html("strong", {}, `Test image ${test.index[n]}, class ${classes[test.label[n]].name}`);
    const unmoved = html("figure", {}, html("div", { class: "no-image" }, "move the slider to attack"));
    side.dataset.index = test.index[n];
    side.replaceChildren(html("p", { class: "who" }, who, html("br"), html("span", { class: "faint" }, hint)),
      html("div", { class: "pair" }, portrait(n, 0), state.stop ? portrait(n, state.stop) : unmoved),
      html("p", { class: "near-title" }, "Nearest training images in the embedding"),
      ...[...new Set([0, state.stop])].flatMap((stop) => [faint(stopName(stops[stop])), nearest(n, stop)]),
      faint("Dashed frame: another class than the image's."));
  }

  function said(n) {
    const guess = classes[method().prediction[state.stop][n]].name;
    return `Test image ${test.index[n]}, class ${classes[test.label[n]].name}, ${stopName(stops[state.stop])}: `
      + `taken for ${guess}, ${wrong(n) ? "wrong" : "right"}, margin ${nats(method().margin[state.stop][n])}`;
  }

  /** Choose an image; `loud` tells a screen reader, which a passing pointer does not. */
  function choose(n, { kept = state.kept, loud = false } = {}) {
    if (n === state.chosen && kept === state.kept && !loud) return;
    Object.assign(state, { chosen: n, kept });
    lift();
    describe();
    place();
    if (loud) announce(said(n));
  }

  // what the reader does

  function toStop(stop) {
    state.stop = stop;
    attackSlider.set(stop);
    refresh();
    glide();
    const wrongNow = images.filter((n) => wrong(n)).length;
    announce(`${stopName(stops[stop])}: ${wrongNow} of ${count} images misclassified`);
  }

  function glide() {
    cancelAnimationFrame(frame);
    const [from, to, begun] = [state.drawn, state.stop, performance.now()];
    const move = (now) => {
      const share = calm.matches ? 1 : Math.min(Math.max((now - begun) / 400, 0), 1);
      state.drawn = share === 1 ? to : from + share * (to - from);
      place();
      if (share < 1) frame = requestAnimationFrame(move);
    };
    move(begun);
  }

  function look(next) {
    view = next;
    fill();
  }

  function zoomBy(factor, pixel) {
    const [x, y] = scalesOf(view, box);
    const pointed = pixel && [x.invert(pixel[0] + box.left), y.invert(pixel[1] + box.top)];
    look(zoomedView(view, factor, pointed ?? places(state.drawn)[state.chosen], whole));
  }

  function panBy(right, down) {
    view = { ...view, x: view.x - (right * view.unit) / view.zoom, y: view.y + (down * view.unit) / view.zoom };
    place();
  }

  /** Bring the chosen image into the view. */
  function follow() {
    const [x, y] = pixels[state.chosen];
    if (x < 0 || y < 0 || x > box.right - box.left || y > box.bottom - box.top) {
      const [a, b] = places(state.drawn)[state.chosen];
      view = { ...view, x: a, y: b };
      place();
    }
  }

  function nextWrong() {
    const order = images.map((n) => (state.chosen + 1 + n) % count).filter((n) => wrong(n) && open(n));
    if (order.length) {
      choose(order[0], { kept: true, loud: true });
      follow();
    } else announce("no image is misclassified here");
  }

  function byKey(event) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const turn = { PageUp: -1, PageDown: 1 }[event.key];
    const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5 }[event.key];
    const ours = direction || turn || factor || ["0", "Escape"].includes(event.key);
    if (!ours || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (factor) zoomBy(factor);
    else if (event.key === "0") look(whole);
    else if (event.key === "Escape") choose(state.chosen, { kept: false, loud: true });
    else {
      const visible = images.filter(open);
      const next = turn
        ? visible.at((visible.indexOf(state.chosen) + turn) % visible.length) ?? state.chosen
        : onwards(pixels, state.chosen, direction, open);
      choose(next, { kept: true, loud: true });
      follow();
    }
  }

  // pointers: one hovers, chooses or moves the map; two move and zoom it
  const down = new Map();
  let dragged = false;
  const pixelOf = (event) => {
    const bounds = plot.getBoundingClientRect();
    return [event.clientX - bounds.left - box.left, event.clientY - bounds.top - box.top];
  };
  const span = () => {
    const [a, b] = [...down.values()];
    return { middle: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2], distance: Math.hypot(a[0] - b[0], a[1] - b[1]) || 1 };
  };

  function pressed(event) {
    plot.setPointerCapture(event.pointerId);
    down.set(event.pointerId, pixelOf(event));
    dragged = dragged && down.size > 1;
  }

  function movedTo(event) {
    const pixel = pixelOf(event);
    const before = down.get(event.pointerId);
    if (!before) {
      const near = closest(pixels, pixel, 16, open);
      plot.classList.toggle("pointed", near >= 0);
      if (near >= 0 && !state.kept) choose(near);
      return;
    }
    if (down.size === 1) {
      if (!dragged && Math.hypot(pixel[0] - before[0], pixel[1] - before[1]) < 4) return;
      dragged = true;
      if (view.zoom > 1) panBy(pixel[0] - before[0], pixel[1] - before[1]);
      down.set(event.pointerId, pixel);
      return;
    }
    dragged = true;
    const earlier = span();
    down.set(event.pointerId, pixel);
    const now = span();
    zoomBy(now.distance / earlier.distance, earlier.middle);
    if (view.zoom > 1) panBy(now.middle[0] - earlier.middle[0], now.middle[1] - earlier.middle[1]);
  }

  function released(event) {
    if (!down.delete(event.pointerId) || event.type === "pointercancel") return;
    if (!dragged) {
      const near = closest(pixels, pixelOf(event), event.pointerType === "mouse" ? 16 : 28, open);
      choose(near >= 0 ? near : state.chosen, { kept: near >= 0, loud: true });
    }
    if (!down.size) dragged = false;
  }

  plot.addEventListener("keydown", byKey);
  plot.addEventListener("pointerdown", pressed);
  plot.addEventListener("pointermove", movedTo);
  plot.addEventListener("pointerup", released);
  plot.addEventListener("pointercancel", released);
  plot.addEventListener("wheel", (event) => {
    // without Ctrl the page scrolls; a pinch on a trackpad comes with it
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 200), pixelOf(event));
  }, { passive: false });

  // controls
  const attackSlider = slider("Attack", { min: 0, max: last, step: 1, value: 0,
    text: (stop) => (stop ? `${stops[stop]} of ${attack.steps} steps` : "clean"), input: toStop });
  let timer;
  const halt = () => {
    clearInterval(timer);
    timer = undefined;
    play.textContent = "Play";
  };
  const play = button("Play", () => {
    if (timer) return halt();
    play.textContent = "Stop";
    toStop(state.stop === last ? 0 : state.stop + 1);
    timer = setInterval(() => {
      if (state.stop < last) toStop(state.stop + 1);
      if (state.stop === last) halt();
    }, 900);
    return undefined;
  });
  attackSlider.range.addEventListener("input", halt);
  const methodChoice = choice("Method", methods.map(({ name }, n) => [String(n), name]), "0", (value) => {
    state.method = Number(value);
    rebuild();
    announce(`${method().name}: ${images.filter((n) => wrong(n)).length} of ${count} images misclassified`);
  });
  const maps = [["moving", "principal axes"], ["still", "UMAP, still"]];
  const mapChoice = methods.every(({ still }) => still) && choice("Map", maps, "moving", (value) => {
    state.map = value;
    rebuild();
    announce(explained(known, method(), state)[0]);
  });
  const classButtons = classes.map(({ name, color, marker }, label) => button("", () => {
    state.only = state.only === label ? undefined : label;
    classButtons.forEach((each, n) => each.setAttribute("aria-pressed", n === state.only));
    place();
    announce(state.only === undefined ? "all classes are shown" : `only class ${name} stands out`);
  }, { "aria-pressed": "false", "aria-label": `class ${name} alone` }));
  classButtons.forEach((each, label) => each.append(
    svg("svg", { width: 14, height: 14, "aria-hidden": "true" },
      mark(classes[label].marker, 7, 7, 4.5, { fill: classes[label].color })),
    classes[label].name));
  const bar = (...children) => html("div", { class: "bar" }, children.filter(Boolean));
  left.append(plot, html("div", { class: "classes", role: "group", "aria-label": "classes" }, classButtons), legend);
  root.classList.add("embeddings");
  const longest = Math.max(...classes.map(({ name }) => name.length));
  root.style.setProperty("--cell", `${Math.min(Math.max(LETTER * longest, 44), 75)}px`);
  root.append(html("style", {}, LOOK), bar(methodChoice, mapChoice), bar(attackSlider.element, play),
    bar(boxes("Show", [["images", "images"], ["paths", "all paths"]], shows, fill),
      html("span", { class: "zoom", role: "group", "aria-label": "zoom" },
        button("−", () => zoomBy(1 / 1.5), { "aria-label": "zoom out" }),
        button("+", () => zoomBy(1.5), { "aria-label": "zoom in" }),
        button("Whole map", () => look(whole))),
      button("Next misclassified", nextWrong)),
    status, body, notes);
  onCleanup(() => {
    clearInterval(timer);
    cancelAnimationFrame(frame);
  });
  responsive(body, (width) => {
    const wide = width >= WIDE;
    body.classList.toggle("wide", wide);
    const across = wide ? width - SIDE - 16 : width;
    const height = Math.min(Math.max(Math.round(0.95 * across), 320), 480);
    box = { left: 58, right: across - 8, top: 8, bottom: height - 44 };
    set(plot, { width: across, height, viewBox: `0 0 ${across} ${height}` });
    set(layers.inside, { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top,
      overflow: "hidden" });
    rebuild();
  }, onCleanup);
});
