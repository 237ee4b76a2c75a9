// Charts in which a configuration is a mark: the frontier, and accuracy against each cost.

const EDGE = "#57606a"; // of marks in light colours, which would be lost on white
const MOST_MARKS = 400; // with more, only those that are not dominated can be pointed at

// Non-dominated among what is shown: accuracy up, epsilon down. Ties do not dominate each other.
function frontOf(points) {
  const order = [...points].sort((a, b) => epsilonOf(a) - epsilonOf(b) || b.acc[0] - a.acc[0]);
  const found = [];
  let best = -Infinity, at = -Infinity;
  for (const point of order) {
    if (point.acc[0] > best) { found.push(point); best = point.acc[0]; at = epsilonOf(point); }
    else if (point.acc[0] === best && epsilonOf(point) === at) found.push(point);
  }
  return new Set(found);
}

function seriesOf(points) {
  const name = state.series;
  if (!name) return { values: [""], of: () => 0, label: () => "" };
  const say = (value) => `${D.short[name]} ${value === null ? "default" : Array.isArray(value) ? value.join("+") : value}`;
  const values = [...new Set(points.map((point) => JSON.stringify(point.set[name] ?? null)))].map((v) => JSON.parse(v));
  values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
  const index = new Map(values.map((value, i) => [JSON.stringify(value), i]));
  return { values, of: (point) => index.get(JSON.stringify(point.set[name] ?? null)) % COLORS.length, label: say };
}

// Colour by epsilon: a ramp of one hue, a step for each epsilon or for each part of many.
function ramp(points) {
  const levels = [...new Set(points.filter((p) => !infinite(p)).map((p) => Number(p.eps.toPrecision(2))))].sort((a, b) => a - b);
  const step = (point) => {
    const at = levels.indexOf(Number(point.eps.toPrecision(2)));
    return BLUES[levels.length < 2 ? 1 : Math.round((at / (levels.length - 1)) * (BLUES.length - 1))];
  };
  const color = (point) => (infinite(point) ? GREY : step(point));
  const named = levels.length <= 6 ? levels : [levels[0], levels[levels.length >> 1], levels[levels.length - 1]];
  const items = named.map((level) => ({ color: step({ eps: level }), edge: EDGE, text: `epsilon ${short(level)}` }));
  if (points.some(infinite)) items.push({ color: GREY, mark: "square", text: "no privacy" });
  return { color, items };
}

function mark(root, point, x, y, name, size, style) {
  const group = element("g", {
    class: "mark", tabindex: 0, role: "button", "data-id": point.id,
    "aria-label": `${point.label}: accuracy ${accuracyText(point.acc)}, ${promiseText(point)}`,
    onpointerenter: () => showTip(group, point.label, tellPoint(point)), onpointerleave: hideTip,
    onfocus: () => showTip(group, point.label, tellPoint(point)), onblur: hideTip,
    onclick: (event) => { if (event.pointerType === "touch") showTip(group, point.label, tellPoint(point)); else openRow(point.id); },
    onkeydown: (event) => { if (event.key === "Enter") openRow(point.id); },
  }, element("circle", { class: "hit", cx: x, cy: y, r: Math.max(13, size + 6), fill: "transparent" }), shape(name, x, y, size, style));
  root.append(group);
}

function bar(root, x, low, high, color, opacity) {
  const path = `M${x - 3.5},${low}h7M${x},${low}V${high}M${x - 3.5},${high}h7`;
  root.append(element("path", { d: path, stroke: color, "stroke-width": 1.3, opacity, fill: "none" }));
}

