"use strict";
const all = (query, root = document) => [...root.querySelectorAll(query)];

// Tables: a click on a column's head sorts by it, the next turns it round. Numbers by value, the
// largest first; what is missing last.
const number = (text) => parseFloat(text.replace(/,/g, "").replace("−", "-"));
for (const table of all("table.sortable")) {
  all("thead th", table).forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [row.cells[column].textContent.trim(), row]);
      const numeric = rows.every(([text]) => text === "–" || !isNaN(number(text)));
      const was = head.getAttribute("aria-sort");
      const up = was ? was === "descending" : !numeric;
      rows.sort(([a], [b]) => {
        if (a === "–" || b === "–") return (a === "–") - (b === "–");
        const order = numeric ? number(a) - number(b) : a.localeCompare(b);
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
      all("th", table.tHead).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}

// Paper cannot be unfolded: what is folded is printed.
let folded = [];
addEventListener("beforeprint", () => {
  folded = all("details.fold").filter((part) => !part.open);
  folded.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));

// One of several parts is shown: select[data-choose=NAME] among [data-NAME=value].
for (const select of all("select[data-choose]")) {
  const name = select.dataset.choose;
  const show = () => all(`[data-${name}]`).forEach((part) => {
    part.hidden = part.dataset[name] !== select.value;
  });
  select.addEventListener("change", show);
  show();
}

// Methods: rows, panels and marks of those that are not ticked are hidden.
const ticks = all("#methods input");
const showMethods = () => ticks.forEach((tick) => {
  for (const part of all(`[data-method="${tick.value}"]`)) {
    part.style.display = tick.checked ? "" : "none";
  }
});
ticks.forEach((tick) => tick.addEventListener("change", showMethods));
for (const button of all("#methods button")) {
  button.addEventListener("click", () => {
    ticks.forEach((tick) => { tick.checked = Boolean(button.dataset.all); });
    showMethods();
  });
}
showMethods();

// Structure: a table of coloured numbers.
const source = document.getElementById("structure-data");
if (source) {
  const trainings = JSON.parse(source.textContent);
  const [training, language, rank, mode] = ["training", "language", "rank", "mode"]
    .map((name) => document.getElementById(`s-${name}`));
  const heat = document.getElementById("heat");
  const MEAN = "mean of languages";
  const make = (name, text, parent) => {
    const made = document.createElement(name);
    made.textContent = text;
    parent.append(made);
    return made;
  };
  const offer = (select, options) => {
    const old = select.value;
    select.replaceChildren();
    for (const [value, text] of options) make("option", text, select).value = value;
    if (options.some(([value]) => value === old)) select.value = old;
  };
  const meanOf = (grids) => grids[0].map((row, m) => row.map((cell, l) =>
    cell === null ? null : grids.reduce((sum, grid) => sum + grid[m][l], 0) / grids.length));
  const draw = () => {
    const made = trainings[training.value];
    offer(rank, Object.keys(made.ranks).map((name) => [name, name]));
    const kept = made.ranks[rank.value];
    const names = Object.keys(kept);
    offer(language, [["", MEAN], ...names.map((name) => [name, name])]);
    const mean = meanOf(names.map((name) => kept[name]));
    const own = language.value === "" ? mean : kept[language.value];
    const less = mode.value === "difference";
    const grid = own.map((row, m) => row.map((cell, l) =>
      cell === null ? null : less ? cell - mean[m][l] : cell));
    const every = names.flatMap((name) => kept[name].flatMap((row, m) => row.map((cell, l) =>
      cell === null ? 0 : Math.abs(less ? cell - mean[m][l] : cell))));
    const most = Math.max(...every) || 1;  // one scale for all languages
    heat.caption.textContent = `${made.name}: ${language.value || MEAN}, r = ${rank.value}, `
      + (less ? "difference to the mean of the languages" : `kept ranks of ${made.r_max}`);
    heat.tHead.replaceChildren();
    const head = make("tr", "", heat.tHead);
    ["", ...made.layers].forEach((text) => make("th", text, head));
    const body = heat.tBodies[0];
    body.replaceChildren();
    grid.forEach((row, m) => {
      const line = make("tr", "", body);
      make("th", made.modules[m], line).scope = "row";
      row.forEach((cell, l) => {
        if (cell === null) { make("td", "", line); return; }
        const text = less && cell > 0 ? `+${+cell.toFixed(1)}` : `${+cell.toFixed(1)}`;
        const box = make("td", text === "-0" || text === "+0" ? "0" : text, line);
        const share = Math.round(100 * Math.abs(cell) / most);
        const hue = cell < 0 ? "var(--less)" : less ? "var(--more)" : "var(--heat)";
        box.style.background = `color-mix(in srgb, ${hue} ${share}%, var(--back))`;
        box.title = `${made.modules[m]}, layer ${made.layers[l]}: ${cell.toFixed(2)}`;
      });
    });
  };
  offer(training, trainings.map((made, index) => [String(index), made.name]));
  [training, language, rank, mode].forEach((select) => select.addEventListener("change", draw));
  draw();
}
