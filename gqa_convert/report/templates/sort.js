"use strict";
// Headings of tables become buttons that sort by their column: numbers by value, sizes in bytes, all else as text.
// Without this script the tables stand in the order in which they were written.
const UNITS = {B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40};
function value(text) {
  const found = text.replace(/,(?=\d{3})/g, "").match(/^[x+~]?\s*(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*([KMGT]?i?B)?/i);
  return found ? Number(found[1]) * (UNITS[found[2]] || 1) : NaN;
}
function order(column, down) {
  return (a, b) => {
    const texts = [a, b].map(row => row.cells[column].textContent.trim());
    if (!texts[0] || !texts[1]) return !texts[0] - !texts[1];  // nothing stands last either way
    const [x, y] = texts.map(value);
    const named = column === 0 || Number.isNaN(x) || Number.isNaN(y);
    const before = named ? texts[0].localeCompare(texts[1], undefined, {numeric: true}) : x - y;
    return down ? -before : before;
  };
}
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort(order(column, down)));
    });
  });
}