const drawFrontier = chart($("frontier"), (width) => (width < 520 ? 340 : 430), (root, width, height) => {
  const points = kept().filter((point) => point.acc);
  if (!points.length) return [element("p", { class: "muted" }, "No configuration passes the filters.")];
  const box = { left: 44, right: width - 6, top: 30, bottom: height - 48 };
  const x = epsilonScale(points, [box.left, box.right]);
  const y = linear(accuracyDomain(points.map((point) => point.acc)), [box.bottom, box.top]);
  axes(root, box, { ...x, text: (v) => (v !== Infinity ? short(v) : width < 520 ? "none" : "no privacy") },
    { place: y, ticks: y.ticks(height / 70), text: (v) => short(v) },
    { x: "epsilon (smaller is more private)", y: "accuracy on the test split, percent" });
  if (x.breakAt !== null) root.append(element("line", { x1: x.breakAt, x2: x.breakAt, y1: box.top, y2: box.bottom, stroke: "#c4cad1", "stroke-dasharray": "2 5" }));
  const series = seriesOf(points), front = frontOf(points), many = points.length > 150;
  const dodge = (point) => (series.of(point) - (series.values.length - 1) / 2) * Math.min(9, 36 / series.values.length);
  const at = (point) => x.place(epsilonOf(point)) + (series.values.length > 1 ? dodge(point) : 0);
  const line = [...front].sort((a, b) => epsilonOf(a) - epsilonOf(b));
  for (let i = 1; i < line.length; i++) {
    const [a, b] = [line[i - 1], line[i]];
    root.append(element("path", {
      d: `M${at(a)},${y(100 * a.acc[0])}H${at(b)}V${y(100 * b.acc[0])}`, fill: "none", stroke: "#8c959f",
      "stroke-width": 1.4, "stroke-dasharray": infinite(b) ? "3 4" : null,
    }));
  }
  const chosen = byId.get(group().chosen);
  const order = [...points].sort((a, b) => front.has(a) - front.has(b) || a.acc[0] - b.acc[0]);
  const quiet = points.length > MOST_MARKS ? order.filter((point) => !front.has(point) && point !== chosen) : [];
  cloud(root, quiet.map((point) => ({ d: outline(SHAPES[series.of(point)], at(point), y(100 * point.acc[0]), 3), fill: "none", stroke: COLORS[series.of(point)], opacity: 0.35 })));
  for (const point of quiet.length ? order.filter((p) => front.has(p) || p === chosen) : order) {
    const color = COLORS[series.of(point)], best = front.has(point), opacity = best || !many ? 1 : 0.35;
    const [mean, error] = point.acc;
    if (error && (best || !many)) bar(root, at(point), y(100 * (mean - error)), y(100 * (mean + error)), color, best ? 1 : 0.55);
    mark(root, point, at(point), y(100 * mean), SHAPES[series.of(point)], best ? 6.5 : many ? 3.5 : 5,
      { fill: best ? color : "#fff", stroke: best ? "#1b1f24" : color, "stroke-width": best ? 1.2 : 1.6, opacity });
  }
  if (chosen && points.includes(chosen)) {
    const cx = at(chosen), cy = y(100 * chosen.acc[0]);
    root.append(element("circle", { cx, cy, r: 12, fill: "none", stroke: "#1b1f24", "stroke-width": 1.6, "pointer-events": "none" }));
    const right = cx > width * 0.7, side = right ? -1 : 1;
    // Above or below, where it hides fewer marks.
    const hidden = (at_y) => points.filter((p) => Math.abs(at(p) - cx - side * 48) < 48 && Math.abs(y(100 * p.acc[0]) - at_y + 4) < 13).length;
    const [above, below] = [cy - 19, cy + 30], up = cy - box.top > 50 && (box.bottom - cy < 40 || hidden(above) <= hidden(below));
    root.append(element("text", { class: "strong halo", x: cx + 8 * side, y: up ? above : below, "text-anchor": right ? "end" : "start", "pointer-events": "none" }, "recommended"));
  }
  if (series.values.length < 2) return [];
  return [legend(series.values.slice(0, COLORS.length).map((value, i) => ({ color: COLORS[i], mark: SHAPES[i], text: series.label(value) })))];
});

// One small chart for each cost that is known and not the same everywhere.
const costCharts = [];
function buildCosts() {
  const host = $("costs");
  host.replaceChildren();
  costCharts.length = 0;
  for (const cost of D.costs) {
    const all = inGroup().filter((point) => point.acc && point.cost[cost.key]);
    const values = all.map((point) => point.cost[cost.key][0]);
    if (!all.length || (Math.max(...values) === Math.min(...values) && all.length > 1)) continue;
    const figure = element("figure", { class: "chart", "data-cost": cost.key });
    host.append(element("div", {}, element("h3", {}, cost.label[0].toUpperCase() + cost.label.slice(1)), figure));
    costCharts.push(chartOf(figure, cost));
  }
  $("costs-legend").replaceChildren(...(costCharts.length ? [legend(ramp(inGroup()).items)] : []));
  if (!costCharts.length) host.append(element("p", { class: "muted" }, "No cost differs between these configurations."));
}

function chartOf(figure, cost) {
  const render = chart(figure, 236, (root, width, height) => {
    const points = kept().filter((point) => point.acc && point.cost[cost.key]);
    if (!points.length) return [element("p", { class: "muted" }, "Nothing passes the filters.")];
    const value = (point) => point.cost[cost.key][0];
    const box = { left: 34, right: width - 8, top: 26, bottom: height - 46 };
    const values = points.map(value), most = Math.max(...values), least = Math.min(...values);
    const [size, unit] = scaleOf(cost.key, most);
    const wide = least > 0 && most / least > 12;
    const x = wide ? logarithmic([least * 0.85, most * 1.15], [box.left, box.right])
      : linear(padded(values.map((v) => v / size)), [box.left, box.right]);
    const place = wide ? (v) => x(v) : (v) => x(v / size);
    const y = linear(accuracyDomain(points.map((point) => point.acc)), [box.bottom, box.top]);
    let ticks = wide ? x.ticks() : x.ticks(Math.max(3, width / 90)).map((tick) => tick * size);
    if (ticks.length > 6) ticks = ticks.filter((_, i) => i % Math.ceil(ticks.length / 5) === 0);
    const said = apart(ticks.map((tick) => tick / size));
    axes(root, box, { place, ticks, text: (v) => said(v / size) }, { place: y, ticks: y.ticks(4), text: (v) => short(v) },
      { x: unit || cost.label, y: "accuracy, percent" });
    const { color } = ramp(inGroup()), many = points.length > 150;
    const best = (point) => point.best.includes(cost.key);
    const order = [...points].sort((a, b) => best(a) - best(b)), crowd = points.length > MOST_MARKS;
    if (crowd) cloud(root, order.filter((p) => !best(p)).map((p) => ({ d: outline("circle", place(value(p)), y(100 * p.acc[0]), 2.4), fill: color(p), opacity: 0.45 })));
    for (const point of crowd ? order.filter(best) : order) {
      mark(root, point, place(value(point)), y(100 * point.acc[0]), infinite(point) ? "square" : "circle", best(point) ? 5.5 : many ? 2.6 : 4,
        { fill: color(point), stroke: best(point) ? "#000" : EDGE, "stroke-width": best(point) ? 1.6 : 0.6, opacity: best(point) || !many ? 1 : 0.5 });
    }
    return [];
  });
  return render;
}
