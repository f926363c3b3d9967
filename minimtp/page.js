"use strict";
const run = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

function make(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

function number(x) {
  if (x === 0 || x === 1) return String(x);
  return x < 1e-4 ? x.toExponential(1) : x.toPrecision(3);
}

function list(node, pairs) {
  for (const [name, value] of pairs) node.append(make("div", "", null, make("dt", "", name), make("dd", "", value)));
  return node;
}

// The head

document.title = run.title;
at("model").textContent = run.model;
at("made").textContent = run.made;
at("rate").textContent = run.rate;
at("count").textContent = run.count;
list(at("settings"), run.settings);
if (run.command) { at("command").hidden = false; at("command").textContent = "$ " + run.command; }
at("note").textContent = run.note;

// The text

const kept = (place) => ["accepted", "correction", "bonus"].includes(place.fate);
const text = at("text"), buttons = [], squares = [], columns = [];
if (run.prompt) text.append(make("span", "prompt", run.prompt));
let word = null;

function newWord() {
  word = make("span", "word");
  text.append(word);
}

run.places.forEach((place, index) => {
  const button = make("button", `token f-${place.fate}`, place.shown);
  button.type = "button";
  button.tabIndex = -1;
  button.setAttribute("aria-label", `${place.label}, ${place.fate}, round ${place.round}`);
  button.dataset.index = index;
  if (!kept(place)) button.classList.add("ghost");
  const next = kept(place) ? place : run.places.slice(index).find((one) => kept(one) && one.round === place.round);
  const opens = !word || (kept(place) || kept(run.places[index - 1])) && next && /^\s/.test(next.shown);
  if (opens && !(kept(place) && index && !kept(run.places[index - 1]))) newWord();
  word.append(button);
  buttons.push(button);
  for (let i = 0; i < place.breaks; i++) { text.append(make("br")); word = null; }
  if (!columns[place.round]) {
    columns[place.round] = make("div", "round");
    at("strip").append(columns[place.round]);
  }
  const square = make("div", `square f-${place.fate}`, run.marks[place.fate]);
  square.dataset.index = index;
  columns[place.round].append(square);
});
text.addEventListener("click", (event) => {
  const button = event.target.closest("button.token");
  if (button) select(Number(button.dataset.index), false);
});
at("strip").addEventListener("click", (event) => {
  const index = event.target.dataset.index;
  if (index !== undefined) { reveal(Number(index)); select(Number(index), true); }
});

// What the styles mean

const drafted = run.places.some((place) => !kept(place));
for (const [fate, mark] of Object.entries(run.marks)) {
  if (run.places.some((place) => place.fate === fate)) {
    at("legend").append(make("span", "", null, make("b", `f-${fate}`, mark), ` ${fate}`));
  }
}
if (drafted) {
  const box = make("input");
  box.type = "checkbox";
  box.checked = true;
  box.id = "ghosts";
  box.addEventListener("change", () => text.classList.toggle("plain", !box.checked));
  at("legend").append(make("label", "", null, box, "show what was not kept"));
}

function reveal(index) {
  const box = at("ghosts");
  if (box && !kept(run.places[index])) { box.checked = true; text.classList.remove("plain"); }
}

// Selection

let current = -1;

function select(index, focus) {
  if (current >= 0) {
    buttons[current].removeAttribute("aria-current");
    buttons[current].tabIndex = -1;
    columns[run.places[current].round].classList.remove("now");
  }
  current = index;
  const button = buttons[index];
  button.setAttribute("aria-current", "true");
  button.tabIndex = 0;
  columns[run.places[index].round].classList.add("now");
  if (focus) { button.focus({ preventScroll: true }); clear(button); }
  show(run.places[index]);
}

function clear(button) {  // of the edges of the window, and on a phone of the panel
  const box = button.getBoundingClientRect(), panel = at("panel").getBoundingClientRect();
  const low = panel.left < box.right && panel.top > 40 ? Math.min(panel.top, innerHeight) : innerHeight;
  if (box.bottom > low - 8) scrollBy(0, box.bottom - low + 60);
  if (box.top < 8) scrollBy(0, box.top - 60);
}

function near(step) {
  const hidden = text.classList.contains("plain");
  let index = current + step;
  while (hidden && run.places[index] && !kept(run.places[index])) index += step;
  return run.places[index] ? index : current;
}

function neighbouringRound(step) {
  const hidden = text.classList.contains("plain"), wanted = run.places[current].round + step;
  const index = run.places.findIndex((place) => place.round === wanted && (!hidden || kept(place)));
  return index < 0 ? current : index;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const sideways = ["ArrowLeft", "ArrowRight"].includes(event.key);
  if (!sideways && !text.contains(event.target)) return; // elsewhere these scroll the page
  const moves = {
    ArrowRight: () => near(1), ArrowLeft: () => near(-1),
    ArrowDown: () => neighbouringRound(1), ArrowUp: () => neighbouringRound(-1),
    Home: () => 0, End: () => buttons.length - 1,
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  const index = moves[event.key]();
  reveal(index);
  select(index, true);
});

// The panel

function show(place) {
  const panel = at("panel"), parts = [];
  parts.push(make("div", "head", null,
    make("span", "name", place.label), make("span", `fate f-${place.fate}`, `${run.marks[place.fate]} ${place.fate}`)));
  parts.push(make("div", "pale where", place.where));
  parts.push(make("p", "says", place.says));
  if (place.numbers.length) parts.push(list(make("dl", "numbers"), place.numbers));
  if (place.kept) parts.push(ruler(place));
  parts.push(make("h3", "", !place.two ? "The target's law p" : "The target's law p and the drafter's q"));
  parts.push(bars(place));
  if (place.residual.length) {
    parts.push(make("h3", "", "The law that the correction is drawn from"), residual(place));
  }
  parts.push(make("p", "pale keys", null, make("kbd", "", "←"), " ", make("kbd", "", "→"), " token, ",
    make("kbd", "", "↑"), " ", make("kbd", "", "↓"), " round"));
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
}

function ruler(place) {
  const node = make("div", "ruler"), part = make("div", "part"), tick = make("div", "tick");
  const u = make("span", "u", "u"), [low, high] = place.kept;
  part.style.left = `${100 * low}%`;
  part.style.width = `${100 * (high - low)}%`;
  tick.style.left = u.style.left = `${100 * place.u}%`;
  node.append(make("div", "track"), part, tick, u, make("span", "zero", "0"), make("span", "one", "1"));
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", `u = ${number(place.u)}; kept from ${number(low)} to ${number(high)}`);
  const middle = make("span", "", place.part);
  middle.style.cssText = "top:2.2rem;left:50%;transform:translateX(-50%)";
  node.append(middle);
  return node;
}

function fullWidth(values) {
  const most = Math.max(...values);
  let full = 1;
  for (const smaller of [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]) if (most <= smaller) full = smaller;
  return full;
}

function bar(kind, value, full) {
  const node = make("div", `bar ${kind}`);
  node.style.width = `${100 * value / full}%`;
  return node;
}

function row(name, title, values, full, className) {
  const cell = make("td");
  if (className !== "rest") cell.append(...values.map(([kind, value]) => bar(kind, value, full)));
  const said = values.map(([kind, value]) => `${kind} ${number(value)}`).join("\n");
  const head = make("th", "", name);
  head.scope = "row";
  head.title = title;
  return make("tr", className, null, head, cell, make("td", "value", said));
}

function chart(rows, kinds, caption, marks) {
  const values = rows.flatMap((one) => one.slice(2)), full = fullWidth(values);
  const table = make("table", "", null, make("caption", "", `${caption}; full width: ${full}`));
  for (const [label, id, ...chances] of rows) {
    const mark = marks[id] ? `${marks[id]} ` : "  ";
    table.append(row(mark + label, `token ${id}`, kinds.map((kind, i) => [kind, chances[i]]), full,
      marks[id] ? "marked" : ""));
  }
  const rest = kinds.map((kind, i) => [kind, Math.max(0, 1 - rows.reduce((sum, one) => sum + one[i + 2], 0))]);
  table.append(row("all others", "", rest.map(([kind, value]) => [kind, value < 1e-5 ? 0 : value]), full, "rest"));
  return table;
}

function marksOf(place) {
  const marks = {};
  for (const one of run.places) {
    if (one.round === place.round && one.position === place.position) marks[one.id] = run.marks[one.fate];
  }
  return marks;
}

function bars(place) {
  const two = place.bars.length && place.bars[0][3] !== null;
  const rows = two ? place.bars : place.bars.map((one) => one.slice(0, 3));
  return chart(rows, two ? ["p", "q"] : ["p"], run.laws, marksOf(place));
}

function residual(place) {
  return chart(place.residual, ["r"], "largest entries", { [place.id]: run.marks[place.fate] });
}

select(0, false);
