// Filter and sort the image rows. Works from a file, without any network.
(() => {
  const list = document.getElementById("rows");
  if (!list) return;
  const rows = Array.from(list.children);
  const find = document.getElementById("find");
  const kind = document.getElementById("kind");
  const who = document.getElementById("who");
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  const clear = document.getElementById("clear");

  const has = (row, outcome, model) => JSON.parse(row.dataset[outcome]).includes(model);
  const shows = (row) => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.every((word) => row.dataset.text.includes(word))) return false;
    if (kind.value && row.dataset.kind !== kind.value) return false;
    if (!who.value) return true;
    const [outcome, model] = JSON.parse(who.value);
    return has(row, outcome, model);
  };
  const sort = () => {
    let sorted = rows;
    if (order.value) {
      const [column, sign] = JSON.parse(order.value);
      const gain = new Map(rows.map((row) => [row, sign * JSON.parse(row.dataset.gains)[column]]));
      sorted = rows.slice().sort((a, b) => gain.get(b) - gain.get(a));
    }
    list.append(...sorted);
  };
  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !shows(row);
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  };
  find.addEventListener("input", filter);
  kind.addEventListener("change", filter);
  who.addEventListener("change", filter);
  order.addEventListener("change", sort);
  clear.addEventListener("click", () => {
    find.value = kind.value = who.value = order.value = "";
    sort();
    filter();
    find.focus();
  });
  // A link to a row that the filter hides would lead nowhere.
  window.addEventListener("hashchange", () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.hidden) clear.click();
    if (target) target.scrollIntoView();
  });
  document.querySelector(".controls").hidden = false;
  filter();
})();
