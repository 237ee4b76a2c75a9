// Charts in which something moves along a line: sites over epsilon, learning curves, adoption. And the three epsilons.

// The points that differ from the recommended one in epsilon alone; without a filter none of them is left out.
const familyPoints = () => group().family.map((id) => byId.get(id)).filter((point) => point && point.acc);

const drawSites = chart($("sites"), (width) => (width < 520 ? 320 : 360), (root, width, height) => {
  const points = familyPoints();
  const sites = [...new Set(points.flatMap((point) => Object.keys(point.sites)))].sort();
  if (!sites.length) { $("sites-text").textContent = "These runs measured no accuracy by site."; return []; }
  const box = { left: 44, right: width - Math.min(160, width * 0.32), top: 30, bottom: height - 48 };
  const x = (i) => (points.length < 2 ? (box.left + box.right) / 2 : box.left + 24 + (i / (points.length - 1)) * (box.right - box.left - 40));
  const y = linear(accuracyDomain(points.flatMap((point) => sites.map((site) => point.sites[site]).filter(Boolean))), [box.bottom, box.top]);
  axes(root, box, { place: x, ticks: points.map((_, i) => i), text: (i) => epsilonText(points[i]) },
    { place: y, ticks: y.ticks(6), text: (v) => short(v) }, { x: "epsilon", y: "accuracy on a site's own test texts, percent" });
  const last = (site) => [...points].reverse().find((point) => point.sites[site]).sites[site][0];
  const first = (site) => points.find((point) => point.sites[site]).sites[site][0];
  const shown = sites.length <= COLORS.length ? sites : [...sites].sort((a, b) => first(a) - first(b)).slice(0, COLORS.length - 1);
  const labels = spread(shown.map((site) => y(100 * last(site))), 15, box.top, box.bottom);
  for (const site of sites) {
    const i = shown.indexOf(site), color = i < 0 ? "#c4cad1" : COLORS[i];
    const known = points.map((point, k) => [k, point.sites[site]]).filter(([, stat]) => stat);
    root.append(element("polyline", { points: known.map(([k, [mean]]) => `${x(k)},${y(100 * mean)}`).join(" "), fill: "none", stroke: color, "stroke-width": i < 0 ? 1 : 2 }));
    if (i < 0) continue;
    for (const [k, [mean, error]] of known) {
      if (error) bar(root, x(k), y(100 * (mean - error)), y(100 * (mean + error)), color, 0.8);
      root.append(element("g", {}, shape(SHAPES[i], x(k), y(100 * mean), 4.5, { fill: color }),
        element("title", {}, `${site}, ${promiseText(points[k])}: ${accuracyText([mean, error])}`)));
    }
    lineName(root, box.right + 12, labels[i], SHAPES[i], color, `${site} ${(100 * last(site)).toFixed(1)}`);
  }
  $("sites-text").textContent = sitesText(points, sites, shown);
  return [];
});

function sitesText(points, sites, shown) {
  const low = points[0], high = points[points.length - 1];
  let text = "The recommended configuration at each epsilon that was run. ";
  if (points.length > 1) {
    const falls = sites.filter((s) => low.sites[s] && high.sites[s]).map((s) => [high.sites[s][0] - low.sites[s][0], s]).sort((a, b) => b[0] - a[0]);
    if (falls.length) {
      const [most, worst] = falls[0], [least, best] = falls[falls.length - 1];
      text += `From ${epsilonText(high) === "no privacy" ? "no privacy" : `epsilon ${epsilonText(high)}`} down to epsilon ${epsilonText(low)}, ${worst} `
        + (most > 0 ? `loses ${(100 * most).toFixed(1)} points` : "loses nothing")
        + (falls.length > 1 ? `, ${best} ${least > 0 ? (100 * least).toFixed(1) : "none"}. ` : ". ");
    }
  }
  if (shown.length < sites.length) text += `Named are the ${shown.length} sites with the lowest accuracy at the smallest epsilon, of ${sites.length}.`;
  return text;
}

