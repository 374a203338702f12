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
export class DataError extends Error {}

/** An element; attributes that are functions become listeners, and undefined ones are left out. */
export function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
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
export function widget(title, build) {
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
export function field(data, name, kind) {
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
export function points(data, name, columns) {
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
export function shown(value, digits = 3) {
  return Number.isFinite(value) ? Number(value.toPrecision(digits)).toString().replace("-", "−") : value > 0 ? "∞" : "–";
}

/** A share with its interval, in per cent, as the book prints them. */
export function withInterval(share, low, high) {
  const percent = (value) => (100 * value).toFixed(1);
  return `${percent(share)}\u00a0[${percent(low)},\u00a0${percent(high)}]`;
}

/** A straight scale from a domain to a range of pixels. */
export function linear([from, to], [start, end]) {
  const scale = (value) => start + ((value - from) / (to - from || 1)) * (end - start);
  scale.invert = (pixel) => from + ((pixel - start) / (end - start || 1)) * (to - from);
  scale.domain = [from, to];
  return scale;
}

/** Round numbers within an interval, about `count` of them. */
export function ticks([from, to], count = 5) {
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
export function axes({ x, y, box, xLabel, yLabel, xTicks, yTicks, xText = shown, yText = shown }) {
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
export function path(pixels) {
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
export function mark(kind, x, y, size, attributes = {}) {
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
export function responsive(container, draw, onCleanup) {
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
export function slider(label, { min, max, step, value, text = shown, input }) {
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
export function choice(label, options, chosen, change) {
  const select = html("select", { "aria-label": label, change: () => change(select.value) },
    options.map(([value, text]) => html("option", { value, selected: value === chosen }, text)));
  return html("label", {}, html("span", {}, label), select);
}

/** Boxes to tick; `options` are [value, text] pairs, `chosen` a set that is kept up to date. */
export function boxes(label, options, chosen, change) {
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
export function button(text, click, attributes = {}) {
  return html("button", { type: "button", click, ...attributes }, text);
}

/** A button that copies what `text()` returns, and says so. */
export function copyButton(label, text, announce) {
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
export function draggable(node, plot, { label, at, move, scales, step }) {
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
export function tip(root) {
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
export function parseCsv(text) {
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
