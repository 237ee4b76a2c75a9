// The charts, by Observable Plot; brushes by D3. page.js holds what they show.

// The colours stand in report.css, once for a light and once for a dark page. Every colour has a shape of its own, so
// that colour is never the only sign.
const shades = (name, count) => d3.range(count).map((i) => `var(--${name}-${i})`);
const COLORS = shades("series", 7);
const SHAPES = ["circle", "square", "triangle", "diamond", "star", "wye", "cross"];
// From a small epsilon (strong: much privacy) to a large one; grey is none.
const BLUES = shades("ramp", 6);
const [GREY, SOFT, INK, PAPER, ASIDE, FAINT] = ["none", "edge", "ink", "paper", "aside", "faint"].map((name) => `var(--${name})`);
const MOST_MARKS = 400; // with more, only those that are not dominated can be pointed at
const GAP = 15; // pixels between the labels of lines

let paper = false; // drawn for the width of a sheet, whatever the window was: scaled down, words were too small

// Draws `marks(width, height)` into `host`, as wide as its place; `describe` is its text alternative.
function draw(host, height, options) {
  const width = paper ? (host.closest(".grid") ? 225 : 690) : Math.max(260, host.clientWidth || 640);
  const made = options(width, height);
  if (typeof made === "string") return host.replaceChildren(element("p", { class: "muted" }, made));
  const { legend, ...plot } = made;
  const drawn = Plot.plot({ width, height, marginTop: 34, marginBottom: 46, marginLeft: 40, marginRight: 12, ...plot });
  host.replaceChildren(drawn, ...(legend ? [legendOf(legend)] : []));
  return drawn;
}

const legendOf = (options) => Plot.legend(options);

// --- scales ---

const accuracy = (point) => 100 * point.acc[0];
const low = ([mean, error]) => 100 * (mean - (error || 0)), high = ([mean, error]) => 100 * (mean + (error || 0));

function padded([least, most], share = 0.08) {
  const pad = (most - least) * share || Math.abs(most) * 0.05 || 1;
  return [least - pad, most + pad];
}
function accuracyAxis(stats, label = "accuracy, percent") {
  const [least, most] = padded([d3.min(stats, low), d3.max(stats, high)]);
  return { domain: [Math.max(0, least), Math.min(100, most)], label, labelArrow: "none", grid: true, tickSize: 0, ticks: 6, zero: false };
}

// A logarithmic axis of epsilon with a place for infinity right of the largest; ticks where points are, for
// epsilons are chosen, not measured.
function epsilonAxis(points, width) {
  const finite = d3.sort(new Set(points.map(epsilonOf).filter((value) => Number.isFinite(value) && value > 0)));
  const [least, most] = finite.length ? [finite[0], finite.at(-1)] : [1, 1];
  const none = most * Math.max(2.2, (most / least) ** 0.22), some = points.some(infinite);
  const end = some ? none : most, pad = Math.max(1.3, (end / least) ** 0.07);
  const domain = [least / pad, end * pad], pixels = (a, b) => (Math.log(b / a) / Math.log(domain[1] / domain[0])) * (width - 60);
  const ticks = [];
  for (const value of finite) if (!ticks.length || pixels(ticks.at(-1), value) > 34) ticks.push(value);
  const text = (value) => (value !== none ? short(value) : width < 520 ? "none" : "no privacy");
  return {
    place: (point) => (infinite(point) ? none : Math.max(point.eps, least)),
    between: some && finite.length ? [Math.sqrt(most * none)] : [],
    domain, ticks: some ? [...ticks, none] : ticks, text,
  };
}

// An axis with all labels of its ticks: by itself a logarithmic one leaves some out.
const allTicks = (ticks, text, label) => Plot.axisX(ticks, { text, label, labelArrow: "none" });
const roundTicks = (domain) => d3.scaleLog(domain).ticks().filter((tick) => /^[125]e/.test(tick.toExponential()));

