// The numbers, small helpers for the page, and how numbers are said. Everything below shares one scope.

const D = JSON.parse(document.getElementById("numbers").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Okabe and Ito 2008; every colour comes with a shape of its own, so that colour is never the only sign.
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"];
const SHAPES = ["circle", "square", "triangle", "diamond", "down", "plus", "cross"];
// From little epsilon (dark: much privacy) to much; grey is none.
const BLUES = ["#08306b", "#0b559f", "#2b7bba", "#539ecd", "#89bedc", "#b3d3e8"];
const GREY = "#6b7280";

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "title", "polyline", "tspan"].includes(tag);
  const made = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const infinite = (point) => point.eps === null;
const epsilonOf = (point) => (infinite(point) ? Infinity : point.eps);
const byId = new Map(D.points.map((point) => [point.id, point]));

function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === Infinity) return "∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-6) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(digits)));
}
// As many digits as the ticks of an axis need: none is said more than a fiftieth of a step beside its place.
function apart(values) {
  const known = values.filter(Number.isFinite).sort((a, b) => a - b);
  const step = Math.min(...known.slice(1).map((value, i) => value - known[i]).filter((gap) => gap > 0));
  const exact = (digits) => known.every((value) => !(Math.abs(Number(value.toPrecision(digits)) - value) > 0.02 * step));
  const digits = [3, 4, 5, 6, 7].find(exact) || 8;
  return (value) => short(value, digits);
}
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const accuracyText = (stat) =>
  stat === null ? "–" : percent(stat[0]).replace(" %", stat[1] === null ? " %" : ` ± ${(100 * stat[1]).toFixed(1)} %`);
const epsilonText = (point) => (infinite(point) ? "no privacy" : short(point.eps));

const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
// One prefix for a whole axis, so that its labels can be compared.
function scaleOf(key, most) {
  const cost = D.costs.find((one) => one.key === key);
  if (cost.unit === "s") {
    if (most >= 7200) return [3600, "h"];
    return most >= 180 ? [60, "min"] : [1, "s"];
  }
  if (cost.unit === "kWh") return most < 0.1 ? [1e-3, "Wh"] : [1, "kWh"];
  if (cost.unit === "B" || cost.unit === "FLOP") {
    const [size, prefix] = PREFIXES.find(([limit]) => most >= limit) || [1, ""];
    return [size, prefix + cost.unit];
  }
  return [1, cost.unit];
}
function costText(key, value) {
  const [size, unit] = scaleOf(key, Math.abs(value));
  return `${short(value / size)} ${unit}`.trim();
}

function promiseText(point) {
  if (infinite(point)) return "no privacy: epsilon is infinite";
  return `epsilon ${short(point.eps)} at delta ${Number(point.delta).toExponential(1)}, ${point.adjacency}, trust ${point.trust}`;
}

// --- what is pointed at ---

const tip = $("tip");
function showTip(anchor, title, lines) {
  tip.replaceChildren(element("b", {}, title), ...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const box = anchor.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
  const above = box.top - height - 10;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above > 4 ? above : box.bottom + 10) + scrollY}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

function tellPoint(point) {
  const lines = [`accuracy ${accuracyText(point.acc)}${point.acc[2] > 1 ? ` (${point.acc[2]} seeds)` : ""}`, promiseText(point)];
  for (const key of ["money", "train_seconds"]) {
    if (point.cost[key]) lines.push(`${D.costs.find((c) => c.key === key).label}: ${costText(key, point.cost[key][0])}`);
  }
  return lines;
}
