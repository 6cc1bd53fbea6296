"use strict";
(() => {
  const grid = document.getElementById("grid");
  if (!grid) return;
  const cards = Array.from(grid.children);
  const control = (name) => document.getElementById("filter-" + name);
  const won = (card, rule) => {
    if (rule === "") return true;
    const shares = JSON.parse(card.dataset.shares);
    const values = Object.values(shares);
    if (rule === "all") return values.every((share) => share === 1);
    if (rule === "none") return values.every((share) => share === 0);
    if (rule === "differ") return new Set(values).size > 1;
    const others = Object.keys(shares).filter((name) => name !== rule);
    return rule in shares && others.length > 0 && others.every((name) => shares[rule] > shares[name]);
  };
  const apply = () => {
    const words = control("words").value.trim().toLowerCase();
    let shown = 0;
    for (const card of cards) {
      const tag = control("tag").value, held = control("held").value;
      const visible = (tag === "" || card.dataset.tag === tag) && (held === "" || card.dataset.held === held)
        && card.dataset.prompt.includes(words) && won(card, control("won").value);
      card.hidden = !visible;
      shown += visible ? 1 : 0;
    }
    document.getElementById("shown").textContent = shown + " of " + cards.length + " prompts";
  };
  for (const name of ["tag", "held", "won", "words"]) control(name).addEventListener("input", apply);
  apply();
})();
