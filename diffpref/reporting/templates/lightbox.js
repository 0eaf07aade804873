// An image enlarged beside the baseline's, with its scores in every metric.
(() => {
  const box = document.getElementById("lightbox");
  const part = (name) => box.querySelector(`[data-part="${name}"]`);
  let shown = null;

  const figure = (button) => {
    const made = document.createElement("figure");
    const image = button.querySelector("img").cloneNode();
    const caption = document.createElement("figcaption");
    caption.textContent = grid.data.models[Number(button.dataset.cell)];
    image.removeAttribute("loading");
    made.append(image, caption);
    return made;
  };
  const line = (cells, tag) => {
    const row = document.createElement("tr");
    cells.forEach((text, position) => {
      const cell = document.createElement(position === 0 ? "th" : tag);
      cell.scope = position === 0 && tag === "td" ? "row" : "col";
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  };
  const table = (row, cell) => {
    const { models, metrics } = grid.data;
    const head = cell ? ["Metric", models[0], models[cell], "Change"] : ["Metric", models[0]];
    part("head").replaceChildren(line(head, "th"));
    part("body").replaceChildren(...metrics.map((about, column) => {
      const [base, own] = [grid.scores(row)[0][column], grid.scores(row)[cell][column]];
      const { value, outcome } = grid.result(row, cell, column);
      const changed = value === null ? "none" : grid.change(value, about);
      const made = line([about.label, grid.number(base, about), ...(cell ? [grid.number(own, about), changed] : [])], "td");
      if (cell && outcome) made.lastChild.className = `chip ${outcome}`;
      return made;
    }));
  };
  const show = (button) => {
    shown = button;
    const row = button.closest("li");
    const cell = Number(button.dataset.cell);
    const base = row.querySelector('.zoom[data-cell="0"]');
    part("title").textContent = row.dataset.prompt;
    part("where").textContent = `${row.dataset.kindName}, seed ${row.dataset.seed}`;
    part("figures").replaceChildren(...(cell && base ? [base, button] : [button]).map(figure));
    table(row, cell);
    for (const mover of box.querySelectorAll("button[data-move]")) {
      mover.disabled = !grid.neighbour(button, ...grid.MOVES[mover.dataset.move]);
    }
    if (!box.open) box.showModal();
  };
  const move = (key) => {
    const next = grid.neighbour(shown, ...grid.MOVES[key]);
    if (next) show(next);
  };
  grid.list.addEventListener("click", (event) => {
    const button = event.target.closest(".zoom");
    if (button) show(button);
  });
  box.addEventListener("keydown", (event) => {
    if (!grid.MOVES[event.key]) return;
    event.preventDefault();
    move(event.key);
  });
  box.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.move) move(button.dataset.move);
    else if (button || event.target === box) box.close();
  });
  box.addEventListener("close", () => grid.focus(shown));
})();