const drawCurves = chart($("curves"), (width) => (width < 520 ? 320 : 360), (root, width, height) => {
  const family = familyPoints();
  const points = family.length <= 8 ? family : family.filter((_, i) => i % Math.ceil(family.length / 8) === 0 || i === family.length - 1);
  const runs = points.flatMap((point) => point.runs).filter((run) => run.curve.length > 1);
  if (!runs.length) { $("curves-text").textContent = "These runs were evaluated once, so there is no curve to draw."; return []; }
  $("curves-text").textContent = "The recommended configuration at each epsilon that was run: the mean over seeds, each seed as a thin line.";
  const box = { left: 44, right: width - 108, top: 30, bottom: height - 48 };
  const rounds = runs.flatMap((run) => run.curve.map(([round]) => round));
  const x = linear([Math.min(...rounds), Math.max(...rounds)], [box.left + 8, box.right]);
  const y = linear(padded(runs.flatMap((run) => run.curve.map(([, value]) => 100 * value)), 0.05), [box.bottom, box.top]);
  axes(root, box, { place: x, ticks: x.ticks(Math.min(10, width / 80)).filter(Number.isInteger), text: (v) => short(v) },
    { place: y, ticks: y.ticks(6), text: (v) => short(v) }, { x: "round", y: "accuracy on the test split, percent" });
  const { color } = ramp(inGroup()), path = (curve) => curve.map(([round, value]) => `${x(round)},${y(100 * value)}`).join(" ");
  const means = points.map((point) => {
    const at = new Map();
    for (const run of point.runs) for (const [round, value] of run.curve) at.set(round, [...(at.get(round) || []), value]);
    return [...at].sort((a, b) => a[0] - b[0]).map(([round, values]) => [round, values.reduce((a, b) => a + b) / values.length]);
  });
  const ends = spread(means.map((curve) => (curve.length ? y(100 * curve[curve.length - 1][1]) : box.bottom)), 15, box.top, box.bottom);
  points.forEach((point, i) => {
    if (!means[i].length) return;
    if (point.runs.length > 1) for (const run of point.runs) root.append(element("polyline", { points: path(run.curve), fill: "none", stroke: color(point), "stroke-width": 0.8, opacity: 0.4 }));
    root.append(element("polyline", { points: path(means[i]), fill: "none", stroke: color(point), "stroke-width": 2.4, "stroke-dasharray": infinite(point) ? "6 4" : null }));
    const end = y(100 * means[i][means[i].length - 1][1]);
    root.append(element("path", { d: `M${box.right + 2},${end}L${box.right + 16},${ends[i]}h4`, fill: "none", stroke: color(point), "stroke-width": 1.2 }));
    root.append(element("text", { class: "strong", x: box.right + 24, y: ends[i] + 4 }, infinite(point) ? "no privacy" : `ε ${short(point.eps)}`));
  });
  return [];
});

// --- adoption: the same count as fedtune.report.constraints makes ---

function good(wanted) {
  return inGroup().filter((point) => point.acc && point.money && point.money.every((part) => part !== null)
    && point.acc[0] >= wanted.accuracy && epsilonOf(point) <= wanted.epsilon);
}
function adoptionCounts(wanted) {
  const after = ([compute, energy, network, data], price, work) => (1 - price) * ((1 - work) * (compute + energy) + network + data);
  const members = good(wanted), limit = wanted.money * (1 + 1e-5); // parts come with six digits
  return {
    good: members.length,
    price: D.cuts.map((cut) => members.filter((point) => after(point.money, cut, 0) <= limit).length),
    compute: D.cuts.map((cut) => members.filter((point) => after(point.money, 0, cut) <= limit).length),
  };
}

const drawAdoption = chart($("adoption"), 300, (root, width, height) => {
  const wanted = state.wanted;
  if (!wanted) return [];
  const counts = adoptionCounts(wanted), total = inGroup().filter((point) => point.money).length;
  $("adoption-text").textContent = `${counts.good} of ${total} priced configurations reach ${percent(wanted.accuracy)} `
    + `${wanted.epsilon === Infinity ? "at any epsilon" : `at epsilon ${short(wanted.epsilon)} or less`}; `
    + `${counts.price[0]} of them cost no more than ${short(wanted.money)} ${D.currency || ""} a run today. If all prices fall by 70 percent, ${counts.price[4]} do; `
    + `if compression cuts the computation by 70 percent at the same accuracy, ${counts.compute[4]} do.`;
  const box = { left: 44, right: width - Math.min(180, width * 0.42), top: 30, bottom: height - 48 };
  const x = linear([0, 0.7], [box.left + 10, box.right - 10]);
  const top = Math.max(1, counts.good), y = linear([0, top], [box.bottom, box.top]);
  axes(root, box, { place: x, ticks: D.cuts, text: (v) => (v === 0 ? "today" : `−${Math.round(100 * v)} %`) },
    { place: y, ticks: y.ticks(Math.min(top, 5)).filter(Number.isInteger), text: String }, { x: "prices, or computation", y: "configurations under the budget" });
  root.append(element("line", { x1: box.left, x2: box.right, y1: y(counts.good), y2: y(counts.good), stroke: "#8c959f", "stroke-dasharray": "3 4" }));
  const lines = [["all prices fall", counts.price, 0], ["computation is cut", counts.compute, 1]];
  const labels = spread([y(counts.good), ...lines.map(([, values]) => y(values[4]))], 16, box.top, box.bottom);
  root.append(element("text", { x: box.right + 22, y: labels[0] + 4 }, "good enough"));
  lines.forEach(([name, values, i]) => {
    const shift = i === 1 ? 3 : 0; // so that equal lines are both seen
    root.append(element("polyline", { points: values.map((v, k) => `${x(D.cuts[k])},${y(v) + shift}`).join(" "), fill: "none", stroke: COLORS[i], "stroke-width": 2.4, "stroke-dasharray": i ? "7 3" : null }));
    values.forEach((v, k) => root.append(element("g", {}, shape(SHAPES[i], x(D.cuts[k]), y(v) + shift, 4.5, { fill: COLORS[i] }), element("title", {}, `${name}, ${Math.round(100 * D.cuts[k])} percent: ${v}`))));
    lineName(root, box.right + 12, labels[i + 1], SHAPES[i], COLORS[i], name);
  });
  return [];
});

