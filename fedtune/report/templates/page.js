// What the page shows at the moment: the numbers, what is selected, texts, and the table. charts.js draws.

const data = JSON.parse(document.getElementById("numbers").textContent);
const $ = (id) => document.getElementById(id);
const byId = new Map(data.points.map((point) => [point.id, point]));
const ROWS = 200; // rows of the table at once; the rest on demand, so that ten thousand do not stop the page
const NOT_SERIES = ["privacy.epsilon", "privacy.noise_multiplier"];
const COST_COLUMNS = { money: "money", train_seconds: "training", bytes: "bytes", energy_kwh: "energy" };

const state = {
  group: 0, series: null, filters: new Map(), axes: [], search: "", onlyBest: false,
  sort: { key: "acc", down: true }, rows: ROWS, open: new Set(), wanted: null,
};
const group = () => data.groups[state.group];
const inGroup = () => data.points.filter((point) => point.group === state.group);
const shown = () => inGroup().filter(passes);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const fill = (list, texts) => list.replaceChildren(...texts.map((text) => element("li", {}, text)));

// --- numbers as text ---

const infinite = (point) => point.eps === null;
const epsilonOf = (point) => point.eps ?? Infinity;

function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === Infinity) return "∞";
  if (Math.abs(value) >= 1000) return d3.format(",.0f")(value);
  if (value !== 0 && Math.abs(value) < 1e-6) return d3.format(".1e")(value);
  return String(Number(value.toPrecision(digits)));
}
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const accuracyText = (stat) => (stat === null ? "–"
  : `${(100 * stat[0]).toFixed(1)}${stat[1] === null ? "" : ` ± ${(100 * stat[1]).toFixed(1)}`} %`);
const epsilonText = (point) => (infinite(point) ? "no privacy" : short(point.eps));
const guaranteeText = (point) => (infinite(point) ? "no privacy: epsilon is infinite"
  : `epsilon ${short(point.eps)} at delta ${point.delta.toExponential(1)}, ${point.adjacency}, trust ${point.trust}`);

// One unit for a whole axis, so that its labels can be compared.
function unitOf(key, most) {
  const { unit } = data.costs.find((cost) => cost.key === key);
  if (unit === "s") return most >= 7200 ? [3600, "h"] : most >= 180 ? [60, "min"] : [1, "s"];
  if (unit === "kWh") return most < 0.1 ? [1e-3, "Wh"] : [1, "kWh"];
  if (unit !== "B" && unit !== "FLOP") return [1, unit];
  const [size, prefix] = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => most >= size) || [1, ""];
  return [size, prefix + unit];
}
// As format_money of fedtune.report.words: two digits below one, two decimals above.
function moneyText(value) {
  if (value === 0 || Math.abs(value) >= 1) return value === 0 ? "0" : d3.format(",.2f")(value);
  return Math.abs(value) < 1e-6 ? d3.format(".1e")(value) : d3.format(".15~f")(Number(value.toPrecision(2)));
}
function costText(key, value) {
  if (key === "money") return `${moneyText(value)} ${data.currency || ""}`.trim();
  const [size, unit] = unitOf(key, Math.abs(value));
  return `${short(value / size)} ${unit}`.trim();
}
// Seed by seed, for two runs of one seed share their luck: bars of single configurations say less.
function besideText({ beside }) {
  const [mean, error, seeds] = beside, points = (share) => (100 * share).toFixed(1);
  const over = seeds ? `over ${seeds} common seed${seeds === 1 ? "" : "s"}` : "no seed is common to both";
  return `${points(Math.abs(mean))}${error === null ? "" : ` ± ${points(error)}`} points ${mean < 0 ? "below" : "above"} the recommended one (${over})`;
}
const settingText = (value) => (Array.isArray(value) ? value.join("+") : String(value ?? "default"));

// --- the table ---

