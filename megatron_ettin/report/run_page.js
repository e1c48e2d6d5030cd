"use strict";
// Draws the curves of a report from the numbers in the page: no library, no network. One range of x for all charts.
(() => {
  const $ = (id) => document.getElementById(id);
  const read = () => JSON.parse($("data").textContent);
  const AXIS = { tokens: "tokens", steps: "steps", hours: "hours in steps" };
  const LEAST_TO_SMOOTH = 60, MOST_DOTS = 40;
  const EDGE = { left: 64, right: 14, top: 22, bottom: 38 };
  let data = read();
  const view = { axis: data.axes[0], low: null, high: null, cursor: null, smooth: 20 }; // low null: everything
  const logs = {}; // chart -> whether its y is logarithmic, where the reader chose
  let charts = [];

  // ---- numbers -------------------------------------------------------------------------------------------------
  const TYPES = { grid: Float64Array, indices: Uint32Array, y: Float32Array, low: Float32Array, high: Float32Array };
  const unpacked = new WeakMap();
  function numbers(holder, key, type) { // base64 -> typed array, once
    if (holder[key] === undefined) return null;
    if (!unpacked.has(holder)) unpacked.set(holder, {});
    const known = unpacked.get(holder);
    if (!known[key]) {
      const raw = atob(holder[key]), bytes = new Uint8Array(raw.length);
      for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
      known[key] = new type(bytes.buffer);
    }
    return known[key];
  }
  const runs = () => data.models.flatMap((model) => model.runs).filter((run) => run.n);
  const whole = () => {
    const spans = runs().map((run) => run.span[view.axis]);
    const high = Math.max(...spans.map((span) => span[1]));
    const low = Math.min(0, ...spans.map((span) => span[0]));
    return [low, high > low ? high : low + 1];
  };
  const range = () => (view.low === null ? whole() : [view.low, view.high]);

  function firstAt(x, count, value) { // the first of `count` points whose x is not below `value`
    let low = 0, high = count;
    while (low < high) { const mid = (low + high) >> 1; if (x(mid) < value) low = mid + 1; else high = mid; }
    return low;
  }
  function points(run, series, low, high, most) { // [x, lowest, median, highest] in the range, some `most` or 600 of them
    const grid = numbers(run.grid, view.axis, TYPES.grid), indices = numbers(series, "indices", TYPES.indices);
    const x = indices ? (i) => grid[indices[i]] : (i) => grid[i];
    const first = Math.max(0, firstAt(x, series.n, low) - 1), end = Math.min(series.n, firstAt(x, series.n, high) + 2);
    const over = series.overview, found = [];
    if (over && end - first > series.n / 2) {
      for (let i = Math.floor(first / over.each); i * over.each < end; i++) {
        const last = Math.min(series.n, (i + 1) * over.each) - 1;
        if (over.y[i] !== null) found.push([(x(i * over.each) + x(last)) / 2, over.low[i], over.y[i], over.high[i]]);
        else found.push(null);
      }
      return found;
    }
    const y = numbers(series, "y", TYPES.y);
    const lows = numbers(series, "low", TYPES.low) || y, highs = numbers(series, "high", TYPES.high) || y;
    const each = end - first > 2 * most ? Math.ceil((end - first) / most) : 1;
    for (let i = first; i < end; i += each) {
      const last = Math.min(end, i + each), middle = y.slice(i, last).filter((value) => value === value).sort();
      if (!middle.length) { found.push(null); continue; }
      let lowest = Infinity, highest = -Infinity;
      for (let j = i; j < last; j++) { if (lows[j] < lowest) lowest = lows[j]; if (highs[j] > highest) highest = highs[j]; }
      found.push([(x(i) + x(last - 1)) / 2, lowest, middle[middle.length >> 1], highest]);
    }
    return found;
  }

  // ---- text ----------------------------------------------------------------------------------------------------
  function short(value, digits = 4) {
    if (value === null || value !== value) return "";
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
      if (size >= unit * 0.9999995) return +(value / unit).toPrecision(digits) + letter;
    return size && size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(digits));
  }
  function ticks(low, high, most) {
    const span = high - low;
    if (!(span > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(span / most));
    const step = power * [1, 2, 5, 10].find((factor) => span / (power * factor) <= most);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }
  function labelled(values) { // with so many digits that no two read the same
    for (let digits = 4; ; digits++) {
      const texts = values.map((value) => short(value, digits));
      if (digits > 11 || new Set(texts).size === texts.length) return values.map((value, i) => [value, texts[i]]);
    }
  }
  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) && found.length < 40; power++)
      for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
    const inside = found.filter((value) => value >= low && value <= high);
    const powers = inside.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9);
    return powers.length > 3 ? powers : inside.length > 1 ? inside : ticks(low, high, 5);
  }
  function make(name, attributes = {}, text) {
    const svg = ["svg", "path", "line", "text", "rect", "g", "title", "clipPath"].includes(name);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // ---- a chart -------------------------------------------------------------------------------------------------
  function curvesOf(spec) { // colour: the model's in every chart; the key's where one model has a chart of several
    const found = [];
    data.models.forEach((model, m) => spec.keys.forEach((key, k) => {
      if (!model.runs.some((run) => run.series[key])) return;
      const named = ["sources", "parts", "accuracy"].includes(spec.id), byKey = data.models.length === 1 && spec.id !== "loss";
      const part = key.replace(/^(validation_)?(loss|accuracy)\/?_?/, "") || "validation";
      const label = spec.keys.length === 1 && !named ? "" : spec.id === "loss" ? (key === "loss" ? "training" : "validation") : part;
      const name = data.models.length > 1 ? [model.name, label].filter(Boolean).join(", ") : label || model.name;
      const under = spec.id === "lr" && m === 0 && data.models.length > 1; // the others lie on it
      found.push({ name, key, model, colour: byKey ? k % 6 : model.colour, dash: byKey ? 0 : k % 3, under });
    }));
    return found;
  }
  function build() {
    charts = data.charts.map(newChart);
    $("charts").replaceChildren(...charts.map((chart) => chart.figure));
  }
  function newChart(spec, number) {
    const figure = make("figure", { class: number ? "" : "wide", id: "chart-" + spec.id });
    const caption = make("figcaption"), log = make("button", { type: "button" }, "log");
    caption.append(make("span", {}, spec.title + (spec.unit ? ` (${spec.unit})` : "")), log);
    const plot = make("div", { class: "plot", tabindex: 0, role: "group", "aria-roledescription": "chart", "aria-describedby": "keys" });
    const legend = make("div", { class: "legend" }), curves = curvesOf(spec);
    const entries = curves.map((curve) => {
      const entry = make("span"), key = make("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" });
      key.append(make("path", { class: `line s${curve.colour} dash${curve.dash}`, d: "M0 4H24" }));
      entry.append(key, curve.name + " ", make("b"));
      return entry;
    });
    const chart = { spec, figure, plot, log, curves, entries };
    log.setAttribute("aria-label", "logarithmic scale: " + spec.title);
    log.addEventListener("click", () => { logs[spec.id] = !chart.logarithmic; draw(chart); });
    legend.append(...entries);
    figure.append(caption, plot, legend);
    listen(chart);
    return chart;
  }

  function scale(chart, drawn) { // y of the plot from what is seen
    const seen = drawn.flatMap((curve) => curve.parts.flat().filter(Boolean));
    const middles = seen.map((point) => point[2]).sort((a, b) => a - b);
    let low = Infinity, high = -Infinity;
    for (const point of seen) { low = Math.min(low, point[1]); high = Math.max(high, point[3]); }
    if (!(low <= high)) return null;
    const wild = low > 0 && !chart.spec.clip && high > 50 * middles[middles.length >> 1];
    chart.logarithmic = low > 0 && (logs[chart.spec.id] ?? wild);
    if (chart.logarithmic) return [low / 1.05, high * 1.05];
    if (chart.spec.clip) { // a few high values would flatten the rest: they get a mark at the top instead
      const tops = seen.map((point) => point[3]).sort((a, b) => a - b), common = tops[Math.floor((tops.length - 1) * 0.95)];
      if (common > 0 && high > 2 * common) high = common * 1.25;
    }
    if (chart.spec.zero) low = Math.min(0, low);
    const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 && low <= 2 * room ? 0 : low - room, high + room];
  }
  function draw(chart) {
    const { spec, plot } = chart, [low, high] = range();
    const width = Math.max(280, plot.clientWidth || 480), height = spec.id === "loss" ? 360 : 240;
    const right = width - EDGE.right, floor = height - EDGE.bottom;
    const drawn = chart.curves.map((curve) => ({ ...curve, parts: curve.model.runs.filter((run) => run.series[curve.key] && run.n)
      .map((run) => points(run, run.series[curve.key], low, high, width / 3).map((p) => p && [p[0], ...p.slice(1).map((v) => v * spec.factor)])) }));
    const y = scale(chart, drawn) || [0, 1], flat = chart.logarithmic ? Math.log10 : Number;
    const px = (value) => EDGE.left + ((value - low) / (high - low)) * (right - EDGE.left);
    const py = (value) => floor - ((flat(value) - flat(y[0])) / (flat(y[1]) - flat(y[0]))) * (floor - EDGE.top);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    const clip = make("clipPath", { id: "clip-" + spec.id });
    clip.append(make("rect", { x: EDGE.left, y: 0, width: right - EDGE.left, height: floor }));
    const inside = make("g", { "clip-path": `url(#clip-${spec.id})` });
    svg.append(clip, inside);
    phases(inside, px, floor);
    for (const [value, label] of labelled(chart.logarithmic ? logTicks(...y) : ticks(...y, 5))) {
      svg.append(make("line", { class: "grid", x1: EDGE.left, x2: right, y1: py(value), y2: py(value) }),
        make("text", { x: EDGE.left - 8, y: py(value) + 4, "text-anchor": "end" }, label));
    }
    for (const [value, label] of labelled(ticks(low, high, width / 110)))
      svg.append(make("text", { class: "xtick", x: px(value), y: floor + 18, "text-anchor": "middle" }, label));
    svg.append(make("line", { class: "axis", x1: EDGE.left, x2: right, y1: floor, y2: floor }),
      make("text", { x: right, y: floor + 34, "text-anchor": "end" }, AXIS[view.axis]));
    const curves = make("g", { "clip-path": `url(#clip-${spec.id})` });
    for (const curve of drawn) curve.parts = curve.parts.map((part) => {
      const smooth = spec.smooth ? smoothed(part) : part;
      if (smooth !== part) curves.append(make("path", { class: `raw s${curve.colour}`, d: stroke(part, px, py) }));
      line(curves, curve, smooth, px, py, curve.key.startsWith("validation") && part.length <= MOST_DOTS);
      above(curves, curve, part, px, y[1]);
      return smooth;
    });
    svg.append(curves);
    marks(svg, px, floor, low, high);
    chart.cursor = make("line", { class: "cursor", y1: EDGE.top, y2: floor, visibility: "hidden" });
    svg.append(chart.cursor);
    plot.replaceChildren(svg);
    Object.assign(chart, { drawn, px, width: right - EDGE.left });
    chart.log.setAttribute("aria-pressed", String(!!chart.logarithmic));
    plot.setAttribute("aria-label", `${spec.title}: ${describe(chart)}`);
    readout(chart);
  }
  function smoothed(part) { // running median, centred: it neither lags nor follows spikes
    const half = Math.round((part.length * view.smooth) / 1000);
    if (part.length < LEAST_TO_SMOOTH || half < 1) return part;
    return part.map((point, i) => {
      if (!point) return null;
      const near = part.slice(Math.max(0, i - half), i + half + 1).filter(Boolean).map((one) => one[2]).sort((a, b) => a - b);
      return [point[0], point[1], near[near.length >> 1], point[3]];
    });
  }
  function stroke(part, px, py) {
    let path = "", pen = "M";
    for (const point of part) {
      path += point ? `${pen}${px(point[0]).toFixed(1)} ${py(point[2]).toFixed(1)}` : "";
      pen = point ? "L" : "M";
    }
    return path;
  }
  function above(parent, curve, part, px, top) {
    const taken = new Set();
    for (const point of part) {
      if (!point || !(point[3] > top) || taken.has(Math.round(px(point[0]) / 4))) continue;
      taken.add(Math.round(px(point[0]) / 4));
      const mark = make("path", { class: `above f${curve.colour}`, d: `M${px(point[0]) - 4} ${EDGE.top}h8l-4 -7z` });
      mark.append(make("title", {}, `${curve.name}: ${short(point[3])} at ${short(point[0])} ${AXIS[view.axis]}`));
      parent.append(mark);
    }
  }
  function line(parent, curve, part, px, py, dotted) {
    let path = "", dots = "", band = [], bands = "", pen = "M", spread = false;
    const close = () => {
      if (band.length > 1) bands += "M" + band.map((p) => `${px(p[0]).toFixed(1)} ${py(p[3]).toFixed(1)}`).join("L") + "L"
        + band.reverse().map((p) => `${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("L") + "Z";
      band = [];
    };
    part.forEach((point, i) => {
      if (!point) { pen = "M"; close(); return; }
      const here = `${px(point[0]).toFixed(1)} ${py(point[2]).toFixed(1)}`;
      path += pen + here;
      if (dotted || (pen === "M" && !part[i + 1])) dots += `M${here}m-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0`; // evaluations, or one step alone
      pen = "L"; band.push(point); spread = spread || point[3] > point[1];
    });
    close();
    if (spread) parent.append(make("path", { class: `band f${curve.colour}`, d: bands }));
    if (dots) parent.append(make("path", { class: `dot f${curve.colour}`, d: dots }));
    parent.append(make("path", { class: `line s${curve.colour} dash${curve.dash}${curve.under ? " under" : ""}`, d: path }));
  }
  function phases(parent, px, floor) { // of the model with the most of them
    const model = data.models.reduce((most, one) => (one.runs.length > most.runs.length ? one : most));
    const known = model.runs.filter((run) => run.n);
    let start = whole()[0];
    known.forEach((run, i) => {
      const end = run.span[view.axis][1], x = px(start), length = Math.max(0, px(end) - x);
      if (known.length > 1 && i % 2) parent.append(make("rect", { class: "shade", x, y: EDGE.top, width: length, height: floor - EDGE.top }));
      if (known.length > 1 && length > 40) parent.append(make("text", { x: Math.max(x, EDGE.left) + 4, y: 14 }, run.phase));
      start = end;
    });
  }
  function marks(parent, px, floor, low, high) {
    const taken = new Set();
    for (const run of runs()) for (const mark of run.marks) {
      const x = px(mark[view.axis]), key = mark.kind + Math.round(x / 3);
      if (mark[view.axis] < low || mark[view.axis] > high || taken.has(key)) continue;
      taken.add(key);
      const group = make("g", { class: "mark " + mark.kind });
      if (mark.kind === "restart") group.append(make("line", { class: "restart", x1: x, x2: x, y1: EDGE.top, y2: floor }),
        make("path", { class: "restart-flag", d: `M${x} ${EDGE.top}l8 4l-8 4z` }));
      else group.append(make("path", { class: "bad-mark", d: `M${x - 5} ${floor}h10l-5 -9z` }));
      group.append(make("title", {}, mark.text));
      parent.append(group);
    }
  }

  // ---- reading and moving --------------------------------------------------------------------------------------
  function nearest(curve, x) {
    let best = null;
    for (const part of curve.parts) for (const point of part)
      if (point && (!best || Math.abs(point[0] - x) < Math.abs(best[0] - x))) best = point;
    return best;
  }
  function readout(chart) {
    const x = view.cursor, visible = x !== null && x >= range()[0] && x <= range()[1];
    chart.cursor.setAttribute("visibility", visible ? "visible" : "hidden");
    if (visible) { chart.cursor.setAttribute("x1", chart.px(x)); chart.cursor.setAttribute("x2", chart.px(x)); }
    chart.drawn.forEach((curve, i) => {
      const point = nearest(curve, visible ? x : range()[1]);
      chart.entries[i].lastChild.textContent = point ? short(point[2]) : "";
    });
  }
  function describe(chart) {
    return chart.drawn.map((curve) => {
      const seen = curve.parts.flat().filter(Boolean);
      return seen.length ? `${curve.name} from ${short(seen[0][2])} to ${short(seen[seen.length - 1][2])}` : `${curve.name}: none`;
    }).join("; ") + `, ${spoken()}`;
  }
  const spoken = () => `${short(range()[0])} to ${short(range()[1])} ${AXIS[view.axis]}`;
  function drawAll() {
    charts.forEach(draw);
    $("range").textContent = view.low === null ? "all" : spoken();
    $("reset").disabled = view.low === null;
  }
  function show(low, high) {
    const [first, end] = whole(), least = (end - first) * 1e-6;
    let span = Math.max(high - low, least);
    if (span >= end - first) { view.low = view.high = null; return drawAll(); }
    low = Math.min(Math.max(low, first), end - span);
    view.low = low; view.high = low + span;
    drawAll();
  }
  const announce = (text) => { $("announcement").textContent = text; };
  function zoom(factor, around) {
    const [low, high] = range(), middle = around ?? view.cursor ?? (low + high) / 2;
    show(middle - (middle - low) * factor, middle + (high - middle) * factor);
  }
  function pan(share) { const [low, high] = range(); if (view.low !== null) show(low + (high - low) * share, high + (high - low) * share); }
  function cursor(x, chart) {
    view.cursor = x;
    charts.forEach(readout);
    if (chart) announce(`${short(x)} ${AXIS[view.axis]}: ` + chart.entries.map((entry) => entry.textContent).join(", "));
  }
  function listen(chart) {
    const { plot } = chart, x = (event) => {
      const [low, high] = range(), inside = event.clientX - plot.getBoundingClientRect().left - EDGE.left;
      return low + Math.min(1, Math.max(0, inside / chart.width)) * (high - low);
    };
    let from = null, box = null;
    plot.addEventListener("pointerdown", (event) => { if (event.button === 0) { from = event.clientX; plot.setPointerCapture(event.pointerId); } });
    plot.addEventListener("pointermove", (event) => {
      cursor(x(event));
      if (from === null) return;
      box = box?.isConnected ? box : plot.firstChild.appendChild(make("rect", { class: "select", y: EDGE.top, height: plot.clientHeight - EDGE.top - EDGE.bottom }));
      const left = Math.min(from, event.clientX) - plot.getBoundingClientRect().left;
      box.setAttribute("x", left); box.setAttribute("width", Math.abs(event.clientX - from));
    });
    plot.addEventListener("pointerup", (event) => {
      const began = from; from = null; box?.remove();
      if (began !== null && Math.abs(event.clientX - began) > 5) {
        const a = x({ clientX: began }), b = x(event);
        show(Math.min(a, b), Math.max(a, b)); announce("shown: " + spoken());
      }
    });
    plot.addEventListener("pointercancel", () => { from = null; box?.remove(); });
    plot.addEventListener("pointerleave", () => { if (from === null) cursor(null); });
    plot.addEventListener("dblclick", () => show(...whole()));
    plot.addEventListener("wheel", (event) => { // else the page scrolls
      if (!(event.ctrlKey || event.metaKey || document.activeElement === plot)) return;
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.25 : 0.8, x(event));
    }, { passive: false });
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const [low, high] = range(), step = (high - low) / 50, from = view.cursor ?? (low + high) / 2;
      const actions = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), _: () => zoom(2), 0: () => show(...whole()),
        Home: () => show(...whole()), Escape: () => cursor(null),
        ArrowLeft: () => (event.shiftKey ? cursor(Math.max(low, from - step), chart) : pan(-0.25)),
        ArrowRight: () => (event.shiftKey ? cursor(Math.min(high, from + step), chart) : pan(0.25)) };
      if (!actions[event.key]) return;
      event.preventDefault();
      actions[event.key]();
      if (!event.shiftKey || event.key === "+" || event.key === "_") announce("shown: " + spoken());
    });
  }

  // ---- the bar, the colours, the live page ---------------------------------------------------------------------
  function axes() {
    $("axis").replaceChildren(...data.axes.map((axis) => make("option", { value: axis }, AXIS[axis])));
    if (!data.axes.includes(view.axis)) { view.axis = data.axes[0]; view.low = view.high = null; }
    if (view.axis) $("axis").value = view.axis;
    $("bar").hidden = $("keys").hidden = !data.charts.length;
    $("empty").hidden = !!data.charts.length;
  }
  $("axis").addEventListener("change", () => { // the same part of the run, measured in another way
    const [low, high] = range(), zoomed = view.low !== null, before = view.axis;
    view.axis = $("axis").value; view.cursor = null;
    if (zoomed) {
      const run = runs().find((one) => one.span[before][1] >= low) || runs()[0], grid = numbers(run.grid, before, TYPES.grid);
      const there = (value) => { const owner = runs().find((one) => one.span[before][1] >= value) || run;
        const old = numbers(owner.grid, before, TYPES.grid);
        return numbers(owner.grid, view.axis, TYPES.grid)[Math.min(old.length - 1, firstAt((i) => old[i], old.length, value))]; };
      if (grid) return show(there(low), there(high));
    }
    drawAll();
  });
  $("smooth").addEventListener("input", () => { view.smooth = Number($("smooth").value); drawAll(); });
  $("in").addEventListener("click", () => { zoom(0.5); announce("shown: " + spoken()); });
  $("out").addEventListener("click", () => { zoom(2); announce("shown: " + spoken()); });
  $("reset").addEventListener("click", () => { show(...whole()); announce("shown: all"); });
  const themes = ["auto", "light", "dark"];
  function theme(name) {
    document.documentElement.dataset.theme = name;
    $("theme").textContent = "Colours: " + name;
    try { localStorage.setItem("ettin-theme", name); } catch { /* a page from disk may not keep anything */ }
  }
  $("theme").addEventListener("click", () => theme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
  let kept = null;
  try { kept = localStorage.getItem("ettin-theme"); } catch { /* as above */ }
  theme(themes.includes(kept) ? kept : "auto");

  function start() {
    axes(); build();
    if (charts.length) drawAll();
  }
  async function poll() {
    try {
      const answer = await fetch("data.json?seen=" + encodeURIComponent(document.body.dataset.version));
      if (answer.status === 200) {
        const fresh = await answer.json(), shape = JSON.stringify([data.charts, data.models.map((model) => model.name)]);
        data = fresh.data; document.body.dataset.version = fresh.version;
        document.title = document.querySelector("h1").textContent = fresh.title;
        for (const [id, html] of Object.entries(fresh.sections)) replace($(id), html);
        axes();
        if (JSON.stringify([data.charts, data.models.map((model) => model.name)]) !== shape) build();
        else charts.forEach((chart) => { chart.curves = curvesOf(chart.spec); });
        if (charts.length) drawAll();
      }
      $("live").textContent = "live";
    } catch { $("live").textContent = "no answer; the page shows what it last had"; }
  }
  function replace(section, html) { // what is unfolded stays so
    if (!section || section.dataset.html === html) return;
    const open = [...section.querySelectorAll("details[open]")].map((one) => one.id);
    section.innerHTML = html; section.dataset.html = html;
    open.forEach((id) => { if ($(id)) $(id).open = true; });
  }
  start();
  performance.mark("first-curve");
  addEventListener("resize", () => charts.length && drawAll());
  if (document.body.dataset.live) setInterval(poll, Number(document.body.dataset.live));
})();