// Ticks of a linear axis as texts with one number of decimals: 0.90, 0.95, 1.00.
function evenTexts(ticks, digits = 3) {
  const texts = ticks.map((tick) => short(tick, digits)), decimals = d3.max(texts, (text) => (text.split(".")[1] ?? "").length);
  return texts.some((text) => /[e,]/.test(text)) ? texts : ticks.map((tick) => tick.toFixed(decimals));
}

// Colour by epsilon: one hue, a step for each epsilon or for each part of many.
function ramp(points) {
  const round = (point) => Number(point.eps.toPrecision(2));
  // Epsilons that are nearly equal have one colour; it is called by the largest of them, rounded as everywhere.
  const largest = d3.rollup(points.filter((p) => !infinite(p)), (some) => d3.max(some, (p) => p.eps), round);
  const levels = d3.sort(largest.keys());
  const step = (level) => BLUES[levels.length < 2 ? 1 : Math.round((levels.indexOf(level) / (levels.length - 1)) * (BLUES.length - 1))];
  const named = levels.length <= 6 ? levels : [levels[0], levels[levels.length >> 1], levels.at(-1)];
  const some = points.some(infinite);
  return {
    color: (point) => (infinite(point) ? GREY : step(round(point))),
    legend: { color: {
      type: "categorical", domain: [...named.map((level) => `epsilon ${short(largest.get(level))}`), ...(some ? ["no privacy"] : [])],
      range: [...named.map(step), ...(some ? [GREY] : [])],
    } },
  };
}

// Places of labels, moved apart by `gap` where they would touch; `domain` is that of the axis.
function spread(values, gap, [least, most]) {
  const order = d3.sort(d3.range(values.length), (i) => values[i]), places = [];
  let next = least;
  for (const i of order) { places[i] = Math.max(values[i], next); next = places[i] + gap; }
  next = most;
  for (const i of order.reverse()) { places[i] = Math.min(places[i], next); next = places[i] - gap; }
  return places;
}

// --- marks that can be pointed at ---

