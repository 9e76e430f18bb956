"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const HUES = ["#2f6fde", "#e0631e", "#2a9d6f", "#a24bd0", "#c8930a", "#d23c6b", "#1798ab", "#7a6a5a"];
const PAGE = 20;
const byId = (id) => document.getElementById(id);

// Elements hold text as text: nothing in this page is parsed as HTML.
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") element.textContent = value;
    else if (name === "hue") element.style.setProperty("--hue", HUES[value % HUES.length]);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return typeof value === "object" ? JSON.stringify(value) : String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

function duration(seconds) {
  if (!(seconds >= 0)) return "–";
  const hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${seconds.toFixed(1)} s`;
}

const numbers = (run, name) => (run.series[name] || [[], []])[1].filter((value) => typeof value === "number");
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

// ---- Overview ----
function overview() {
  DATA.runs.forEach((run, i) => {
    const rewards = numbers(run, "reward"), evals = numbers(run, "eval_reward"), times = numbers(run, "step_time");
    const fifth = Math.max(1, Math.ceil(rewards.length / 5));
    const tiles = [
      [`${shown(run.step)} / ${shown(run.max_steps)}`, "optimizer steps"],
      [`${shown(mean(rewards.slice(0, fifth)))} → ${shown(mean(rewards.slice(-fifth)))}`, "reward, first and last fifth"],
      evals.length ? [`${shown(evals[0])} → ${shown(evals.at(-1))}`, "held-out reward, first and last"] : null,
      [duration(run.seconds), "from first to last log"],
      times.length ? [duration(mean(times)), "per optimizer step"] : null,
      [shown(run.completion_count), "completions kept"],
    ].filter(Boolean);
    const title = make("h3", { text: run.name }, make("small", { text: `${run.over || "not ended yet"} · ${run.model || "model unknown"}` }));
    const tilesBox = make("div", { class: "tiles" }, ...tiles.map(([value, label]) =>
      make("div", { class: "tile" }, make("b", { text: value }), make("span", { text: label }))));
    byId("runs").append(make("div", { class: "run", hue: i }, title, tilesBox));
  });
}

// ---- Curves ----
const drawn = [];
function smooth(values, weight) {
  let average = 0, mass = 0;
  return values.map((value) => {
    if (typeof value !== "number") return null;
    average = weight * average + (1 - weight) * value;
    mass = weight * mass + 1 - weight;
    return average / mass;
  });
}

// What tells the metrics of a chart apart: "rewards/a/mean" and "rewards/b/mean" are a and b.
function shortNames(names) {
  if (names.length < 2) return names;
  const parts = names.map((name) => name.split("/"));
  const same = (at) => parts.every((part) => part.at(at) === parts[0].at(at)) && parts.every((part) => part.length > 1);
  return parts.map((part) => part.slice(same(0) ? 1 : 0, same(-1) ? -1 : undefined).join("/") || part.join("/"));
}

function traces(chart, weight) {
  const found = [], several = DATA.runs.length > 1 && chart.run === undefined, short = shortNames(chart.metrics);
  DATA.runs.forEach((run, r) => {
    if (chart.run !== undefined && chart.run !== r) return;
    const names = chart.metrics.filter((name) => run.series[name]);
    const [low, high] = chart.band || [];
    if (run.series[low] && run.series[high]) {
      const fill = HUES[r % HUES.length] + "26", common = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      found.push({ x: run.series[low][0], y: run.series[low][1], ...common });
      found.push({ x: run.series[high][0], y: run.series[high][1], fill: "tonexty", fillcolor: fill, ...common });
    }
    names.forEach((name, n) => {
      const [x, y] = run.series[name], hue = HUES[(several && names.length === 1 ? r : several ? r * 3 + n : n) % HUES.length];
      const label = [several ? run.name : "", chart.metrics.length > 1 ? short[chart.metrics.indexOf(name)] : ""].filter(Boolean).join(" · ") || name;
      const line = { color: hue, width: 1.8, dash: several && names.length > 1 && r % 2 ? "dot" : "solid" };
      found.push({ x, y: chart.stack ? y : smooth(y, weight), name: escaped(label), mode: y.length < 3 ? "lines+markers" : "lines", line,
        marker: { size: 5, color: hue }, stackgroup: chart.stack ? `run ${r}` : undefined });
    });
  });
  return found;
}

// Plotly reads a few tags in names; an entity is shown as its character.
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function layout(legend) {
  const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
  const axis = { exponentformat: "e", minexponent: 5, gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  return {
    margin: { l: 46, r: 10, t: 8, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: legend,
    font: { color: color("--soft"), size: 11 }, hovermode: "x unified", legend: { orientation: "h", traceorder: "normal", y: -0.14, font: { size: 10 } },
    hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--ink"), size: 11 } },
    xaxis: { ...axis, title: { text: legend ? "" : "optimizer step", standoff: 6, font: { size: 10 } } }, yaxis: axis,
  };
}

function draw(chart, parent) {
  const plot = make("div", { class: "plot" });
  parent.append(make("div", { class: "chart", "data-title": chart.title }, make("h3", { text: chart.title }), make("p", { text: chart.hint || "" }), plot));
  waiting.set(plot, chart);
  visible.observe(plot);
}

// A chart is drawn when it comes near the window, so that the page opens at once.
const waiting = new Map();
const visible = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target: plot }) => {
  visible.unobserve(plot);
  const chart = waiting.get(plot), lines = traces(chart, Number(byId("smoothing").value));
  const legend = lines.filter((line) => line.showlegend !== false).length > 1;
  Plotly.newPlot(plot, lines, layout(legend), { responsive: true, displayModeBar: false });
  drawn.push({ chart, plot, legend });
}), { rootMargin: "300px" });

function redraw() {
  const weight = Number(byId("smoothing").value);
  for (const { chart, plot, legend } of drawn) Plotly.react(plot, traces(chart, weight), layout(legend));
}

// Stacked phases of several runs would cover each other.
function ofEachRun(chart) {
  if (!chart.stack || DATA.runs.length < 2) return [chart];
  return DATA.runs.map((run, r) => ({ ...chart, run: r, title: `${chart.title}: ${run.name}` }));
}

function curves() {
  const has = (chart) => chart.metrics.some((name) => DATA.runs.some((run) => run.series[name]));
  DATA.charts.filter(has).flatMap(ofEachRun).forEach((chart) => draw(chart, byId("charts")));
  if (!waiting.size) byId("charts").append(make("p", { class: "none", text: "No metrics were logged." }));
  const others = byId("others");
  others.hidden = !DATA.others.length;
  others.addEventListener("toggle", () => {
    const parent = others.querySelector(".grid");
    if (others.open && !parent.children.length) DATA.others.forEach((name) => draw({ title: name, metrics: [name] }, parent));
  });
  byId("smoothing").addEventListener("input", redraw);
}

// ---- Completions ----
const groups = DATA.runs.flatMap((run, r) => run.groups.map((group) => ({ ...group, run: r })));
const showGroups = paged(byId("groups"), byId("pager"), PAGE, groupBox);
const rewardsOf = (rows) => rows.map((row) => row.reward).filter((reward) => typeof reward === "number");
const ORDERS = {
  new: (a, b) => b.step - a.step, old: (a, b) => a.step - b.step,
  best: (a, b) => Math.max(...rewardsOf(b.rows)) - Math.max(...rewardsOf(a.rows)),
  worst: (a, b) => (mean(rewardsOf(a.rows)) ?? 0) - (mean(rewardsOf(b.rows)) ?? 0),
  spread: (a, b) => spread(b) - spread(a),
};
const spread = (group) => { const r = rewardsOf(group.rows); return r.length ? Math.max(...r) - Math.min(...r) : -1; };
const within = (reward) => {
  const least = byId("f-min").value, most = byId("f-max").value;
  return (least === "" || reward >= Number(least)) && (most === "" || reward <= Number(most));
};

function filter() {
  const run = byId("f-run").value, step = byId("f-step").value, text = byId("f-text").value.toLowerCase();
  const selected = groups.filter((group) => (run === "" || group.run === Number(run)) && (step === "" || group.step === Number(step))
    && group.rows.some((row) => within(row.reward))
    && (!text || group.prompt.toLowerCase().includes(text) || group.rows.some((row) => row.text.toLowerCase().includes(text))));
  selected.sort(ORDERS[byId("f-order").value]);
  showGroups(selected);
  byId("f-count").textContent = `${shown(selected.length)} of ${shown(groups.length)} groups`;
}

function scoresOf(row) {
  const named = [["reward", row.reward], ...(typeof row.advantage === "number" ? [["advantage", row.advantage]] : []), ...Object.entries(row.parts)];
  return make("div", { class: "scores" }, ...named.map(([name, value]) => make("span", { text: `${name} ` }, make("b", { text: shown(value) }))));
}

function completion(row, largest) {
  const box = make("article", { class: within(row.reward) ? "completion" : "completion hidden" }, scoresOf(row), make("pre", { text: row.text }));
  const share = typeof row.advantage === "number" && largest ? Math.abs(row.advantage) / largest : 0;
  if (share) box.style.background = `rgb(var(--${row.advantage > 0 ? "good" : "bad"}) / ${(0.04 + 0.2 * share).toFixed(3)})`;
  return box;
}

function groupBox(group) {
  const largest = Math.max(0, ...group.rows.map((row) => Math.abs(row.advantage) || 0));
  const head = [DATA.runs.length > 1 ? DATA.runs[group.run].name : "", `step ${group.step}`, `mean reward ${shown(mean(rewardsOf(group.rows)))}`];
  return make("div", { class: "group", hue: group.run }, make("header", {}, ...head.filter(Boolean).map((text) => make("span", { text }))),
    make("div", { class: "prompt", text: group.prompt }), make("div", { class: "side" }, ...group.rows.map((row) => completion(row, largest))));
}

// A list of which a page is shown at a time; what is returned shows other items.
function paged(list, bar, size, box) {
  const previous = make("button", { type: "button", text: "Previous" }), next = make("button", { type: "button", text: "Next" });
  const number = make("output");
  let items = [], page = 0;
  const draw = () => {
    const pages = Math.max(1, Math.ceil(items.length / size));
    list.replaceChildren(...items.slice(page * size, (page + 1) * size).map(box));
    number.textContent = `page ${page + 1} of ${pages}`;
    previous.disabled = page === 0;
    next.disabled = page + 1 >= pages;
    bar.hidden = pages === 1;
  };
  const turn = (by) => { page += by; draw(); list.closest("section").scrollIntoView({ behavior: "instant" }); };
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  bar.append(previous, number, next);
  return (found) => { items = found; page = 0; draw(); };
}

function completions() {
  const option = (value, text) => make("option", { value, text });
  byId("f-run").append(option("", "all"), ...DATA.runs.map((run, r) => option(r, run.name)));
  const steps = [...new Set(groups.map((group) => group.step))].sort((a, b) => a - b);
  byId("f-step").append(option("", "all"), ...steps.map((step) => option(step, step)));
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
}

// ---- Tables ----
function table(head, rows) {
  const body = rows.map(([cells, changed]) => make("tr", { class: changed ? "changed" : "" }, ...cells.map((cell) =>
    make("td", { text: shown(cell), class: typeof cell === "number" ? "number" : "" }))));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { text })))), make("tbody", {}, ...body)));
}

// ---- Evaluations ----
const pairs = DATA.runs.flatMap((run, r) => run.evaluations.flatMap((evaluation, e) => evaluation.pairs.map((pair) => {
  const [first, last] = [mean(rewardsOf(pair.first)), mean(rewardsOf(pair.last))];
  const moved = pair.first.some((row, i) => row.text !== (pair.last[i] || {}).text);
  return { ...pair, set: `${r}.${e}`, run: r, name: evaluation.name, steps: evaluation.steps, rewards: [first, last], change: (last ?? 0) - (first ?? 0), moved };
})));
const EVALUATION_ORDERS = { data: () => 0, up: (a, b) => b.change - a.change, down: (a, b) => a.change - b.change };

// The beginning that two completions share is shown apart from what follows.
function compared(row, other) {
  let shared = 0;
  while (shared < row.text.length && row.text[shared] === other.text[shared]) shared += 1;
  return make("article", { class: "completion" }, scoresOf(row),
    make("pre", {}, make("span", { class: "same", text: row.text.slice(0, shared) }), row.text.slice(shared)));
}

function pairBox(pair) {
  const head = [DATA.runs.length > 1 ? DATA.runs[pair.run].name : "", pair.name === "eval" ? "" : pair.name, `reward ${pair.rewards.map(shown).join(" → ")}`];
  const side = make("div", { class: "pair" }, ...pair.steps.map((step) => make("b", { text: `step ${shown(step)}` })));
  pair.first.forEach((row, i) => { if (pair.last[i]) side.append(compared(row, pair.last[i]), compared(pair.last[i], row)); });
  const hue = pair.change > 0 ? "better" : pair.change < 0 ? "worse" : "";
  return make("div", { class: `group ${hue}`, hue: pair.run }, make("header", {}, ...head.filter(Boolean).map((text) => make("span", { text }))),
    make("div", { class: "prompt", text: pair.prompt }), side);
}

function pairBrowser() {
  byId("eval-browser").hidden = !pairs.length;
  const sets = [...new Map(pairs.map((pair) => [pair.set, pair])).values()];
  const name = (pair) => [DATA.runs.length > 1 ? DATA.runs[pair.run].name : "", pair.name].filter(Boolean).join(" · ");
  byId("e-set").append(make("option", { value: "", text: "all" }), ...sets.map((pair) => make("option", { value: pair.set, text: name(pair) })));
  byId("e-set").closest("label").hidden = sets.length < 2;
  const show = paged(byId("pairs"), byId("e-pager"), PAGE / 2, pairBox);
  const select = () => {
    const set = byId("e-set").value, text = byId("e-text").value.toLowerCase(), onlyMoved = byId("e-moved").checked;
    const has = (part) => part.toLowerCase().includes(text);
    const selected = pairs.filter((pair) => (set === "" || pair.set === set) && (!onlyMoved || pair.moved)
      && (!text || has(pair.prompt) || [...pair.first, ...pair.last].some((row) => has(row.text))));
    show(selected.sort(EVALUATION_ORDERS[byId("e-order").value]));
    byId("e-count").textContent = `${shown(selected.length)} of ${shown(pairs.length)} prompts`;
  };
  byId("e-filters").addEventListener("input", select);
  byId("e-filters").addEventListener("submit", (event) => event.preventDefault());
  select();
}

function evaluations() {
  const parent = byId("evals");
  DATA.runs.forEach((run) => {
    const names = Object.keys(run.series).filter((name) => name.startsWith("eval_"));
    if (!names.length) return;
    const rows = names.map((name) => {
      const [steps, values] = run.series[name], [first, last] = [values[0], values.at(-1)];
      const change = typeof first === "number" && typeof last === "number" && steps.length > 1 ? last - first : null;
      return [[name, first, last, change], name === "eval_reward"];
    });
    const [steps] = run.series[names[0]];
    parent.append(make("h3", { text: run.name }), table(["metric", `step ${steps[0]}`, `step ${steps.at(-1)}`, "change"], rows));
  });
  if (!parent.children.length) parent.append(make("p", { class: "none", text: "No evaluation was logged." }));
  pairBrowser();
}

// ---- Plan and setup ----
function plans() {
  const parent = byId("plans");
  DATA.runs.forEach((run) => {
    if (!run.planned.length) return;
    parent.append(make("h3", { text: run.name }), table(["", "planned", "measured"], run.planned.map((row) => [row, false])));
  });
  if (!parent.children.length) parent.append(make("p", { class: "none", text: "No plan was logged." }));
}

function setup() {
  const onlyChanged = byId("only-changed"), parent = byId("options");
  byId("only-changed-label").hidden = DATA.runs.length < 2;
  const show = () => {
    const names = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.setup)))];
    const rows = names.map((name) => {
      const values = DATA.runs.map((run) => run.setup[name]);
      return [[name, ...values], new Set(values.map((value) => JSON.stringify(value))).size > 1];
    });
    parent.replaceChildren(table(["option", ...DATA.runs.map((run) => run.name)], rows.filter(([, changed]) => changed || !onlyChanged.checked)));
  };
  onlyChanged.addEventListener("change", show);
  show();
}

// ---- Theme ----
const root = document.documentElement;
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
byId("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  redraw();
});
overview();
completions();
evaluations();
plans();
setup();
root.dataset.ready = "true";
setTimeout(() => {  // the library of the charts takes a while to compile, and the page is shown before
  document.body.append(make("script", { text: byId("plotly").textContent }));
  curves();
}, 50);
