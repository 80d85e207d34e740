"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const FILTERS = ["sweep", "model", "task", "method", "m"];
const chosen = {};
const tip = document.getElementById("tip"), dialog = document.getElementById("detail");

// Elements. Children that are strings become text, never HTML: texts of records are not trusted.
function make(space, tag, attributes, children) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false).map((c) => (c instanceof Node ? c : String(c))));
  return element;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

// As Python rounds: 40.625, which is exactly between two, to the even 40.62, and not up as toFixed does.
function fixed(value, digits) {
  const size = Math.abs(value), scale = 10 ** digits;
  if (Math.abs((size * 2 ** (digits + 1)) % 2) !== 1) return value.toFixed(digits);
  const below = Math.floor(size * scale);
  return (value < 0 ? "-" : "") + ((below % 2 ? below + 1 : below) / scale).toFixed(digits);
}
// Scores and differences of a metric, in its unit: "%" has intervals with one digit, and values with two.
const unit = (metric) => data.units[metric];
const score = (metric, value) => (value === null ? "missing" : fixed(100 * value, unit(metric).digits + 1));
const signed = (value, digits) => (value >= 0 ? "+" : "−") + fixed(Math.abs(100 * value), digits);
const gain = (metric, value) => signed(value, unit(metric).digits + 1);
const amount = (n) => (typeof n === "number" && n >= 1000 && n % 1000 === 0 ? n / 1000 + "k" : String(n));
const size = (n) => (n === "all" ? Infinity : n);
const p3 = (p) => (p < 0.001 ? "<0.001" : fixed(p, 3));
const label = Object.fromEntries(data.methods.map((x) => [x.name, x.label]));
const name = (p) => `${label[p.method]} ${p.arm}, n=${amount(p.n)}`;
const interval = (p) => (p.value === null ? "" : `[${[p.low, p.high].map((end) => fixed(100 * end, unit(p.metric).digits)).join(", ")}]`);

// A D2LoRA filter keeps LoRA too: it is what D2LoRA is compared with.
const kept = (point) => ["model", "task", "method"].every((k) => !chosen[k] || point[k] === undefined || point[k] === chosen[k]) && (!chosen.m || String(point.m) === chosen.m || (point.m === 0 && chosen.m !== "0"));
const first = (cells) => cells.map((c) => c && data.points[c.p]).find(Boolean);

// --- filters
function filters() {
  const values = Object.fromEntries(FILTERS.map((k) => [k, k === "sweep" ? data.sweeps.map((w) => w.name) : [...new Set(data.points.map((p) => p[k]))]]));
  values.m.sort((a, b) => size(a) - size(b));
  const order = data.methods.map((x) => x.name);
  values.method.sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const selects = FILTERS.filter((k) => values[k].length > 1).map((k) =>
    h("label", {}, k + " ", h("select", { name: k, onchange: (e) => { chosen[k] = e.target.value; draw(); } },
      h("option", { value: "" }, "all"), values[k].map((v) => h("option", { value: v }, k === "method" ? label[v] : String(v))))));
  document.getElementById("filters").append(...selects);
}