function columns() {
  const settings = data.varied.filter((name) => !NOT_SERIES.includes(name)).slice(0, 8);
  return [
    { key: "eps", title: "epsilon", value: epsilonOf, text: (p) => (infinite(p) ? "none" : short(p.eps)) },
    { key: "acc", title: "accuracy", value: (p) => p.acc?.[0], text: (p) => accuracyText(p.acc) },
    ...settings.map((name) => ({
      key: name, title: data.short[name], left: true, value: (p) => p.set[name], text: (p) => String(p.set[name] ?? "–"),
    })),
    ...Object.entries(COST_COLUMNS).filter(([key]) => data.costs.some((cost) => cost.key === key)).map(([key, title]) => ({
      key, title, value: (p) => p.cost[key]?.[0], text: (p) => (p.cost[key] ? costText(key, p.cost[key][0]) : "–"),
    })),
    { key: "seeds", title: "seeds", value: (p) => p.runs.length, text: (p) => String(p.runs.length) },
  ];
}

function searchable(point) {
  point.words ??= [
    point.label, point.id, point.trust, point.unit, infinite(point) ? "no privacy none" : `epsilon=${short(point.eps)}`,
    ...data.varied.map((name) => `${data.short[name]}=${point.set[name]} ${point.set[name]}`),
  ].join(" ").toLowerCase().replaceAll(",", " ");
  return point.words;
}

function tablePoints() {
  const asked = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  // 'epsilon=2' does not find epsilon=20: a word with '=' is compared whole.
  const has = (text, word) => (word.includes("=") ? ` ${text} `.includes(` ${word} `) : text.includes(word));
  return shown().filter((point) => (!state.onlyBest || point.best.includes("epsilon")) && asked.every((word) => has(searchable(point), word)));
}

function sorted(points, { value }) {
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const [known, unknown] = [points.filter((p) => value(p) != null), points.filter((p) => value(p) == null)];
  known.sort((a, b) => (state.sort.down ? order(value(b), value(a)) : order(value(a), value(b))));
  return [...known, ...unknown];
}

function drawTable() {
  const list = columns(), by = list.find((column) => column.key === state.sort.key) || list[1];
  const points = sorted(tablePoints(), by);
  const sortBy = ({ key }) => {
    state.sort = { key, down: state.sort.key === key ? !state.sort.down : key === "acc" };
    drawTable();
    $("table").querySelector(`[data-key="${key}"]`).focus();
  };
  const heads = list.map((column) => element("th", { scope: "col", class: column.left && "text", "aria-sort": column !== by ? "none" : state.sort.down ? "descending" : "ascending" },
    element("button", { type: "button", "data-key": column.key, onclick: () => sortBy(column) }, column.title)));
  $("table").replaceChildren(
    element("thead", {}, element("tr", {}, element("th", { scope: "col", class: "text" }), ...heads)),
    element("tbody", {}, ...points.slice(0, state.rows).flatMap((point) => rowsOf(point, list))));
  $("count").textContent = `${points.length.toLocaleString("en-US")} of ${inGroup().length.toLocaleString("en-US")} configurations`;
  $("more").hidden = points.length <= state.rows;
}

function rowsOf(point, list) {
  const open = state.open.has(point.id), best = point.best.includes("epsilon"), recommended = point.id === group().chosen;
  const toggle = () => {
    if (!state.open.delete(point.id)) state.open.add(point.id);
    drawTable();
    $(`row-${point.id}`).querySelector("button").focus({ preventScroll: true });
  };
  const row = element("tr", { class: `row${recommended ? " chosen" : ""}`, id: `row-${point.id}`, onclick: (event) => event.target.closest("button") || toggle() },
    element("td", { class: "text" },
      element("button", { class: "open", type: "button", "aria-expanded": String(open), "aria-label": `${open ? "Close" : "Open"} ${point.label}`, onclick: toggle }, open ? "▾" : "▸"),
      element("span", { title: best ? "not dominated in accuracy and epsilon" : "dominated" }, best ? "●" : "○"),
      recommended ? element("span", { class: "word" }, " recommended") : null),
    ...list.map((column) => element("td", { class: column.left && "text" }, column.text(point))));
  return open ? [row, element("tr", { class: "detail" }, element("td", { colspan: list.length + 1 }, ...detail(point)))] : [row];
}

