// What is chosen at the moment, and who draws again when it changes.

const state = { group: 0, series: null, brushes: new Map(), axes: [], search: "", onlyBest: false, sort: { key: "acc", down: true }, rows: ROWS, open: new Set(), wanted: null };
const group = () => D.groups[state.group];
const inGroup = () => D.points.filter((point) => point.group === state.group);
const kept = () => inGroup().filter(passes);

function filtersChanged() {
  const all = inGroup().length, left = kept().length;
  $("filtered").textContent = state.brushes.size ? `${left} of ${all} configurations pass the filters.` : "";
  $("reset").hidden = state.brushes.size === 0;
  drawParallel(); drawFrontier(); costCharts.forEach((draw) => draw()); drawTable();
}

function fill(list, texts) { list.replaceChildren(...texts.map((text) => element("li", {}, text))); }

function show() {
  const points = inGroup(), runs = points.reduce((sum, point) => sum + point.runs.length, 0);
  const seeds = new Set(points.flatMap((point) => point.runs.map((run) => run.seed))).size;
  const count = (n, noun) => `${n.toLocaleString("en-US")} ${noun}${n === 1 ? "" : "s"}`;
  $("title").textContent = `Privacy, accuracy and cost on ${group().name}`;
  $("subtitle").textContent = `${count(runs, "run")} of ${count(points.length, "configuration")}, ${count(seeds, "seed")}; prices: ${D.book}`;
  $("advice-text").textContent = group().advice;
  $("promise").textContent = group().promise;
  fill($("doubts"), group().caveats);
  fill($("notes"), D.notes);
  $("notes-box").hidden = !D.notes.length;
  $("notes-head").textContent = `${count(D.notes.length, "note")} on these runs`;
  state.brushes.clear();
  // What differs between those with privacy: that others have none is seen by their place.
  const values = (of, name) => new Set(of.map((p) => JSON.stringify(p.set[name]))).size, some = points.filter((p) => !infinite(p));
  const options = D.varied.filter((name) => !["privacy.epsilon", "privacy.noise_multiplier"].includes(name)
    && values(some.length ? some : points, name) > 1 && values(points, name) <= COLORS.length);
  state.series = options.includes(group().series) ? group().series : options[0] || null;
  $("series").replaceChildren(...options.map((name) => element("option", { value: name, selected: name === state.series }, D.short[name])));
  $("series").closest("label").hidden = options.length < 2;
  buildCosts(); buildTuning(); buildAdoption();
  filtersChanged();
  drawSites(); drawCurves(); drawAdoption();
}

$("group").append(...D.groups.map((one, i) => element("option", { value: i }, one.name)));
$("groups").hidden = D.groups.length < 2;
$("group").addEventListener("change", (event) => { state.group = Number(event.target.value); state.open.clear(); charts.splice(base); show(); });
$("series").addEventListener("change", (event) => { state.series = event.target.value; drawFrontier(); });
$("reset").addEventListener("click", () => { state.brushes.clear(); filtersChanged(); });
$("search").addEventListener("input", (event) => { state.search = event.target.value; state.rows = ROWS; drawTable(); });
$("only-best").addEventListener("change", (event) => { state.onlyBest = event.target.checked; drawTable(); });
$("more").addEventListener("click", () => { state.rows += 5 * ROWS; drawTable(); });
for (const id of ["want-accuracy", "want-epsilon", "want-money"]) $(id).addEventListener("input", readWanted);

// Charts are drawn to the width they have. Brushes are kept as places on an axis whose height does not change.
const base = charts.length;
let width = 0, pending = 0;
new ResizeObserver(() => {
  const now = document.querySelector("main").clientWidth;
  if (now === width) return;
  width = now;
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => charts.forEach((draw) => draw()));
}).observe(document.querySelector("main"));

function printing(now) {
  paper = now;
  charts.forEach((draw) => { if (draw !== drawParallel) draw(); }); // it is not printed, and its filters are places on it
}
addEventListener("beforeprint", () => { $("notes-box").open = true; printing(true); });
addEventListener("afterprint", () => printing(false));

$("made").textContent = `Made by fedtune ${D.version} on ${D.made} with: ${D.command}`;
width = document.querySelector("main").clientWidth;
show();
