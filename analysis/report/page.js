"use strict";
// Columns of tables marked so are sorted by a press on their head; without script they stay as they are written.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      const numeric = rows.every(([value]) => value === "" || Number.isFinite(Number(value)));
      const order = (a, b) => numeric ? Number(a) - Number(b) : a.localeCompare(b);
      rows.sort(([a], [b]) => (a === "") - (b === "") || (down ? -1 : 1) * order(a, b));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