// --- tables
function sortable(head, rows, label) {
  // rows: [{keys: [...], row: tr}]; a click sorts by that column, again reverses.
  const body = h("tbody", {}, rows.map((r) => r.row));
  const heads = head.map((text, i) => h("th", { scope: "col", "aria-sort": "none", tabindex: 0, onclick: () => sort(i), onkeydown: (e) => { if (e.key === "Enter") sort(i); } }, text));
  function sort(i) {
    const down = heads[i].getAttribute("aria-sort") === "descending";
    heads.forEach((x) => x.setAttribute("aria-sort", "none"));
    heads[i].setAttribute("aria-sort", down ? "ascending" : "descending");
    body.append(...[...rows].sort((a, b) => compare(a.keys[i], b.keys[i], down ? 1 : -1)).map((r) => r.row));
  }
  return h("div", { class: "scroll" }, h("table", { "aria-label": label }, h("thead", {}, h("tr", {}, heads)), body));
}
function compare(a, b, way) {
  const [i, j] = [a, b].map((x) => (typeof x === "number" ? 0 : x === null ? 2 : 1));
  if (i !== j) return i - j; // after the numbers come words such as "missing", then what is not there: either way
  return i === 2 ? 0 : way * (i === 1 ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
}

function grid(table) {
  const lines = table.lines.filter((line) => { const p = first(line.cells); return p && kept(p); });
  if (!lines.length) return null;
  const rows = lines.map((line) => ({
    keys: [line.label, ...line.cells.map((c) => c && data.points[c.p].value)],
    row: h("tr", {}, h("th", { scope: "row" }, line.label), line.cells.map((c) => cell(c))),
  }));
  const pairs = table.pairs.filter((pair) => pair.points.some((i) => kept(data.points[i]))).map((pair) => pair.row);
  return h("div", {}, h("h4", {}, table.title), verdict(table.verdict, lines.length < table.lines.length),
    table.remarks.map((text) => h("p", { class: "remark" }, text)),
    sortable(["", ...table.columns], rows, table.title),
    pairs.length ? h("details", {}, h("summary", {}, `each comparison, in ${table.unit}`),
      sortable(table.pair_head, pairs.map((row) => ({ keys: row.map(key), row: h("tr", {}, row.map((t) => h("td", {}, t))) })), "comparisons")) : null);
}
const verdict = (text, hidden) => h("p", { class: "verdict" }, hidden ? "Of the whole table, with the rows that the filters hide: " : null, text);
function key(text) {
  const number = parseFloat(text.replace(/[*<]/g, "")) * (/^\d+k$/.test(text) ? 1000 : 1);
  return /^[+−-]?[<\d.]/.test(text) && !isNaN(number) ? number : text;
}

function cell(c) {
  if (!c) return h("td", {}, "–");
  const p = data.points[c.p], d = c.c === null ? null : data.comparisons[c.c];
  const lost = p.runs.filter((r) => !r.done).length;
  return h("td", { class: "open" }, h("button", { type: "button", "aria-label": `${name(p)}: details`, onclick: () => detail(p, d) },
    p.value === null ? h("span", { class: "missing" }, "missing") : score(p.metric, p.value) + (d && d.beyond ? "*" : ""),
    h("small", {}, interval(p)),
    lost && p.value !== null ? h("small", { class: "missing" }, `${lost} of ${p.runs.length} seeds missing`) : null,
    p.paper !== null ? h("small", {}, `paper ${score(p.metric, p.paper)}` + (p.value === null ? "" : `, ${gain(p.metric, p.value - p.paper)}`)) : null,
    d ? h("small", {}, `${gain(p.metric, d.difference)} against LoRA`) : null,
    p.chosen ? h("small", {}, p.chosen) : null));
}

const plain = (head, rows, label) => sortable(head, rows.map((row) => ({ keys: row.map((t) => key(String(t))), row: h("tr", {}, row.map((t) => h("td", {}, t))) })), label);

// --- figures
const W = 420, H = 260, LEFT = 44, RIGHT = 12, TOP = 10, BOTTOM = 36;
const APART = 6; // pixels between methods at one n
function ticks(low, high) {
  const rough = (high - low) / 5, base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * base).find((x) => x >= rough);
  const values = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) values.push(v);
  return values;
}
// Low and high of a point: of its value, or of its difference to LoRA.
const ends = ([, i, c]) => (c === undefined ? [data.points[i].low, data.points[i].high] : data.comparisons[c].interval);
function scales({ curves, x: axis, margin }) {
  const points = curves.flatMap((c) => c.points);
  const paper = curves.flatMap((c) => c.paper);
  const xs = [...new Set([...points, ...paper].map(([x]) => x))].sort((a, b) => a - b);
  const ys = [...points.flatMap(ends), ...paper.map(([, v]) => v), ...(margin === undefined ? [] : [-margin, margin])];
  const low = Math.min(...ys), high = Math.max(...ys), room = (high - low || 0.02) * 0.06;
  const at = (n) => (axis.even ? xs.indexOf(n) : axis.logarithmic ? Math.log(n) : n), start = at(xs[0]), width = at(xs[xs.length - 1]) - start || 1;
  const pad = margin === undefined ? 0 : 2.5 * APART; // room for what stands beside its x
  const x = (n) => LEFT + pad + ((W - LEFT - RIGHT - 2 * pad) * (at(n) - start)) / width;
  const y = (v) => TOP + ((H - TOP - BOTTOM) * (high + room - v)) / (high - low + 2 * room || 1);
  return { xs, x, y, low: low - room, high: high + room };
}
const path = (pairs) => pairs.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// What the filters leave of panels. One that another shows as well is left out: LoRA beside a D2LoRA that is hidden.
const end = (c) => c.points[c.points.length - 1][1];
function left(panels) {
  const narrowed = panels.map((f) => ({ ...f, curves: f.curves.filter((c) => c.points.length && kept(data.points[end(c)])) })).filter((f) => f.curves.length);
  const within = (a, b) => a.curves.every((c) => b.curves.some((o) => end(o) === end(c)));
  return narrowed.filter((a, i) => !narrowed.some((b, j) => i !== j && within(a, b) && (!within(b, a) || j < i)));
}
function panel(drawing) {
  const curves = drawing.curves;
  const { xs, x, y, low, high } = scales(drawing);
  const digits = high - low < 0.03 ? 1 : 0;
  const step = ticks(100 * low, 100 * high);
  const labelled = xs.filter((n, i) => i === 0 || i === xs.length - 1 || x(n) - x(xs[i - 1]) > 22);
  const axes = [
    step.map((v) => [s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(v / 100), y2: y(v / 100) }), s("text", { x: LEFT - 5, y: y(v / 100) + 4, "text-anchor": "end" }, v.toFixed(digits))]),
    labelled.map((n) => [s("line", { class: "grid", x1: x(n), x2: x(n), y1: TOP, y2: H - BOTTOM }), s("text", { x: x(n), y: H - BOTTOM + 14, "text-anchor": "middle" }, amount(n))]),
    s("text", { x: (LEFT + W) / 2, y: H - 5, "text-anchor": "middle" }, drawing.x.label),
  ];
  const drawn = drawing.margin === undefined ? curves.map((c) => curve(c, x, y))
    : [s("rect", { class: "margin", x: LEFT, width: W - LEFT - RIGHT, y: y(drawing.margin), height: y(-drawing.margin) - y(drawing.margin) }),
      s("line", { class: "zero", x1: LEFT, x2: W - RIGHT, y1: y(0), y2: y(0) }), curves.map((c, i) => difference(c, (n) => x(n) + APART * (i - (curves.length - 1) / 2), y))];
  return h("figure", { class: drawing.margin === undefined ? null : "differences" }, h("figcaption", {}, `${drawing.title}: ${drawing.unit}`),
    s("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": drawing.title }, axes, drawn),
    h("div", {}, curves.map(legend), drawing.margin === undefined ? null
      : h("span", { class: "key shaded" }, s("svg", { viewBox: "0 0 30 12" }, s("rect", { class: "margin", width: 30, height: 12 })), drawing.band)));
}
function difference(c, x, y) {
  const points = c.points.map(([n, i, k]) => [x(n), data.points[i], data.comparisons[k]]);
  return series(c,
    s("path", { class: "curve thin", d: path(points.map(([at, , d]) => [at, y(d.difference)])) }),
    points.map(([at, , d]) => s("line", { class: "bar", x1: at, x2: at, y1: y(d.interval[0]), y2: y(d.interval[1]) })),
    points.map(([at, p, d]) => dot(c, p, at, y(d.difference), d)));
}
const series = (c, ...drawn) => s("g", { class: `series ${c.lora ? "lora" : "d2lora"}`, style: `--c:${c.colour}` }, drawn);
const mark = (c, x, y) => s("path", { class: "dot", d: data.markers[c.marker], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
function curve(c, x, y) {
  const points = c.points.map(([n, i]) => [n, data.points[i]]);
  const band = [...points.map(([n, p]) => [x(n), y(p.high)]), ...[...points].reverse().map(([n, p]) => [x(n), y(p.low)])];
  return series(c,
    s("path", { class: "band", d: path(band) + "Z" }),
    c.paper.length ? s("path", { class: "paper", d: path(c.paper.map(([n, v]) => [x(n), y(v)])) }) : null,
    s("path", { class: "curve", d: path(points.map(([n, p]) => [x(n), y(p.value)])) }),
    points.map(([n, p]) => dot(c, p, x(n), y(p.value))));
}
const apart = (p, d) => `D2LoRA − LoRA: ${gain(p.metric, d.difference)} ${unit(p.metric).several} [${d.interval.map((end) => signed(end, unit(p.metric).digits)).join(", ")}]`;
function dot(c, p, x, y, d) {
  const show = (e) => hint(p, e.currentTarget.getBoundingClientRect(), d);
  const hit = s("circle", { class: "hit", cx: x, cy: y, r: 9, tabindex: 0, role: "button", "aria-label": `${name(p)}: ${d ? apart(p, d) : `${score(p.metric, p.value)} ${interval(p)}`}`,
    onpointerenter: show, onfocus: show, onpointerleave: hide, onblur: hide, onclick: () => detail(p, d), onkeydown: (e) => { if (e.key === "Enter") detail(p, d); } });
  return s("g", {}, mark(c, x, y), hit);
}
function legend(c) {
  const entry = (text, ...drawn) => h("span", { class: "key" }, s("svg", { viewBox: "0 0 30 12" }, series(c, drawn)), text);
  const own = entry(c.label, s("path", { class: "curve", d: "M0 6L30 6" }), mark(c, 15, 6));
  return c.paper.length ? [own, entry(`${c.label}, paper`, s("path", { class: "paper", d: "M0 6L30 6" }))] : [own];
}
function hint(p, box, d) {
  const seeds = (done) => p.runs.filter((r) => r.done === done).map((r) => r.seed).join(", ");
  const keys = p.runs.filter((r) => r.done).map((r) => r.evaluate).filter((k, i, all) => all.indexOf(k) === i);
  tip.textContent = `${name(p)}\n` + (d ? `${apart(p, d)}, ${d.decision}\n` : "") + `${p.metric} ${score(p.metric, p.value)} ${interval(p)}` + (p.paper === null ? "" : `\npaper ${score(p.metric, p.paper)}`) + `\n${p.items} items, seed ${seeds(true)}` + (seeds(false) && `; missing: seed ${seeds(false)}`) + `\nrecord ${keys.join(", ")}`;
  tip.hidden = false;
  const left = Math.min(box.right + 8, innerWidth - tip.offsetWidth - 6);
  tip.style.left = `${Math.max(6, left)}px`;
  tip.style.top = `${Math.max(6, Math.min(box.bottom + 8, innerHeight - tip.offsetHeight - 6))}px`;
}
function hide() { tip.hidden = true; }

// --- a cell's provenance and items
const others = (p) => data.points.filter((o) => o !== p && (o.m === 0) !== (p.m === 0) && ["sweep", "model", "task", "method", "n", "benchmark", "metric"].every((k) => o[k] === p[k]) && (p.n === 0 || (o.init === p.init && o.recipe === p.recipe)) && o.runs.some((r) => r.done));

function detail(p, d) {
  hide();
  const partners = others(p), done = [p, ...partners].flatMap((x) => x.runs.filter((r) => r.done));
  const seeds = [...new Set(done.map((r) => r.seed))].sort((a, b) => a - b);
  const state = { seed: done.length ? done[0].seed : null, other: partners[0] };
  const body = h("div", {});
  const fill = () => body.replaceChildren(...sides(p, state, fill).filter(Boolean));
  const pick = (label, values, show, set) => (values.length > 1 ? h("label", {}, ` ${label} `, h("select", { onchange: (e) => { set(values[e.target.selectedIndex]); fill(); } }, values.map((v) => h("option", {}, show(v))))) : null);
  dialog.replaceChildren(
    h("header", {}, h("h3", {}, `${name(p)} on ${p.benchmark}`), h("button", { type: "button", onclick: () => dialog.close() }, "close")),
    h("p", {}, p.value === null ? "No record yet: this cell is missing." : `${p.metric} ${score(p.metric, p.value)} ${unit(p.metric).name}, 95 % interval ${interval(p)}, ${p.items} items.` + (p.paper === null ? "" : ` The paper has ${score(p.metric, p.paper)}.`)),
    d && d.outcomes ? h("p", {}, counts(d.outcomes)) : "",
    d ? h("p", {}, `${apart(p, d)}, p ${p3(d.p)} (${d.test}), ${p3(d.adjusted)} after Holm: ${d.beyond ? "beyond chance" : "not beyond chance"}; D2LoRA is ${d.decision}.`) : "",
    h("p", {}, pick("seed", seeds, String, (seed) => { state.seed = seed; }), pick("beside", partners, (o) => o.arm + (o.warmup ? ` ${o.warmup}` : ""), (o) => { state.other = o; })),
    body);
  fill();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}
const counts = (c) => `Right: both ${c.both}, D2LoRA alone ${c.d2lora_only}, LoRA alone ${c.lora_only}, neither ${c.neither}. McNemar's test compares the two in the middle.`;
// The base has one run, whatever the seed.
const run = (p, seed) => p.runs.find((r) => r.done && (r.seed === seed || (p.n === 0 && p.m === 0)));

function sides(p, state, fill) {
  const both = [p, state.other].filter(Boolean).sort((a, b) => size(a.m) - size(b.m)).map((x) => ({ point: x, run: run(x, state.seed) }));
  const own = run(p, state.seed) || p.runs.find((r) => r.seed === state.seed) || p.runs[0];
  const lost = state.seed === null ? [] : both.filter((x) => !x.run).map((x) => h("p", { class: "missing" }, `${x.point.arm}: no record of seed ${state.seed}.`));
  return [h("details", {}, h("summary", {}, "where the number comes from"), ["evaluate", "adapt", "warmup", "prepare"].filter((k) => own[k]).map((k) => record(k, own[k]))), ...lost,
    ...["adapt", "warmup"].map((stage) => losses(stage, both.filter((x) => x.run))), ...items(both.filter((x) => x.run), state, fill)];
}
function record(stage, key) {
  const r = data.records[key];
  const title = h("h4", {}, `${stage} `, h("a", { href: `../store/${stage}/${key}/record.json` }, key));
  if (!r) return h("div", {}, title, h("p", { class: "missing" }, "no record"));
  const env = data.environments[r.environment], git = env.git;
  const rows = { what: r.label, code: git ? `${git.commit}${git.dirty ? ", with uncommitted changes" : ""}` : "unknown (outside a git checkout)",
    packages: Object.entries(env.packages || {}).map((x) => x.join(" ")).join(", ") + `, python ${env.python}`, hardware: Object.entries(env.hardware || {}).map((x) => x.join(" ")).join(", ") + `, ${env.threads} threads`,
    when: `${r.started}, ${r.seconds} s, peak memory ${r.peak_memory_mb} MB`, result: JSON.stringify(r.metrics), data: r.data ? JSON.stringify(r.data) : null, spec: JSON.stringify(r.spec) };
  return h("div", {}, title, h("dl", {}, Object.entries(rows).filter(([, v]) => v).map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])));
}
// The losses that the trainings of one phase logged, over optimizer steps; an arm's line has its colour.
const PHASE = { adapt: "adaptation", warmup: "warm-up" };
function losses(stage, both) {
  const lines = both.map(({ point, run: r }) => ({ point, points: (data.records[r[stage]] || {}).losses || [] })).filter((x) => x.points.length > 1);
  if (!lines.length) return null;
  const every = lines.flatMap((x) => x.points), last = Math.max(...every.map(([step]) => step));
  const low = Math.min(...every.map(([, v]) => v)), high = Math.max(...every.map(([, v]) => v)), room = (high - low || 1) * 0.06;
  const x = (step) => LEFT + ((W - LEFT - RIGHT) * step) / last, y = (v) => TOP + ((H - TOP - BOTTOM) * (high + room - v)) / (high - low + 2 * room);
  const digits = high - low < 1 ? 2 : 1;
  const grid = [
    ticks(low, high).map((v) => [s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v) }), s("text", { x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(digits))]),
    [0, last].map((step) => s("text", { x: x(step), y: H - BOTTOM + 14, "text-anchor": step ? "end" : "start" }, step)),
    s("text", { x: (LEFT + W) / 2, y: H - 5, "text-anchor": "middle" }, "optimizer step"),
  ];
  const look = (p) => ({ lora: p.m === 0, colour: p.m === 0 ? data.arms.lora : data.arms.d2lora });
  const line = (p, d) => series(look(p), s("path", { class: "curve", d }));
  return h("figure", { class: "losses" }, h("figcaption", {}, `Loss of the ${PHASE[stage]}`),
    s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Loss of the ${PHASE[stage]}` }, grid, lines.map((l) => line(l.point, path(l.points.map(([step, v]) => [x(step), y(v)]))))),
    h("div", {}, lines.map((l) => h("span", { class: "key" }, s("svg", { viewBox: "0 0 30 12" }, line(l.point, "M0 6L30 6")), l.point.arm))));
}
function items(pair, state, fill) {
  const answers = pair.map((x) => data.answers[x.run.evaluate]);
  if (!answers.length || !answers[0]) return [];
  const set = data.sets[answers[0].set], metric = pair[0].point.metric;
  const comparable = answers.length > 1 && answers[1] && answers[1].set === answers[0].set;
  const flipped = (i) => comparable && answers[0].items[i][1][metric] !== answers[1].items[i][1][metric];
  const flips = set.filter((_, i) => flipped(i)).length;
  const filter = flips ? h("label", {}, h("input", { type: "checkbox", name: "flipped", checked: state.flipped || null, onchange: (e) => { state.flipped = e.target.checked; fill(); } }), ` only the ${flips} that differ between the arms`) : null;
  return [h("h4", {}, `A sample of ${set.length} items`), h("p", { class: "note" }, "Half drawn by chance, half those on which this benchmark's evaluations disagree most: no basis for a rate."), filter,
    ...set.map(([index, prompt, gold], i) => (state.flipped && flips && !flipped(i) ? null : h("div", { class: "item" },
      h("div", { class: "small" }, `item ${index}`), h("pre", {}, prompt), h("div", { class: "small" }, "gold"), h("pre", {}, gold),
      h("div", { class: "answers" }, pair.map((x, j) => answers[j] && answers[j].set === answers[0].set ? answer(x.point, answers[j].items[i]) : null)))))];
}
function answer(p, [text, scores]) {
  const own = scores[p.metric];
  const verdict = own === 1 ? h("span", { class: "right" }, "✓ right") : own === 0 ? h("span", { class: "wrong" }, "✗ wrong") : `${p.metric} ${fixed(100 * own, unit(p.metric).digits)}`;
  return h("div", {}, h("div", { class: "small" }, `${p.arm}: `, verdict), h("pre", {}, text));
}

// --- the page
// What the filters leave of an artefact: of its tables of scores, its panels, its other rows.
function content(x) {
  const panels = left(x.panels), hidden = x.panels.some((f) => f.curves.some((c) => c.points.length && !kept(data.points[end(c)])));
  const rows = x.rows ? x.rows.rows.filter((_, i) => !x.rows.shows.length || kept(x.rows.shows[i])) : [];
  const parts = [x.tables.map(grid), panels.length ? h("div", { class: "figure" }, panels.map(panel)) : null,
    x.image ? h("img", { src: x.image, alt: x.title, class: "drawn" }) : null,
    rows.length ? plain(x.rows.head, rows, x.title) : null].flat().filter(Boolean);
  const note = (n) => h("p", { class: /^[\d,]+ of |^Records/.test(n) ? "warning" : "note" }, n);
  const links = x.files.length ? h("p", { class: "note" }, "Files: ", x.files.map((f, i) => [i ? ", " : "", h("a", { href: f }, f.split("/").pop())])) : null;
  return parts.length ? [x.verdicts.map((v) => verdict(v, hidden)), parts, x.notes.map(note), links] : null;
}
function sweep(w) {
  let above = false;
  const sections = w.shown.map((x) => {
    const parts = content(x);
    if (!parts) return null;
    const folded = x.folded === "yes" || (x.folded === "below others" && above);
    above ||= x.panels.some((f) => f.margin === undefined) || !(x.panels.length || x.image && !x.rows); // differences take no table's place
    return folded ? h("details", {}, h("summary", {}, x.title), h("section", {}, parts))
      : h("section", {}, x.folded === "no" ? h("h3", {}, x.title) : null, parts); // else the sweep's heading names it
  });
  return h("section", { id: `sweep-${w.name}` }, h("h2", {}, `Sweep ${w.name}`), h("p", { class: "note" }, held(w)), w.problem ? h("p", { class: "missing" }, `No table: ${w.problem}`) : null, sections);
}
const held = (w) => [`${w.finished} of ${w.cells} cells finished`, w.date && `latest record ${w.date}`, w.holds].filter(Boolean).join("; ");
// All sweeps, the latest first, with what they have; of a single one its own section says it.
function overview() {
  if (data.sweeps.length < 2) return null;
  const rows = data.sweeps.map((w) => ({ keys: [w.date || null, w.name, w.finished, w.holds],
    row: h("tr", {}, h("td", {}, w.date || "–"), h("td", {}, h("a", { href: `#sweep-${w.name}` }, w.name)), h("td", {}, `${w.finished} of ${w.cells}`), h("td", { class: "holds" }, w.holds)) }));
  return h("section", {}, h("h2", {}, "Sweeps"), sortable(["latest record", "sweep", "cells finished", "what it has"], rows, "Sweeps"));
}
function draw() {
  hide();
  const sweeps = data.sweeps.filter((w) => !chosen.sweep || w.name === chosen.sweep);
  document.getElementById("main").replaceChildren(...[chosen.sweep ? null : overview(), ...sweeps.map(sweep)].filter(Boolean));
}
dialog.addEventListener("click", (e) => { if (e.target === dialog) dialog.close(); });
addEventListener("scroll", hide, { passive: true });
filters();
draw();
