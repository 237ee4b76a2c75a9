// Parallel coordinates: one line a configuration, one axis a setting or result; dragging on an axis filters.

function parallelAxes() {
  const points = inGroup(), found = [];
  const add = (key, title, value) => {
    const values = points.map(value), known = values.filter((v) => v !== null && v !== undefined);
    if (new Set(known.map(String)).size < 2) return;
    const numeric = known.every((v) => typeof v === "number");
    found.push({ key, title, value, numeric, values: known });
  };
  for (const name of D.varied) {
    if (["privacy.epsilon", "privacy.noise_multiplier", "privacy.max_grad_norm"].includes(name)) continue;
    add(name, D.short[name], (point) => { const v = point.set[name]; return Array.isArray(v) ? v.join("+") : typeof v === "boolean" || v === null || v === undefined ? String(v ?? "default") : v; });
  }
  const settings = found.splice(0).slice(0, 7);
  add("eps", "epsilon", (point) => epsilonOf(point));
  for (const key of ["money", "train_seconds", "bytes", "energy_kwh"]) {
    const cost = D.costs.find((one) => one.key === key);
    const values = points.filter((p) => p.cost[key]).map((p) => p.cost[key][0]);
    if (cost && values.length) {
      const [size, unit] = scaleOf(key, Math.max(...values));
      add(key, { money: "money", train_seconds: "training", bytes: "bytes", energy_kwh: "energy" }[key] + (unit ? `, ${unit}` : ""),
        (point) => (point.cost[key] ? point.cost[key][0] / size : null));
    }
  }
  add("acc", "accuracy, %", (point) => (point.acc ? 100 * point.acc[0] : null));
  return [...settings, ...found];
}

function axisScale(axis, low, high) {
  if (!axis.numeric) {
    const names = [...new Set(axis.values)].sort();
    const place = (v) => (names.length < 2 ? (low + high) / 2 : low - 8 - (names.indexOf(v) / (names.length - 1)) * (low - high - 16));
    return { place, ticks: names.length <= 12 ? names : [names[0], names[names.length - 1]], say: String };
  }
  const finite = axis.values.filter(Number.isFinite), least = Math.min(...finite), most = Math.max(...finite);
  const over = axis.values.some((v) => v === Infinity), top = over ? high + 26 : high + 4;
  const wide = least > 0 && most / least > 15;
  const scale = wide ? logarithmic([least, most], [low - 4, top]) : linear([least, most], [low - 4, top]);
  const all = [...new Set(finite)].sort((a, b) => a - b);
  let ticks = all.length <= 7 ? all : wide ? scale.ticks() : scale.ticks(5);
  ticks = ticks.filter((t, i) => i === 0 || Math.abs(scale(t) - scale(ticks[i - 1])) > 11);
  return { place: (v) => (v === Infinity ? high + 4 : scale(v)), ticks: over ? [...ticks, Infinity] : ticks, say: apart(ticks) };
}

const passes = (point) => state.brushes.size === 0 || [...state.brushes].every(([key, [from, to]]) => {
  const axis = state.axes.find((one) => one.key === key);
  if (!axis) return true;
  const value = axis.value(point);
  return value !== null && value !== undefined && axis.place(value) >= from && axis.place(value) <= to;
});

const drawParallel = chart($("parallel"), (width) => (width < 520 ? 380 : 340), (root, width, height) => {
  const list = state.axes = parallelAxes();
  if (list.length < 2) return [element("p", { class: "muted" }, "Nothing varies, so there is nothing to filter by.")];
  // On a narrow page the axes need room for their labels: the drawing gets wider, and its place scrolls.
  const inner = Math.max(width, list.length * 92);
  if (inner > width) {
    root.setAttribute("viewBox", `0 0 ${inner} ${height}`);
    root.style.width = `${inner}px`;
    $("parallel").style.overflowX = "auto";
  }
  const low = height - 14, high = 44, side = 34;
  list.forEach((axis, i) => {
    axis.x = side + (i / (list.length - 1)) * (inner - 2 * side - 20);
    Object.assign(axis, axisScale(axis, low, high));
  });
  const points = inGroup(), { color } = ramp(points), lines = element("g", {});
  const some = state.brushes.size > 0, opacity = points.length > 300 ? 0.25 : points.length > 60 ? 0.5 : 0.85;
  const line = (point) => list.map((axis) => [axis, axis.value(point)]).filter(([, v]) => v !== null && v !== undefined).map(([axis, v], i) => `${i ? "L" : "M"}${axis.x},${axis.place(v).toFixed(1)}`).join("");
  const style = (point) => {
    if (!passes(point)) return { stroke: "#dfe3e8", "stroke-width": 1, opacity: some ? 0.35 : opacity };
    const main = point.id === group().chosen;
    return { stroke: color(point), "stroke-width": main ? 3 : 1.4, opacity: main ? 1 : opacity };
  };
  const items = [...points].sort((a, b) => passes(a) - passes(b)).map((point) => ({ d: line(point), fill: "none", ...style(point) }));
  // One path for all that look alike draws their crossings once: with few lines each is drawn by itself.
  if (items.length > MOST_MARKS) cloud(lines, items); else items.forEach((item) => lines.append(element("path", item)));
  root.append(lines);
  list.forEach((axis, i) => {
    root.append(element("line", { class: "axis", x1: axis.x, x2: axis.x, y1: high, y2: low }));
    root.append(element("text", { class: "strong halo", x: axis.x, y: i % 2 && list.length > 8 ? 14 : 28, "text-anchor": i === 0 ? "start" : i === list.length - 1 ? "end" : "middle", dx: i === 0 ? -side + 4 : i === list.length - 1 ? side + 20 : 0 }, axis.title));
    for (const tick of axis.ticks) root.append(element("text", { class: "halo", x: axis.x + 7, y: axis.place(tick) + 4, "pointer-events": "none" }, tick === Infinity ? "none" : axis.say(tick)));
    brush(root, axis, low, high);
  });
  return [];
});

function brush(root, axis, low, high) {
  const chosen = state.brushes.get(axis.key);
  const box = element("rect", { x: axis.x - 9, width: 18, y: chosen ? chosen[0] : high, height: chosen ? chosen[1] - chosen[0] : 0, fill: "#0072b2", "fill-opacity": 0.25, stroke: "#0072b2", visibility: chosen ? "visible" : "hidden" });
  const area = element("rect", { class: "brush", "data-axis": axis.key, x: axis.x - 16, width: 32, y: high - 8, height: low - high + 16, fill: "transparent", style: "cursor: ns-resize; touch-action: none" });
  let start = null;
  // The drawing may be scaled, so a place on the screen is not a place in it.
  const place = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(root.getScreenCTM().inverse()).y;
    return Math.min(Math.max(at, high - 6), low + 6);
  };
  area.addEventListener("pointerdown", (event) => { start = place(event); area.setPointerCapture(event.pointerId); event.preventDefault(); });
  area.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const end = place(event), from = Math.min(start, end);
    box.setAttribute("visibility", "visible"); box.setAttribute("y", from); box.setAttribute("height", Math.abs(end - start));
  });
  area.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const end = place(event), moved = Math.abs(end - start) > 4;
    if (moved) state.brushes.set(axis.key, [Math.min(start, end), Math.max(start, end)]);
    else state.brushes.delete(axis.key);
    start = null;
    filtersChanged();
  });
  root.append(box, area);
}
