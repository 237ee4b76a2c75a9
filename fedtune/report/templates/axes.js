// Scales, axes and marks: what all charts are built from.

function linear(domain, range) {
  const [a, b] = domain, [from, to] = range;
  const scale = (value) => from + ((value - a) / (b - a || 1)) * (to - from);
  scale.invert = (place) => a + ((place - from) / (to - from)) * (b - a);
  scale.ticks = (count) => niceTicks(a, b, count);
  return scale;
}

function logarithmic(domain, range) {
  const inner = linear([Math.log10(domain[0]), Math.log10(domain[1])], range);
  const scale = (value) => inner(Math.log10(value));
  scale.invert = (place) => 10 ** inner.invert(place);
  scale.ticks = () => {
    const found = [];
    for (let power = Math.floor(Math.log10(domain[0])) - 1; power <= Math.log10(domain[1]); power++) {
      for (const step of [1, 2, 5]) {
        const value = step * 10 ** power;
        if (value >= domain[0] * 0.999 && value <= domain[1] * 1.001) found.push(value);
      }
    }
    return found;
  };
  return scale;
}

function niceTicks(low, high, count = 5) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw) || 10 * power;
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) {
    found.push(Number(tick.toPrecision(12)));
  }
  return found;
}

function padded(values, share = 0.08) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low) * share || Math.abs(high) * 0.05 || 1;
  return [low - pad, high + pad];
}

// Accuracies in percent, with room for the errors; never outside of 0 to 100.
function accuracyDomain(stats) {
  const values = stats.flatMap(([mean, error]) => [100 * (mean - (error || 0)), 100 * (mean + (error || 0))]);
  const [low, high] = padded(values);
  return [Math.max(0, low), Math.min(100, high)];
}

// A logarithmic axis of epsilon, with a place for infinity to the right of the largest.
function epsilonScale(points, range) {
  const finite = points.map(epsilonOf).filter((value) => Number.isFinite(value) && value > 0);
  const some = points.some(infinite), width = range[1] - range[0];
  const end = some ? range[1] - Math.min(90, width * 0.14) : range[1];
  const low = Math.min(...finite, Infinity), high = Math.max(...finite, 0);
  const domain = finite.length ? (low === high ? [low / 2, high * 2] : [low, high]) : [1, 10];
  const inset = Math.min(26, width * 0.05);
  const scale = logarithmic(domain, [range[0] + inset, end - (some && finite.length ? inset / 2 : inset)]);
  const place = (value) => (value === Infinity ? (finite.length ? range[1] - inset : (range[0] + range[1]) / 2) : scale(Math.max(value, domain[0])));
  // Ticks where points are: epsilons are chosen, not measured, so those are the numbers to read.
  const clusters = [];
  for (const value of [...new Set(finite)].sort((a, b) => a - b)) {
    if (!clusters.length || place(value) - place(clusters[clusters.length - 1]) > 34) clusters.push(value);
  }
  return { place, ticks: some ? [...clusters, Infinity] : clusters, breakAt: some && finite.length ? (end + range[1]) / 2 - inset / 2 : null };
}

// A drawing of the width of its place on the page. `draw` fills it and is called again when that changes.
// On paper it is drawn for the width of a sheet, whatever the window was: scaled down, its words were too small.
const charts = [];
let paper = false;
function chart(host, height, draw) {
  const render = () => {
    const width = paper ? (host.closest(".grid") ? 225 : 690) : Math.max(260, Math.round(host.clientWidth || 640));
    const tall = Math.round((typeof height === "function" ? height(width) : height) * (paper ? 0.8 : 1));
    const root = element("svg", { viewBox: `0 0 ${width} ${tall}`, role: "group" });
    const extra = draw(root, width, tall) || [];
    host.replaceChildren(root, ...extra);
  };
  charts.push(render);
  return render;
}