function showTip(anchor, point) {
  const tip = $("tip"), costs = ["money", "train_seconds"].filter((key) => point.cost[key]);
  const label = (key) => data.costs.find((cost) => cost.key === key).label;
  const seeds = point.acc[2] > 1 ? ` (${point.acc[2]} seeds)` : "";
  const lines = [`accuracy ${accuracyText(point.acc)}${seeds}`, ...(point.beside ? [besideText(point)] : []), guaranteeText(point), ...costs.map((key) => `${label(key)}: ${costText(key, point.cost[key][0])}`)];
  tip.replaceChildren(element("b", {}, point.label), ...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const box = anchor.getBoundingClientRect(), above = box.top - tip.offsetHeight - 10;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above > 4 ? above : box.bottom + 10) + scrollY}px`;
}
const hideTip = () => { $("tip").hidden = true; };
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

// Transparent dots over the visible ones: a target to point at, to tap, and to reach by the keyboard.
const targets = (points, place) => Plot.dot(points, {
  ...place, r: 12, fill: "transparent", stroke: null,
  ariaLabel: (point) => `${point.label}: accuracy ${accuracyText(point.acc)}, ${guaranteeText(point)}`,
  render(index, scales, values, dimensions, context, next) {
    const drawn = next(index, scales, values, dimensions, context);
    d3.select(drawn).selectChildren().each(function (i) {
      const point = points[i];
      d3.select(this).attr("class", "mark").attr("tabindex", 0).attr("role", "button").attr("data-id", point.id)
        .on("pointerenter focus", () => showTip(this, point)).on("pointerleave blur", hideTip)
        .on("click", (event) => { if (event.pointerType === "touch") showTip(this, point); else { hideTip(); openRow(point.id); } })
        .on("keydown", (event) => { if (event.key === "Enter") { hideTip(); openRow(point.id); } });
    });
    return drawn;
  },
});

// Thousands of dots that nobody points at, as one path for each colour: a line of single points with gaps.
const crowd = (points, { x, y }, color, size) => [...d3.group(points, color)].map(([stroke, some]) =>
  Plot.line(some.flatMap((point) => [point, null]), { x: (p) => (p ? x(p) : NaN), y: (p) => (p ? y(p) : NaN), stroke, strokeWidth: size, strokeOpacity: 0.4, strokeLinecap: "round" }));

// --- the frontier ---

// Non-dominated among what is shown: accuracy up, epsilon down. Ties do not dominate each other.
function frontOf(points) {
  let best = -Infinity, at = null;
  return d3.sort(points, epsilonOf, (point) => -point.acc[0]).filter((point) => {
    const kept = point.acc[0] > best || (point.acc[0] === best && epsilonOf(point) === at);
    if (kept) [best, at] = [point.acc[0], epsilonOf(point)];
    return kept;
  });
}

const drawFrontier = () => draw($("frontier"), innerWidth < 520 ? 340 : 430, (width) => {
  const points = shown().filter((point) => point.acc);
  if (!points.length) return "No configuration passes the filters.";
  const name = state.series, series = (point) => (name ? `${data.short[name]} ${settingText(point.set[name])}` : "");
  const domain = name ? d3.sort(new Set(inGroup().map(series)), (a, b) => a.localeCompare(b, "en", { numeric: true })) : [""];
  const color = (point) => COLORS[domain.indexOf(series(point)) % COLORS.length];
  const front = frontOf(points), best = new Set(front), chosen = byId.get(group().chosen), many = points.length > 150;
  const others = points.filter((point) => !best.has(point)), quiet = points.length > MOST_MARKS ? others.filter((p) => p !== chosen) : [];
  const loud = points.filter((point) => best.has(point) || point === chosen || !quiet.length);
  const { place, between, domain: range, ticks, text } = epsilonAxis(points, width);
  const shift = (point) => (domain.indexOf(series(point)) - (domain.length - 1) / 2) * Math.min(0.012, 0.05 / domain.length);
  const at = { x: (point) => place(point) * (range[1] / range[0]) ** shift(point), y: accuracy };
  const step = { ...at, curve: "step-after", stroke: SOFT, strokeWidth: 1.4 };
  const bars = loud.filter((point) => point.acc[1] && (best.has(point) || !many));
  const opacity = many ? 0.35 : 1, right = chosen && Math.log(place(chosen) / range[0]) > 0.7 * Math.log(range[1] / range[0]);
  return {
    ariaLabel: "Accuracy against epsilon", ariaDescription: group().advice,
    x: { type: "log", domain: range }, y: accuracyAxis(points.map((point) => point.acc), "accuracy on the test split, percent"),
    color: { domain, range: COLORS }, symbol: { domain, range: SHAPES },
    legend: name && { symbol: { domain, range: SHAPES }, color: { domain, range: COLORS }, fill: "color", stroke: "color" },
    marks: [
      allTicks(ticks, text, "epsilon (smaller is more private)"),
      Plot.ruleX(between, { stroke: SOFT, strokeOpacity: 0.6, strokeDasharray: "2 5" }),
      Plot.line(front.filter((point) => !infinite(point)), step),
      Plot.line(front.some(infinite) ? [...front.filter((point) => !infinite(point)).slice(-1), ...front.filter(infinite)] : [], { ...step, strokeDasharray: "3 4" }),
      ...crowd(quiet, at, color, 5),
      Plot.ruleX(bars, { x: at.x, y1: (p) => low(p.acc), y2: (p) => high(p.acc), stroke: color, strokeWidth: 1.3, strokeOpacity: 0.7 }),
      Plot.dot(loud.filter((point) => !best.has(point)), { ...at, symbol: series, stroke: color, fill: PAPER, r: many ? 3.5 : 5, opacity }),
      Plot.dot(front, { ...at, symbol: series, fill: color, stroke: INK, strokeWidth: 1.2, r: 6.5 }),
      ...(chosen && points.includes(chosen) ? [
        Plot.dot([chosen], { ...at, r: 12, stroke: INK, strokeWidth: 1.5 }),
        Plot.text([chosen], { ...at, text: () => "recommended", dx: right ? -16 : 16, dy: -14, textAnchor: right ? "end" : "start", fontWeight: 600, fill: INK, stroke: PAPER, strokeWidth: 4 }),
      ] : []),
      targets(loud, at),
    ],
  };
});

// --- accuracy against each cost ---

function drawCosts() {
  const points = inGroup(), { color, legend } = ramp(points), { equal } = group();
  const differ = data.costs.filter(({ key }) => !equal.includes(key) && !group().noise.includes(key) && points.some((p) => p.acc && p.cost[key]));
  const same = data.costs.filter(({ key }) => equal.includes(key)).map(({ key, label }) => (
    `${label} (${costText(key, points.find((p) => p.cost[key]).cost[key][0])})`));
  const noise = group().noise.map((key) => data.costs.find((cost) => cost.key === key).label);
  $("costs-equal").textContent = [
    same.length ? `The same for all, within a percent: ${same.join(", ")}.` : "",
    noise.length ? `No more apart between configurations than between runs of one and by their order: ${noise.join(", ")}.` : "",
  ].join(" ").trim();
  if (!differ.length) $("costs").replaceChildren(element("p", { class: "muted" }, "The choice among these configurations changes no cost."));
  else $("costs").replaceChildren(...differ.map(({ key, label }) => element("div", {},
    element("h3", {}, label[0].toUpperCase() + label.slice(1)), element("figure", { class: "chart", "data-cost": key }))));
  $("costs-legend").replaceChildren(...(differ.length ? [legendOf(legend)] : []));
  for (const { key, label } of differ) drawCost($("costs").querySelector(`[data-cost="${key}"]`), key, label, color);
}

const drawCost = (host, key, label, color) => draw(host, 236, (width) => {
  const points = shown().filter((point) => point.acc && point.cost[key]);
  if (!points.length) return "Nothing passes the filters.";
  const [least, most] = d3.extent(points, (point) => point.cost[key][0]), [size, unit] = unitOf(key, most);
  const wide = least > 0 && most / least > 12, domain = wide ? [0.85 * least / size, 1.15 * most / size] : padded([least / size, most / size]);
  const ticks = wide ? roundTicks(domain).filter((_, i, all) => i % Math.ceil(all.length / 5) === 0) : d3.ticks(...domain, Math.max(2, width / 100));
  const texts = new Map(d3.zip(ticks, wide ? ticks.map((tick) => short(tick)) : evenTexts(ticks)));
  const best = points.filter((point) => point.best.includes(key)), many = points.length > 150;
  const others = points.filter((point) => !point.best.includes(key)), quiet = points.length > MOST_MARKS;
  const at = { x: (point) => point.cost[key][0] / size, y: accuracy }, symbol = (point) => (infinite(point) ? "square" : "circle");
  return {
    ariaLabel: `Accuracy against ${label}`, marginLeft: 34, marginBottom: 42,
    x: { type: wide ? "log" : "linear", domain },
    y: { ...accuracyAxis(points.map((point) => point.acc)), ticks: 4 }, symbol: { type: "identity" },
    marks: [
      allTicks(ticks, (v) => texts.get(v), unit || label),
      ...(quiet ? crowd(others, at, color, 5) : [Plot.dot(others, { ...at, symbol, fill: color, stroke: GREY, strokeWidth: 0.6, r: many ? 2.6 : 4, opacity: many ? 0.5 : 1 })]),
      Plot.dot(best, { ...at, symbol, fill: color, stroke: INK, strokeWidth: 1.6, r: 5.5 }),
      targets(quiet ? best : [...others, ...best], at),
    ],
  };
});

// --- parallel coordinates: a line for each configuration, an axis for each setting or result ---

function parallelAxes() {
  const points = inGroup(), found = [];
  const add = (key, title, value) => {
    const values = points.map(value).filter((v) => v !== null && v !== undefined);
    if (new Set(values.map(String)).size < 2) return;
    const finite = d3.sort(new Set(values.filter(Number.isFinite)));
    if (!values.every((v) => typeof v === "number")) {
      const names = d3.sort(new Set(values.map(String)));
      found.push({ key, title, value, place: d3.scalePoint(names, [0.04, 0.96]), ticks: names.length <= 12 ? names : [names[0], names.at(-1)], text: String });
      return;
    }
    const over = values.some((v) => v === Infinity), wide = finite[0] > 0 && finite.at(-1) / finite[0] > 15;
    const scale = (wide ? d3.scaleLog : d3.scaleLinear)([finite[0], finite.at(-1)], [0.02, over ? 0.88 : 0.98]);
    const place = (v) => (v === Infinity ? 0.98 : scale(v));
    const all = finite.length <= 7 ? finite : wide ? roundTicks(scale.domain()) : scale.ticks(5);
    const ticks = all.filter((tick, i) => i === 0 || Math.abs(place(tick) - place(all[i - 1])) > 0.04);
    const digits = [3, 4, 5, 6].find((n) => new Set(ticks.map((tick) => short(tick, n))).size === ticks.length);
    const texts = new Map(d3.zip(ticks, key === "acc" || (all !== finite && !wide) ? evenTexts(ticks, digits) : ticks.map((tick) => short(tick, digits))));
    found.push({ key, title, value, place, ticks: over ? [...ticks, Infinity] : ticks, text: (v) => (v === Infinity ? "none" : texts.get(v)) });
  };
  const settings = data.varied.filter((name) => ![...NOT_SERIES, "privacy.max_grad_norm"].includes(name));
  for (const name of settings) add(name, data.short[name], (point) => (typeof point.set[name] === "number" ? point.set[name] : settingText(point.set[name])));
  found.splice(7);
  add("eps", "epsilon", epsilonOf);
  for (const [key, title] of Object.entries(COST_COLUMNS)) {
    const most = d3.max(points, (point) => point.cost[key]?.[0]);
    if (most === undefined || group().equal.includes(key) || group().noise.includes(key)) continue;
    const [size, unit] = unitOf(key, most);
    add(key, title + (unit ? `, ${unit}` : ""), (point) => (point.cost[key] ? point.cost[key][0] / size : null));
  }
  add("acc", "accuracy, %", (point) => (point.acc ? accuracy(point) : null));
  return found;
}

const passes = (point) => [...state.filters].every(([key, [from, to]]) => {
  const axis = state.axes.find((one) => one.key === key), value = axis?.value(point);
  return !axis || (value !== null && value !== undefined && axis.place(value) >= from && axis.place(value) <= to);
});

function drawParallel() {
  const axes = state.axes = parallelAxes(), host = $("parallel"), points = inGroup(), { color } = ramp(points);
  const drawn = draw(host, 340, (width) => {
    if (axes.length < 2) return "Nothing varies, so there is nothing to filter by.";
    const rows = (list) => list.flatMap((point) => [
      ...axes.map((axis, i) => ({ point, x: i, y: axis.value(point) })).filter(({ y }) => y !== null && y !== undefined).map((row) => ({ ...row, y: axes[row.x].place(row.y) })),
      { point, x: NaN, y: NaN },
    ]);
    const [left, kept] = [points.filter((point) => !passes(point)), points.filter(passes)], chosen = byId.get(group().chosen);
    const line = { x: "x", y: "y", strokeOpacity: points.length > 300 ? 0.25 : points.length > 60 ? 0.5 : 0.85 };
    const ticks = axes.flatMap((axis, i) => axis.ticks.map((tick) => ({ x: i, y: axis.place(tick), text: axis.text(tick) })));
    const titles = axes.map(({ title }, x) => ({ title, x }));
    const halo = { fill: "currentColor", stroke: PAPER, strokeWidth: 6 };
    return {
      ariaLabel: "Settings and results of all configurations", width: Math.max(width, axes.length * 92), marginTop: 40, marginBottom: 14, marginLeft: 34, marginRight: 54,
      x: { domain: [0, axes.length - 1], axis: null }, y: { domain: [0, 1], axis: null },
      marks: [
        Plot.line(rows(left), { ...line, stroke: FAINT, strokeWidth: 1 }), // one path: nobody tells these apart
        ...(kept.length > MOST_MARKS
          ? [...d3.group(kept, color)].map(([stroke, some]) => Plot.line(rows(some), { ...line, stroke }))
          : [Plot.line(rows(kept), { ...line, z: (row) => row.point.id, stroke: (row) => color(row.point) })]),
        Plot.line(kept.includes(chosen) ? rows([chosen]) : [], { x: "x", y: "y", stroke: color(chosen ?? points[0]), strokeWidth: 3 }),
        Plot.ruleX(d3.range(axes.length), { stroke: SOFT }),
        ...[["start", -30, 0, 1], ["middle", 0, 1, -1], ["end", 50, -1]].map(([textAnchor, dx, ...range]) =>
          Plot.text(titles.slice(...range), { x: "x", frameAnchor: "top", text: "title", dx, dy: -24, textAnchor, fontWeight: 600, ...halo, fill: INK })),
        Plot.text(ticks, { x: "x", y: "y", text: "text", dx: 7, textAnchor: "start", ...halo }),
      ],
    };
  });
  if (!drawn) return;
  drawn.style.maxWidth = "none"; // on a narrow page the axes need room for their labels, and their place scrolls
  const { x, y } = { x: drawn.scale("x").apply, y: drawn.scale("y").apply };
  const brush = d3.brushY().on("end", function (event, axis) {
    if (!event.sourceEvent) return;
    if (event.selection) state.filters.set(axis.key, event.selection.map(drawn.scale("y").invert).reverse());
    else state.filters.delete(axis.key);
    filtersChanged();
  });
  d3.select(drawn).append("g").selectAll("g").data(axes).join("g").attr("data-axis", (axis) => axis.key).each(function (axis, i) {
    brush.extent([[x(i) - 14, y(1) - 4], [x(i) + 14, y(0) + 4]]);
    d3.select(this).call(brush);
    const kept = state.filters.get(axis.key);
    if (kept) d3.select(this).call(brush.move, [y(kept[1]), y(kept[0])]);
  });
}

// --- along a line: sites over epsilon, learning curves, adoption ---

// The points that differ from the recommended one in epsilon alone; no filter leaves one of them out.
const familyPoints = () => group().family.map((id) => byId.get(id)).filter((point) => point?.acc);
const endLabels = (labels, x) => [
  Plot.dot(labels, { x, y: "place", dx: 14, r: 4.5, fill: "color", symbol: "symbol" }),
  Plot.text(labels, { x, y: "place", dx: 24, text: "text", textAnchor: "start", fontWeight: 600, fill: INK }),
];

const drawSites = () => draw($("sites"), innerWidth < 520 ? 320 : 360, (width, height) => {
  const points = familyPoints(), sites = group().sites;
  if (!sites.length) return "";
  const rows = points.flatMap((point, i) => sites.filter((site) => point.sites[site]).map((site) => ({ i, site, point, stat: point.sites[site] })));
  const named = group().sites_named, rank = (site) => named.indexOf(site), color = (row) => COLORS[rank(row.site)] ?? ASIDE;
  const y = accuracyAxis(rows.map((row) => row.stat), "accuracy on a site's own test texts, percent");
  const last = named.map((site) => rows.findLast((row) => row.site === site));
  const places = spread(last.map((row) => 100 * row.stat[0]), ((y.domain[1] - y.domain[0]) * GAP) / (height - 80), y.domain);
  const labels = last.map((row, k) => ({ ...row, place: places[k], color: COLORS[k], symbol: SHAPES[k], text: `${row.site} ${(100 * row.stat[0]).toFixed(1)}` }));
  const some = rows.filter((row) => rank(row.site) >= 0), at = { x: "i", y: (row) => 100 * row.stat[0] };
  return {
    ariaLabel: "Accuracy of each site against epsilon", ariaDescription: group().sites_text, marginRight: Math.min(160, width * 0.32),
    x: { type: "point", domain: d3.range(points.length), tickFormat: (i) => (width < 520 && infinite(points[i]) ? "none" : epsilonText(points[i])), label: "epsilon", labelAnchor: "right", labelArrow: "none" },
    y, symbol: { type: "identity" }, color: { type: "identity" },
    marks: [
      Plot.line(rows, { ...at, z: "site", stroke: color, strokeWidth: (row) => (rank(row.site) < 0 ? 1 : 2) }),
      Plot.ruleX(some, { x: "i", y1: (row) => low(row.stat), y2: (row) => high(row.stat), stroke: color, strokeOpacity: 0.8 }),
      Plot.dot(some, { ...at, symbol: (row) => SHAPES[rank(row.site)], fill: color, r: 4.5, title: (row) => `${row.site}, ${guaranteeText(row.point)}: ${accuracyText(row.stat)}` }),
      ...endLabels(labels, "i"),
    ],
  };
});

const drawCurves = () => draw($("curves"), innerWidth < 520 ? 320 : 360, (width, height) => {
  const family = familyPoints(), { color } = ramp(inGroup());
  const points = family.length <= 8 ? family : family.filter((_, i) => i % Math.ceil(family.length / 8) === 0 || i === family.length - 1);
  const rows = points.flatMap((point) => point.runs.filter((run) => run.curve.length > 1).flatMap((run) =>
    run.curve.map(([round, value]) => ({ point, run, round, value: 100 * value }))));
  $("curves-text").textContent = rows.length
    ? "The recommended configuration at each epsilon that was run: the mean over seeds, each seed as a thin line."
    : "These runs were evaluated once, so there is no curve to draw.";
  if (!rows.length) return "";
  const domain = padded(d3.extent(rows, (row) => row.value), 0.05), at = { x: "round", y: "value", stroke: (row) => color(row.point) };
  const means = d3.flatRollup(rows, (some) => d3.mean(some, (row) => row.value), (row) => row.point, (row) => row.round)
    .map(([point, round, value]) => ({ point, round, value }));
  const last = points.map((point) => d3.greatest(means.filter((row) => row.point === point), (row) => row.round)).filter(Boolean);
  const places = spread(last.map((row) => row.value), ((domain[1] - domain[0]) * GAP) / (height - 80), domain);
  const end = d3.max(rows, (row) => row.round);
  const labels = last.map((row, k) => ({ place: places[k], color: color(row.point), symbol: infinite(row.point) ? "square" : "circle",
    text: infinite(row.point) ? "no privacy" : `ε ${short(row.point.eps)}` }));
  const mean = { ...at, z: (row) => row.point.id, strokeWidth: 2.4 };
  return {
    ariaLabel: "Accuracy after each round", marginRight: 108,
    x: { label: "round", labelArrow: "none", ticks: Math.min(10, width / 80), tickFormat: (v) => (Number.isInteger(v) ? String(v) : "") },
    y: { domain, label: "accuracy on the test split, percent", labelArrow: "none", grid: true, tickSize: 0, ticks: 6 },
    symbol: { type: "identity" }, color: { type: "identity" },
    marks: [
      Plot.line(rows.filter((row) => row.point.runs.length > 1), { ...at, z: (row) => `${row.point.id} ${row.run.path}`, strokeWidth: 0.8, strokeOpacity: 0.4 }),
      Plot.line(means.filter((row) => !infinite(row.point)), mean),
      Plot.line(means.filter((row) => infinite(row.point)), { ...mean, strokeDasharray: "6 4" }),
      ...endLabels(labels, () => end),
    ],
  };
});

const drawAdoption = () => draw($("adoption"), 300, (width, height) => {
  if (!state.wanted) return "";
  const counts = adoptionCounts(state.wanted), top = Math.max(1, counts.good), end = data.cuts.at(-1);
  const name = "all prices fall", rows = counts.price.map((count, i) => ({ name, cut: data.cuts[i], count }));
  const places = spread([counts.good, counts.price.at(-1)], (top * 16) / (height - 80), [0, top]);
  const labels = [{ text: name, place: places[1], color: COLORS[0], symbol: SHAPES[0] }];
  return {
    ariaLabel: "Configurations under the budget as it gets cheaper", ariaDescription: $("adoption-text").textContent, marginRight: Math.min(180, width * 0.42),
    x: { domain: [-0.02, end + 0.02], ticks: data.cuts.filter((cut) => width > 520 || cut === 0 || cut >= 0.3), tickFormat: (v) => (v === 0 ? "today" : `−${Math.round(100 * v)} %`), label: "prices", labelArrow: "none" },
    y: { domain: [0, top], ticks: Math.min(top, 5), tickFormat: (v) => (Number.isInteger(v) ? String(v) : ""), label: "configurations under the budget", labelArrow: "none", grid: true, tickSize: 0 },
    symbol: { type: "identity" }, color: { type: "identity" },
    marks: [
      Plot.ruleY([counts.good], { stroke: SOFT, strokeDasharray: "3 4" }),
      Plot.line(rows, { x: "cut", y: "count", stroke: COLORS[0], strokeWidth: 2.4 }),
      Plot.dot(rows, { x: "cut", y: "count", symbol: SHAPES[0], fill: COLORS[0], r: 4.5, title: (row) => `${row.name}, ${Math.round(100 * row.cut)} percent: ${row.count}` }),
      Plot.text([places[0]], { x: end, y: (v) => v, dx: 24, text: () => "good enough", textAnchor: "start" }),
      ...endLabels(labels, () => end),
    ],
  };
});

// Of every measured model and every fall of prices, how many tasks are affordable.
const drawServing = () => draw($("serving"), 80 + 34 * (data.serving.variants ?? []).length, (width) => {
  const { variants, tasks, text } = data.serving;
  if (!variants) return "";
  const about = (one) => `${one.accuracy === null ? "–" : percent(one.accuracy)}, ${one.price}`;
  const rows = variants.flatMap((one) => one.affordable.map((count, i) => ({ name: one.name, cut: data.cuts[i], count })));
  const at = { x: "cut", y: "name" };
  return {
    ariaLabel: "Tasks that each measured model makes affordable as prices fall", ariaDescription: text,
    marginLeft: Math.min(230, width * 0.34), marginRight: Math.min(150, width * 0.26),
    x: { type: "band", domain: data.cuts, tickFormat: (v) => (v === 0 ? "today" : `−${Math.round(100 * v)} %`), label: "machines and energy cost", labelArrow: "none", tickSize: 0 },
    y: { type: "band", domain: variants.map((one) => one.name), label: null, tickSize: 0 },
    opacity: { type: "linear", domain: [0, Math.max(tasks, 1)], range: [0.06, 0.9] },
    marks: [
      Plot.cell(rows, { ...at, fill: COLORS[0], fillOpacity: "count", inset: 1.5, title: (row) => `${row.name}: ${row.count} of ${tasks} tasks` }),
      Plot.text(rows, { ...at, text: (row) => String(row.count), fontWeight: 600, fill: INK, stroke: PAPER, strokeWidth: 4 }),
      Plot.text(variants, { y: "name", text: about, frameAnchor: "right", dx: 8, textAnchor: "start" }),
    ],
  };
});

function drawAll(onPaper) {
  paper = onPaper;
  drawFrontier(); drawCosts(); drawSites(); drawCurves(); drawAdoption(); drawServing();
  if (!onPaper) drawParallel(); // it is not printed
}
