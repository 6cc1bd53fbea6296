"use strict";
(() => {
  const grid = document.getElementById("grid");
  const source = document.getElementById("data");
  if (!grid || !source) return;
  const { names, prompts } = JSON.parse(source.textContent);
  const control = (name) => document.getElementById("filter-" + name);
  const make = (kind, className, words) => {
    const element = document.createElement(kind);
    element.className = className;
    if (words !== undefined) element.textContent = words;
    return element;
  };

  // The mean over a prompt's images: the share of right ones, or the mean score; undefined where nothing was judged.
  const value = (cells) => {
    const scores = (cells || []).map((cell) => cell.score ?? (cell.correct === undefined ? NaN : Number(cell.correct)))
      .filter((score) => !Number.isNaN(score));
    return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : undefined;
  };
  for (const item of prompts) {
    item.words = item.prompt.toLowerCase();
    item.values = Object.fromEntries(Object.entries(item.models).map(([name, cells]) => [name, value(cells)])
      .filter(([, found]) => found !== undefined));
    item.judged = Object.values(item.models).some((cells) => cells.some((cell) => cell.correct !== undefined));
  }

  const won = (item, rule) => {
    if (rule === "") return true;
    const values = Object.values(item.values);
    if (rule === "all") return item.judged && values.length > 0 && values.every((share) => share === 1);
    if (rule === "none") return item.judged && values.length > 0 && values.every((share) => share === 0);
    if (rule === "differ") return new Set(values).size > 1;
    const others = Object.keys(item.values).filter((name) => name !== rule);
    return rule in item.values && others.length > 0 && others.every((name) => item.values[rule] > item.values[name]);
  };

  // A sheet is decoded when its card comes near the view and let go when it leaves: memory does not grow with prompts.
  const open = (index) => {
    const holder = document.getElementById("sheet-" + index);
    if (!holder) return null;
    const bytes = Uint8Array.from(atob(holder.textContent), (letter) => letter.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: "image/webp" }));
    return { url, rows: Number(holder.dataset.rows), columns: Number(holder.dataset.columns) };
  };
  const share = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0) + "%";
  const picture = (sheet, row, column) => {
    const element = make("i", "picture");
    if (sheet && row >= 0 && column < sheet.columns) {
      element.style.backgroundImage = `url("${sheet.url}")`;
      element.style.backgroundSize = `${100 * sheet.columns}% ${100 * sheet.rows}%`;
      element.style.backgroundPosition = `${share(column, sheet.columns)} ${share(row, sheet.rows)}`;
    }
    return element;
  };
  const shot = (cell, sheet, row, column) => {
    const state = cell.correct === undefined ? "unjudged" : cell.correct ? "right" : "wrong";
    const scored = cell.correct === undefined && cell.score !== undefined ? cell.score.toFixed(3) : state;
    const why = cell.reason ? scored + ": " + cell.reason : scored;
    const element = make(cell.file ? "a" : "div", "shot " + state);
    if (cell.file) {
      element.href = cell.file.split("/").map(encodeURIComponent).join("/");
      element.target = "_blank";
    }
    element.tabIndex = 0;
    const image = picture(sheet, row, column);
    image.setAttribute("role", "img");
    image.setAttribute("aria-label", why);
    element.append(image, make("span", "", why));
    return element;
  };
  const fill = (card) => {
    const index = Number(card.dataset.index), item = prompts[index], sheet = open(index);
    if (sheet) card.dataset.sheet = sheet.url;
    const body = make("div", "body");
    for (const [name, cells] of Object.entries(item.models)) {
      const row = make("div", "row");
      row.append(make("div", "name " + name, names[name] ?? name));
      cells.forEach((cell, column) => row.append(shot(cell, sheet, item.sheet.indexOf(name), column)));
      body.append(row);
    }
    card.append(body);
  };
  const empty = (card) => {
    const body = card.querySelector(".body");
    if (!body) return;
    if (card.offsetHeight) card.style.minHeight = card.offsetHeight + "px";  // 0 when a filter hid it
    body.remove();
    if (card.dataset.sheet) URL.revokeObjectURL(card.dataset.sheet);
    delete card.dataset.sheet;
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) empty(entry.target);
      else if (!entry.target.querySelector(".body")) fill(entry.target);
    }
  }, { rootMargin: "600px 0px" });

  const cards = prompts.map((item, index) => {
    const card = make("article", "card");
    card.dataset.index = index;
    card.style.minHeight = 60 + 84 * Object.keys(item.models).length + "px";
    const note = [item.tag ? item.tag.replaceAll("_", " ") : "", item.held_out ? "held out" : ""];
    card.append(make("h3", "", item.prompt), make("div", "note", note.filter((part) => part).join(", ")));
    return card;
  });
  grid.append(...cards);
  cards.forEach((card) => watcher.observe(card));

  const apply = () => {
    const chosen = (name) => control(name)?.value ?? "";
    const words = chosen("words").trim().toLowerCase();
    let shown = 0;
    prompts.forEach((item, index) => {
      const visible = (chosen("suite") === "" || item.suite === chosen("suite"))
        && (chosen("tag") === "" || item.tag === chosen("tag"))
        && (chosen("held") === "" || String(Boolean(item.held_out)) === chosen("held"))
        && item.words.includes(words) && won(item, chosen("won"));
      cards[index].hidden = !visible;
      shown += visible ? 1 : 0;
    });
    document.getElementById("shown").textContent = shown + " of " + prompts.length + " prompts";
  };
  for (const name of ["suite", "tag", "held", "won", "words"]) control(name)?.addEventListener("input", apply);
  apply();
})();
