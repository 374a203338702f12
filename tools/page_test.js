// What is wrong with the page that is open, as its reader would see it: see page_test.py, which evaluates this function.
() => {
  const faults = [];
  const pierced = (root) =>
    [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? pierced(e.shadowRoot) : [])]);
  const above = (e) => e.parentElement || e.getRootNode().host;
  const said = (e) => {
    const text = (e.textContent || e.getAttribute("alt") || "").trim();
    return `${e.tagName.toLowerCase()} "${text.slice(0, 40)}"`;
  };
  const article = document.querySelector("article") || document.body;
  // formulas are laid out by a style sheet that may not be there
  const all = pierced(article).filter((e) => !e.closest(".katex") && e.getClientRects().length);

  const scrolls = (e) => {
    for (let p = above(e); p; p = above(p)) {
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true;
    }
    return false;
  };
  for (const e of all) {
    const box = e.getBoundingClientRect();
    if (box.width > 2 && box.height > 2 && box.right > innerWidth + 1 && !scrolls(e)) {
      faults.push(`wider than the page: ${said(e)}`);
    }
  }
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) faults.push(`the page is ${wide} pixels wide`);

  // on a wide screen a reader sees a whole table without moving it
  for (const e of innerWidth > 1000 ? article.querySelectorAll("table") : []) {
    const over = [e.parentElement, e.parentElement.parentElement].find((p) => p.scrollWidth > p.clientWidth + 1 && scrolls(e));
    if (e.getClientRects().length && over) faults.push(`cut off at its column: ${said(e)}`);
  }

  const seen = new Set();
  for (const e of article.querySelectorAll("table, figure img")) {
    if (!e.getClientRects().length) continue;
    const what = e.tagName === "IMG" ? e.currentSrc || e.src : e.innerText.replace(/\s+/g, " ");
    if (what.length > 20 && seen.has(what)) faults.push(`twice: ${said(e)}`);
    seen.add(what);
  }

  // whatever way a colour is written, one painted pixel says what it is
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const painted = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const behind = (e) => {
    for (let p = e; p; p = above(p)) {
      const colour = painted(getComputedStyle(p).backgroundColor);
      if (colour[3] > 0.5) return colour;
    }
    return [1, 1, 1, 1];
  };
  const luminance = (colour) => {
    const linear = colour.slice(0, 3).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  for (const e of all) {
    const written = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const style = getComputedStyle(e);
    if (e instanceof SVGElement || !written || style.visibility === "hidden") continue;
    const [light, dark] = [painted(style.color), behind(e)].map(luminance).sort((a, b) => b - a);
    if ((light + 0.05) / (dark + 0.05) < 2) faults.push(`hardly to be seen: ${said(e)}`);
  }

  for (const e of [...article.querySelectorAll("*")].filter((each) => each.shadowRoot)) {
    const root = e.shadowRoot.querySelector(".cw");
    if (!root || root.querySelector(":scope > .wrong") || root.children.length < 2) {
      faults.push("a widget shows nothing");
    }
  }

  const links = [...document.querySelectorAll("a[href]")].map((a) => a.href);
  return {
    faults: [...new Set(faults)],
    links: [...new Set(links.filter((link) => link.startsWith(location.origin)))],
    anchors: [...document.querySelectorAll("[id]")].map((e) => e.id),
    widgets: [...article.querySelectorAll("*")].filter((each) => each.shadowRoot).length,
  };
}
