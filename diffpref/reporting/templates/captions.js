// Filter the sample sheet. Works from a file, without any network.
(() => {
  const rows = Array.from(document.getElementById("rows").children);
  const find = document.getElementById("find");
  const flag = document.getElementById("flag");
  const count = document.getElementById("count");

  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const flags = JSON.parse(row.dataset.flags);
      const wanted = !flag.value || (flag.value === "none" ? !flags.length : flags.includes(flag.value));
      row.hidden = !(wanted && words.every((word) => text.includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  };
  find.addEventListener("input", filter);
  flag.addEventListener("change", filter);
  document.getElementById("clear").addEventListener("click", () => {
    find.value = flag.value = "";
    filter();
    find.focus();
  });
  document.querySelector(".controls").hidden = false;
  filter();
})();
