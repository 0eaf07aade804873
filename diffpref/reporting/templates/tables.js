// Tables sort by the columns' headings; folded parts are printed unfolded.
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b));
  for (const table of document.querySelectorAll("table.sortable")) {
    const [body, heads] = [table.tBodies[0], Array.from(table.tHead.rows[0].cells)];
    const original = Array.from(body.rows);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        // Numbers: highest first, lowest first, as it was. Texts the other way round.
        const numbers = typeof value(original[0], column) === "number";
        const cycle = [...(numbers ? ["descending", "ascending"] : ["ascending", "descending"]), null];
        const next = cycle[(cycle.indexOf(head.getAttribute("aria-sort")) + 1) % cycle.length];
        for (const other of heads) other.removeAttribute("aria-sort");
        if (next) head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        const sorted = original.slice();
        if (next) sorted.sort((a, b) => sign * compare(value(a, column), value(b, column)));
        body.append(...sorted);
      });
    });
  }

  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = Array.from(document.querySelectorAll("details:not([open])"));
    for (const part of folded) part.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
  });
})();
