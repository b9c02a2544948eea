"use strict";
// What belongs together has one data-site: boxes of the picture, rows of the table, lines of the text.
(() => {
  const marked = [...document.querySelectorAll("[data-site]")];
  const bySite = new Map();
  for (const one of marked) {
    const key = one.dataset.site;
    if (!bySite.has(key)) bySite.set(key, []);
    bySite.get(key).push(one);
  }
  let chosen = null;
  const light = (key, on) => (bySite.get(key) || []).forEach((one) => one.classList.toggle("lit", on));
  const inside = (one, kind) => one.closest(kind) !== null;
  const choose = (key, from) => {
    if (chosen !== null) light(chosen, false);
    chosen = chosen === key ? null : key;
    if (chosen === null) return;
    light(chosen, true);
    // Show its other places: the row for a box, the box for a row or a line.
    const goal = inside(from, "svg") ? "table" : "svg";
    const other = bySite.get(key).find((one) => inside(one, goal));
    if (other) other.scrollIntoView({ block: "center", behavior: "smooth" });
  };
  for (const one of marked) {
    const key = one.dataset.site;
    one.addEventListener("mouseenter", () => light(key, true));
    one.addEventListener("mouseleave", () => key === chosen || light(key, false));
    one.addEventListener("click", () => choose(key, one));
  }
  const field = document.querySelector("input[type=search]");
  const count = document.querySelector("output");
  const rows = [...document.querySelectorAll("tr[data-site], pre.layer span")].map((one) => [one, one.textContent.toLowerCase()]);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = new Set();
    for (const [one, text] of rows) {
      const hit = words.every((word) => text.includes(word));
      one.hidden = !hit;
      if (hit && one.dataset.site) found.add(one.dataset.site);
    }
    for (const one of marked) if (inside(one, "svg")) one.classList.toggle("dim", words.length > 0 && !found.has(one.dataset.site));
    count.textContent = words.length ? found.size + " found" : "";
  });
})();