function detail(point) {
  const copy = element("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(point.cmd); copy.textContent = "Copied"; } catch { copy.textContent = "Select and copy it"; }
  } }, "Copy");
  const part = (site) => (point.absent[site] ? ` (took no part in ${point.absent[site]} of ${point.runs.length} runs)` : "");
  const sites = Object.entries(point.sites).map(([site, stat]) => `${site} ${accuracyText(stat)}${part(site)}`).join(", ");
  const own = Object.entries(point.own).map(([site, stat]) => `${site} ${accuracyText(stat)}`).join(", ");
  const runs = point.runs.map((run) => `seed ${run.seed}: ${run.acc === null ? "no accuracy" : percent(run.acc)} (${run.path})`).join("; ");
  const fact = (name, ...rest) => element("p", {}, element("b", {}, `${name}: `), ...rest);
  const settings = Object.entries({ ...data.base, ...point.set }).sort(([a], [b]) => d3.ascending(a, b));
  const value = (v) => (Array.isArray(v) ? `[${v}]` : String(v));
  return [
    fact("Repeat it", copy), element("pre", {}, point.cmd),
    point.beside ? fact("Accuracy", besideText(point), ".") : null,
    fact("Guarantee", guaranteeText(point), point.unit ? `, unit ${point.unit}.` : "."),
    sites ? fact("Sites", sites, ".") : null, own ? fact("Sites with their own part", own, ".") : null, fact("Runs", runs), element("b", {}, "Full configuration"),
    element("ul", { class: "settings" }, ...settings.map(([name, v]) => element("li", { class: data.varied.includes(name) && "varied" }, `${name}=${value(v)}`))),
  ].filter(Boolean);
}

// From a mark in a chart to its row, whatever the table shows at the moment.
function openRow(id) {
  state.open.add(id);
  if (!tablePoints().slice(0, state.rows).some((point) => point.id === id)) {
    Object.assign(state, { search: "", onlyBest: false, rows: Infinity });
    $("search").value = ""; $("only-best").checked = false;
  }
  drawTable();
  $(`row-${id}`)?.scrollIntoView({ block: "center" });
  $(`row-${id}`)?.querySelector("button").focus({ preventScroll: true });
}

// --- adoption: the same counts as fedtune.report.constraints.count_adoption ---

function adoptionCounts({ accuracy, epsilon, money }) {
  const after = (parts, cut) => (1 - cut) * d3.sum(parts);
  // A number that was read off the page, with its three digits, includes the point that it is of.
  const good = inGroup().filter((p) => p.acc && p.money?.every((part) => part !== null) && p.acc[0] >= accuracy && epsilonOf(p) <= epsilon * 1.005);
  const under = (amounts) => amounts.filter((amount) => amount <= money * (1 + 1e-5)).length; // parts have six digits
  return {
    good: good.length,
    price: data.cuts.map((cut) => under(good.map((p) => after(p.money, cut)))),
  };
}

function readWanted() {
  const read = (id, otherwise) => ($(id).value.trim() === "" || !Number.isFinite(Number($(id).value)) ? otherwise : Number($(id).value));
  state.wanted = { accuracy: read("want-accuracy", 0) / 100, epsilon: read("want-epsilon", Infinity), money: read("want-money", Infinity) };
  const counts = adoptionCounts(state.wanted), last = data.cuts.length - 1, { accuracy, epsilon, money } = state.wanted;
  const cut = `${Math.round(100 * data.cuts[last])} percent`;
  $("adoption-text").textContent = `${counts.good} of ${inGroup().filter((p) => p.money).length} priced configurations reach ${percent(accuracy)} `
    + `${epsilon === Infinity ? "at any epsilon" : `at epsilon ${short(epsilon)} or less`}; `
    + `${counts.price[0]} of them cost no more than ${costText("money", money)} a run today. If all prices fall by ${cut}, ${counts.price[last]} do.`;
  drawAdoption();
}

// --- what is shown ---

