// The table: sorted by a click on a heading, filtered by words, a row opens its configuration and its command.

const ROWS = 200; // at once; the rest comes on demand, so that ten thousand rows do not stop the page

function columns() {
  const found = [
    { key: "eps", title: "epsilon", value: epsilonOf, show: (p) => (infinite(p) ? "none" : short(p.eps)) },
    { key: "acc", title: "accuracy", value: (p) => (p.acc ? p.acc[0] : null), show: (p) => accuracyText(p.acc) },
  ];
  found.push(...D.varied.filter((name) => !["privacy.epsilon", "privacy.noise_multiplier"].includes(name)).slice(0, 8)
    .map((name) => ({ key: name, title: D.short[name], text: true, value: (p) => p.set[name] ?? null, show: (p) => String(p.set[name] ?? "–") })));
  for (const key of ["money", "train_seconds", "bytes", "energy_kwh"]) {
    const cost = D.costs.find((one) => one.key === key);
    if (cost) found.push({ key, title: { money: "money", train_seconds: "training", bytes: "bytes", energy_kwh: "energy" }[key], value: (p) => (p.cost[key] ? p.cost[key][0] : null), show: (p) => (p.cost[key] ? costText(key, p.cost[key][0]) : "–") });
  }
  found.push({ key: "seeds", title: "seeds", value: (p) => p.runs.length, show: (p) => String(p.runs.length) });
  return found;
}

const words = (point) => {
  if (!point.words) point.words = `${point.label} ${point.id} ${D.varied.map((n) => `${D.short[n]}=${point.set[n]} ${point.set[n]}`).join(" ")} ${infinite(point) ? "no privacy none" : `epsilon=${short(point.eps)}`} ${point.trust} ${point.unit}`.toLowerCase();
  return point.words;
};

function tablePoints() {
  const asked = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  // 'epsilon=2' should not find epsilon=20: a word with '=' must end where the other one ends.
  const has = (text, word) => (word.includes("=") ? ` ${text} `.replaceAll(",", " ").includes(` ${word} `) : text.includes(word));
  return kept().filter((point) => (!state.onlyBest || point.best.includes("epsilon")) && asked.every((word) => has(words(point), word)));
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

function drawTable() {
  const list = columns(), { key, down } = state.sort, by = list.find((c) => c.key === key) || list.find((c) => c.key === "acc");
  const points = tablePoints().sort((a, b) => {
    const [x, y] = [by.value(a), by.value(b)];
    const unknown = (v) => v === null || v === undefined;
    if (unknown(x) || unknown(y)) return compare(x, y); // unknown last, whichever way
    return down ? compare(y, x) : compare(x, y);
  });
  const heads = list.map((column) => element("th", { scope: "col", class: column.text ? "text" : null, "aria-sort": column === by ? (down ? "descending" : "ascending") : "none" },
    element("button", { type: "button", "data-key": column.key, onclick: () => {
      state.sort = { key: column.key, down: state.sort.key === column.key ? !state.sort.down : column.key === "acc" };
      drawTable();
    } }, column.title)));
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col", class: "text" }, ""), ...heads));
  const body = element("tbody");
  for (const point of points.slice(0, state.rows)) body.append(...rowOf(point, list));
  $("table").replaceChildren(head, body);
  const all = inGroup().length;
  $("count").textContent = `${points.length.toLocaleString("en-US")} of ${all.toLocaleString("en-US")} configurations`;
  $("more").hidden = points.length <= state.rows;
}

function rowOf(point, list) {
  const open = state.open.has(point.id), best = point.best.includes("epsilon");
  const toggle = () => { if (state.open.has(point.id)) state.open.delete(point.id); else state.open.add(point.id); drawTable(); };
  const row = element("tr", { class: `row${point.id === group().chosen ? " chosen" : ""}`, id: `row-${point.id}`, onclick: (event) => { if (!event.target.closest("button")) toggle(); } },
    element("td", { class: "text" },
      element("button", { class: "open", type: "button", "aria-expanded": String(open), "aria-label": `${open ? "Close" : "Open"} ${point.label}`, onclick: toggle }, open ? "▾" : "▸"),
      element("span", { title: best ? "not dominated in accuracy and epsilon" : "dominated" }, best ? "●" : "○"),
      point.id === group().chosen ? element("span", { class: "word" }, " recommended") : null),
    ...list.map((column) => element("td", { class: column.text ? "text" : null }, column.show(point))));
  return open ? [row, element("tr", { class: "detail" }, element("td", { colspan: list.length + 1 }, ...detail(point)))] : [row];
}

function detail(point) {
  const copy = element("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(point.cmd); copy.textContent = "Copied"; } catch { copy.textContent = "Select and copy it"; }
  } }, "Copy");
  const sites = Object.entries(point.sites).map(([site, stat]) => `${site} ${accuracyText(stat)}`).join(", ");
  const full = { ...D.base, ...point.set };
  return [
    element("p", {}, element("b", {}, "Repeat it: "), copy), element("pre", {}, point.cmd),
    element("p", {}, element("b", {}, "Promise: "), promiseText(point), point.unit ? `, unit ${point.unit}.` : "."),
    sites ? element("p", {}, element("b", {}, "Sites: "), sites, ".") : null,
    element("p", {}, element("b", {}, "Runs: "), point.runs.map((run) => `seed ${run.seed}: ${run.acc === null ? "no accuracy" : percent(run.acc)} (${run.path})`).join("; ")),
    element("b", {}, "Full configuration"),
    element("ul", { class: "settings" }, ...Object.keys(full).sort().map((name) => element("li", { class: D.varied.includes(name) ? "varied" : null }, `${name}=${full[name] === null ? "null" : Array.isArray(full[name]) ? `[${full[name]}]` : full[name]}`))),
  ].filter(Boolean);
}

// From a mark in a chart to its row, whatever the table shows at the moment.
function openRow(id) {
  hideTip();
  state.open.add(id);
  if (!tablePoints().slice(0, state.rows).some((point) => point.id === id)) {
    Object.assign(state, { search: "", onlyBest: false, rows: Infinity });
    $("search").value = ""; $("only-best").checked = false;
  }
  drawTable();
  const row = $(`row-${id}`);
  if (row) { row.scrollIntoView({ block: "center" }); row.querySelector("button").focus({ preventScroll: true }); }
}
