// Filter, sort and label the image rows by any metric. Works from a file, without any network.
const grid = (() => {
  const list = document.getElementById("rows");
  const data = JSON.parse(document.getElementById("grid-data").textContent);
  const rows = Array.from(list.children);
  const control = (id) => document.getElementById(id);
  const [find, kind, metric, model, outcome, order] =
    ["find", "kind", "metric", "model", "outcome", "order"].map(control);
  const count = control("count");
  const MINUS = "\u2212";

  const write = (value, about) => {
    const text = about.share ? (100 * value).toFixed(1)
      : about.decimals === null ? String(Number(value.toPrecision(4))) : value.toFixed(about.decimals);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", MINUS);
  };
  const number = (value, about) => (value === null ? "none" : write(value, about) + (about.share ? " %" : ""));
  const change = (value, about) => {
    const text = write(value, about);
    return text.startsWith(MINUS) ? text : `+${text}`;
  };
  const scores = (row) => data.scores[row.dataset.id];
  const difference = (row, cell, column) => {
    const [base, own] = [scores(row)[0][column], scores(row)[cell][column]];
    return cell === 0 || base === null || own === null ? null : own - base;
  };
  // The gain is positive where the model is the better one.
  const result = (row, cell, column) => {
    const value = difference(row, cell, column);
    if (value === null) return { value, gain: null, outcome: "" };
    const gain = data.metrics[column].higher_is_better ? value : -value;
    return { value, gain, outcome: gain > data.epsilon ? "win" : gain < -data.epsilon ? "loss" : "tie" };
  };
  const chip = ({ value, outcome: kindOf }, about) =>
    ({ win: "▲ ", loss: "▼ ", tie: "=" })[kindOf] + (kindOf === "tie" ? "" : change(value, about));

  const label = () => {
    const column = Number(metric.value);
    const about = data.metrics[column];
    for (const row of rows) {
      row.querySelectorAll(".cell").forEach((cell, position) => {
        const value = scores(row)[position][column];
        const found = result(row, position, column);
        cell.querySelector(".score").textContent = value === null ? "" : number(value, about);
        cell.className = `cell ${found.outcome}`;
        const mark = cell.querySelector(".chip");
        mark.className = `chip ${found.outcome}`;
        mark.textContent = found.outcome ? chip(found, about) : "";
      });
    }
  };
  const shows = (row) => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.every((word) => row.dataset.text.includes(word))) return false;
    if (kind.value && row.dataset.kind !== kind.value) return false;
    return !outcome.value || result(row, Number(model.value), Number(metric.value)).outcome === outcome.value;
  };
  const sort = () => {
    let sorted = rows;
    if (order.value) {
      const sign = Number(order.value);
      const key = new Map(rows.map((row) => {
        const { gain } = result(row, Number(model.value), Number(metric.value));
        return [row, gain === null ? -Infinity : sign * gain];
      }));
      sorted = rows.slice().sort((a, b) => key.get(b) - key.get(a) || rows.indexOf(a) - rows.indexOf(b));
    }
    list.append(...sorted);
  };
  const visible = () => Array.from(list.children).filter((row) => !row.hidden);
  const filter = () => {
    for (const row of rows) row.hidden = !shows(row);
    count.textContent = `${visible().length} of ${rows.length} rows shown`;
    reachable(visible()[0]?.querySelector(".zoom"));
  };

  // One image is a tab stop; the arrow keys move among the others.
  let stop = null;
  const reachable = (button) => {
    if (stop) stop.tabIndex = -1;
    stop = button ?? null;
    if (stop) stop.tabIndex = 0;
  };
  const focus = (button) => {
    reachable(button);
    button.focus();
    button.closest(".cell").scrollIntoView({ block: "nearest" });
  };
  const neighbour = (button, right, down) => {
    const row = button.closest("li");
    const cells = Array.from(row.querySelectorAll(".zoom"));
    if (right) return cells[cells.indexOf(button) + right] ?? null;
    const cell = Number(button.dataset.cell);
    const shown = visible();
    for (let at = shown.indexOf(row) + down; at >= 0 && at < shown.length; at += down) {
      const found = shown[at].querySelector(`.zoom[data-cell="${cell}"]`);
      if (found) return found;
    }
    return null;
  };
  const MOVES = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  list.addEventListener("keydown", (event) => {
    const button = event.target.closest(".zoom");
    const move = MOVES[event.key];
    if (!button || !move) return;
    event.preventDefault();
    const next = neighbour(button, ...move);
    if (next) focus(next);
  });
  list.addEventListener("focusin", (event) => {
    const button = event.target.closest(".zoom");
    if (button) reachable(button);
  });

  const update = () => { sort(); filter(); };
  find.addEventListener("input", filter);
  metric.addEventListener("change", () => { label(); update(); });
  for (const select of [kind, model, outcome, order]) select.addEventListener("change", update);
  control("clear").addEventListener("click", () => {
    find.value = kind.value = outcome.value = order.value = "";
    update();
    find.focus();
  });
  // A link to a row that the filter hides would lead nowhere.
  window.addEventListener("hashchange", () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.hidden) control("clear").click();
    if (target) target.scrollIntoView();
  });
  for (const button of list.querySelectorAll(".zoom")) button.disabled = false;
  // Images of the best and worst prompts are those of the rows: the file holds each once.
  for (const image of document.querySelectorAll("img[data-row]")) {
    const row = document.getElementById(`row-${image.dataset.row}`);
    const source = row?.querySelector(`.zoom[data-cell="${image.dataset.cell}"] img`);
    if (source) {
      image.src = source.src;
      image.hidden = false;
    }
  }
  document.querySelector(".controls").hidden = false;
  filter();
  return { data, list, scores, result, number, change, neighbour, focus, MOVES };
})();