function filtersChanged() {
  $("filtered").textContent = state.filters.size ? `${shown().length} of ${inGroup().length} configurations pass the filters.` : "";
  $("reset").hidden = !state.filters.size;
  drawParallel(); drawFrontier(); drawCosts(); drawTable();
}

function showGroup() {
  const points = inGroup(), now = group(), { tuning, adoption } = now;
  const count = (n, noun) => `${n.toLocaleString("en-US")} ${noun}${n === 1 ? "" : "s"}`;
  const seeds = new Set(points.flatMap((point) => point.runs.map((run) => run.seed))).size;
  $("title").textContent = `Privacy, accuracy and cost on ${now.name}`;
  $("subtitle").textContent = `${count(d3.sum(points, (p) => p.runs.length), "run")} of ${count(points.length, "configuration")}, ${count(seeds, "seed")}; prices: ${data.book}`;
  $("advice-text").textContent = now.advice;
  $("promise").textContent = now.promise;
  fill($("caveats"), now.caveats);
  fill($("notes"), data.notes);
  $("notes-box").hidden = !data.notes.length;
  $("notes-head").textContent = `${count(data.notes.length, "note")} on these runs`;
  $("sites-text").textContent = now.sites_text;
  $("tuning-text").textContent = tuning?.text ?? "No run here has privacy, so there is none to spend.";
  $("tuning").replaceChildren(...(tuning?.cards ?? []).map((card) => element("div", { class: card.main ? "card main" : "card" },
    element("div", { class: "name" }, card.name), element("div", { class: "number" }, card.epsilon === null ? "–" : `ε ${card.epsilon}`),
    card.tag ? element("span", { class: "tag" }, card.tag) : null, element("p", {}, card.text))));
  // To colour by: what differs between configurations with privacy; that others have none is shown by their place.
  const values = (of, name) => new Set(of.map((p) => JSON.stringify(p.set[name]))).size, some = points.filter((p) => !infinite(p));
  const options = data.varied.filter((name) => !NOT_SERIES.includes(name) && values(some.length ? some : points, name) > 1 && values(points, name) <= COLORS.length);
  state.series = options.includes(now.series) ? now.series : options[0] || null;
  $("series").replaceChildren(...options.map((name) => element("option", { value: name, selected: name === state.series }, data.short[name])));
  $("series").closest("label").hidden = options.length < 2;
  state.filters.clear();
  filtersChanged();
  drawSites(); drawCurves(); drawServing();
  $("adoption-section").hidden = !adoption;
  if (adoption) {
    $("want-accuracy").value = Number((100 * adoption.accuracy).toFixed(2));
    $("want-epsilon").value = adoption.epsilon === null ? "" : short(adoption.epsilon);
    $("want-money").value = adoption.money;
    $("want-currency").textContent = data.currency || "";
    readWanted();
  }
}

function start() {
  $("serving-text").textContent = data.serving.text;
  $("group").append(...data.groups.map((one, i) => element("option", { value: i }, one.name)));
  $("groups").hidden = data.groups.length < 2;
  $("group").addEventListener("change", (event) => { state.group = Number(event.target.value); state.open.clear(); showGroup(); });
  $("series").addEventListener("change", (event) => { state.series = event.target.value; drawFrontier(); });
  $("reset").addEventListener("click", () => { state.filters.clear(); filtersChanged(); });
  $("search").addEventListener("input", (event) => { state.search = event.target.value; state.rows = ROWS; drawTable(); });
  $("only-best").addEventListener("change", (event) => { state.onlyBest = event.target.checked; drawTable(); });
  $("more").addEventListener("click", () => { state.rows += 5 * ROWS; drawTable(); });
  for (const id of ["want-accuracy", "want-epsilon", "want-money"]) $(id).addEventListener("input", readWanted);
  $("made").textContent = `Made by fedtune ${data.version} on ${data.made} with: ${data.command}`;
  addEventListener("beforeprint", () => { $("notes-box").open = true; drawAll(true); });
  addEventListener("afterprint", () => drawAll(false));
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width && width) requestAnimationFrame(() => drawAll(false));
    width = contentRect.width;
  }).observe(document.querySelector("main"));
  showGroup();
}