function buildAdoption() {
  const start = group().adoption;
  $("adoption-section").hidden = !start;
  state.wanted = start && { accuracy: start.accuracy, epsilon: start.epsilon ?? Infinity, money: start.money };
  if (!start) return;
  $("want-accuracy").value = Number((100 * start.accuracy).toFixed(2));
  $("want-epsilon").value = start.epsilon === null ? "" : short(start.epsilon, 4);
  if (start.epsilon !== null) state.wanted.epsilon = Number($("want-epsilon").value) * 1.0005;
  $("want-money").value = start.money;
  $("want-currency").textContent = D.currency || "";
}
function readWanted() {
  const number = (id, otherwise) => ($(id).value.trim() === "" || !Number.isFinite(Number($(id).value)) ? otherwise : Number($(id).value));
  // Epsilon is shown with four digits: what is typed off the page should include the point it was read from.
  state.wanted = { accuracy: number("want-accuracy", 0) / 100, epsilon: number("want-epsilon", Infinity) * 1.0005, money: number("want-money", Infinity) };
  drawAdoption();
}

// --- the three epsilons ---

function buildTuning() {
  const tuning = group().tuning, host = $("tuning");
  host.replaceChildren();
  if (!tuning) {
    $("tuning-text").textContent = "No run here has privacy, so there is none to spend.";
    return;
  }
  const card = (name, value, tag, text, main) => host.append(element("div", { class: main ? "card main" : "card" },
    element("div", { class: "name" }, name), element("div", { class: "number" }, value), tag ? element("span", { class: "tag" }, tag) : null, element("p", {}, text)));
  const many = tuning.runs > 1, bound = tuning.best_of !== null;
  const gains = bound && tuning.composed !== null && tuning.best_of < tuning.composed;
  card("The chosen run alone", `ε ${short(tuning.alone)}`, many ? "not the whole truth" : null,
    many ? `What the record of seed ${tuning.seed} says. True only if it had not been chosen by looking at the others.` : "There was nothing to choose from, so this is the whole truth as far as these records go.", !many);
  card("All private runs, composed", `ε ${short(tuning.composed ?? Infinity)}`, null,
    `What ${tuning.runs} ${tuning.runs === 1 ? "run has" : "runs have"} spent together. Holds for publishing everything on this page.`, many && !gains);
  card("The best of a random number of trials", bound ? `ε ${short(tuning.best_of)}` : "–", null,
    bound ? `Papernot and Steinke 2022, ${tuning.trials}. Holds if the best run is published and nothing else: neither this page nor the number of trials.${gains ? "" : " With so few trials composing all of them is the smaller bound."}`
      : tuning.search ? "Not available: it is for trials that do not depend on one another, and a search chose these."
      : "Not available: it needs a sweep whose number of trials was drawn at random beforehand (sweep.private_selection=true) and the best run of it.", gains);
  let text = `At delta ${tuning.delta.toExponential(1)}, unit ${tuning.unit}, ${tuning.adjacency}. Runs outside of this report are not counted here; the ledgers of the nodes count them (fedtune budget show).`;
  if (tuning.search) text += ` ${tuning.search}`;
  if (tuning.without_privacy) text += ` ${tuning.without_privacy} runs on the same data had no privacy: if it was private data, nothing is promised for it any more.`;
  if (tuning.public) text = `The owner declared this data public: tuning on it was free, and the numbers say what it would have cost. ${text}`;
  $("tuning-text").textContent = text;
}
