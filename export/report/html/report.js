// Sorting and filtering of long tables. The page is whole without it.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], order = new Intl.Collator(undefined, { numeric: true });
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const isNumber = head.classList.contains("n");
    const value = (row) => row.cells[column].textContent.trim();
    const figure = (row) => (Number.isNaN(parseFloat(value(row))) ? -Infinity : parseFloat(value(row)));
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const falls = isNumber ? head.ariaSort !== "descending" : head.ariaSort === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const sign = falls ? -1 : 1;
      const compare = isNumber ? (a, b) => figure(a) - figure(b) || 0 : (a, b) => order.compare(value(a), value(b));
      body.append(...rows.sort((a, b) => sign * compare(a, b)));
    });
  });
  const form = document.createElement("label"), input = document.createElement("input"), told = document.createElement("span");
  form.className = "filter";
  input.type = "search";
  input.placeholder = "layer, reason, yes, no, ...";
  told.className = "soft";
  told.setAttribute("role", "status");
  form.append("Show rows with ", input, told);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    told.textContent = words.length ? `${shown} of ${rows.length}` : "";
  });
  table.parentElement.before(form);
}