function axes(root, box, x, y, names) {
  const { left, right, top, bottom } = box;
  for (const tick of y.ticks) {
    const at = y.place(tick);
    root.append(element("line", { class: "gridline", x1: left, x2: right, y1: at, y2: at }));
    root.append(element("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, y.text(tick)));
  }
  root.append(element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  let taken = -Infinity; // a label that would touch the one before it is left out
  for (const tick of x.ticks) {
    const at = x.place(tick), text = x.text(tick), half = 3.6 * text.length;
    root.append(element("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (at - half < taken + 4) continue;
    root.append(element("text", { x: at, y: bottom + 18, "text-anchor": "middle" }, text));
    taken = at + half;
  }
  if (names.x) root.append(element("text", { class: "axis-title", x: right, y: bottom + 37, "text-anchor": "end" }, names.x));
  if (names.y) root.append(element("text", { class: "axis-title", x: 0, y: top - 12 }, names.y));
}

function outline(name, x, y, r) {
  const paths = {
    circle: `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    square: `M${x - r * 0.9},${y - r * 0.9}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
    triangle: `M${x},${y - 1.15 * r}l${1.1 * r},${2 * r}h${-2.2 * r}z`,
    down: `M${x},${y + 1.15 * r}l${1.1 * r},${-2 * r}h${-2.2 * r}z`,
    diamond: `M${x},${y - 1.3 * r}l${1.1 * r},${1.3 * r}l${-1.1 * r},${1.3 * r}l${-1.1 * r},${-1.3 * r}z`,
    plus: `M${x - r * 0.4},${y - r}h${0.8 * r}v${0.6 * r}h${0.6 * r}v${0.8 * r}h${-0.6 * r}v${0.6 * r}h${-0.8 * r}v${-0.6 * r}h${-0.6 * r}v${-0.8 * r}h${0.6 * r}z`,
    cross: `M${x},${y - r * 0.45}l${r * 0.6},${-r * 0.6}l${r * 0.45},${r * 0.45}l${-r * 0.6},${r * 0.6}l${r * 0.6},${r * 0.6}l${-r * 0.45},${r * 0.45}l${-r * 0.6},${-r * 0.6}l${-r * 0.6},${r * 0.6}l${-r * 0.45},${-r * 0.45}l${r * 0.6},${-r * 0.6}l${-r * 0.6},${-r * 0.6}l${r * 0.45},${-r * 0.45}z`,
  };
  return paths[name];
}
const shape = (name, x, y, size, style) => element("path", { d: outline(name, x, y, size), ...style });

// The name of a line at its end: the words in ink, which reads well in any colour; the mark says which line.
function lineName(root, x, y, name, color, text) {
  root.append(shape(name, x, y, 4.5, { fill: color }));
  root.append(element("text", { class: "strong", x: x + 10, y: y + 4 }, text));
}

// Thousands of marks or lines that nobody points at: one path for all that look alike.
function cloud(root, items) {
  const alike = new Map();
  for (const { d, ...style } of items) {
    const key = JSON.stringify(style);
    if (!alike.has(key)) alike.set(key, [style, []]);
    alike.get(key)[1].push(d);
  }
  for (const [style, parts] of alike.values()) root.append(element("path", { d: parts.join(""), ...style }));
}

// Labels at the ends of lines, moved apart so that they do not touch.
function spread(places, gap, low, high) {
  const order = places.map((place, i) => [place, i]).sort((a, b) => a[0] - b[0]);
  for (let i = 1; i < order.length; i++) order[i][0] = Math.max(order[i][0], order[i - 1][0] + gap);
  let over = order.length ? order[order.length - 1][0] - high : 0;
  for (let i = order.length - 1; i >= 0 && over > 0; i--) {
    order[i][0] = i === order.length - 1 ? high : Math.min(order[i][0], order[i + 1][0] - gap);
  }
  const found = [];
  for (const [place, i] of order) found[i] = Math.max(place, low);
  return found;
}

function legend(items) {
  return element("ul", { class: "legend" }, ...items.map(({ color, mark, text, edge }) =>
    element("li", {}, element("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
      shape(mark || "circle", 8, 8, 5, { fill: color, stroke: edge || color, "stroke-width": edge ? 0.8 : 1.5 })), text)));
}
