"use strict";
(() => {
  const element = (name) => document.getElementById(name);
  const make = (kind, className, words) => {
    const made = document.createElement(kind);
    made.className = className;
    if (words !== undefined) made.textContent = words;
    return made;
  };

  // What is wider than its place says so; what fits does not.
  const hint = () => document.querySelectorAll(".wide").forEach((wide) => {
    const words = wide.previousElementSibling;
    if (words?.classList.contains("hint")) words.hidden = wide.scrollWidth <= wide.clientWidth + 1;
  });
  hint();
  addEventListener("resize", hint);

  // A row of pictures is one stop of the Tab key; the arrow keys, Home and End move within it.
  const shots = (shot) => Array.from(shot.closest(".row").querySelectorAll(".shot"));
  const near = (shot, step) => shots(shot)[shots(shot).indexOf(shot) + step];
  const settle = (shot) => shots(shot).forEach((one) => { one.tabIndex = one === shot ? 0 : -1; });
  document.addEventListener("keydown", (event) => {
    const shot = event.target.closest?.(".shot");
    if (!shot) return;
    const row = shots(shot);
    const next = { ArrowRight: near(shot, 1), ArrowLeft: near(shot, -1), Home: row[0], End: row.at(-1) }[event.key];
    if (next) { settle(next); next.focus(); event.preventDefault(); }
  });

  // The enlarged picture: the thumbnail at once, the original as soon as it is read, if it is still beside the page.
  const viewer = element("viewer");
  let shown = null;
  const crop = async (shot) => {
    const small = shot.querySelector("img");
    if (small) return small.src;
    const { url, row, column, rows, columns } = shot.sheet ?? {};
    if (!url) return "";
    const sheet = new Image();
    sheet.src = url;
    await sheet.decode();
    const canvas = document.createElement("canvas");
    canvas.width = sheet.naturalWidth / columns;
    canvas.height = sheet.naturalHeight / rows;
    canvas.getContext("2d").drawImage(sheet, -column * canvas.width, -row * canvas.height);
    return canvas.toDataURL();
  };
  const view = async (shot) => {
    shown = shot;
    settle(shot);
    const { prompt, model, note, file, part } = shot.dataset;
    element("viewer-prompt").textContent = prompt;
    element("viewer-note").textContent = [model, note].filter((words) => words).join(": ");
    element("viewer-back").disabled = !near(shot, -1);
    element("viewer-on").disabled = !near(shot, 1);
    const link = element("viewer-file");
    link.hidden = !file;
    if (file) link.href = file;
    if (!viewer.open) viewer.showModal();
    const image = new Image();
    image.alt = prompt;
    image.src = await crop(shot);
    if (shown !== shot) return;
    element("viewer-picture").replaceChildren(image);
    if (!file || part) return;
    const original = new Image();
    original.onload = () => { if (shown === shot && viewer.open) image.src = original.src; };
    original.src = file;
  };
  document.addEventListener("click", (event) => {
    const shot = event.target.closest?.(".shot");
    if (shot) view(shot);
    else if (event.target === viewer) viewer.close();
  });
  const step = (by) => { const next = shown && near(shown, by); if (next) view(next); };
  element("viewer-back").addEventListener("click", () => step(-1));
  element("viewer-on").addEventListener("click", () => step(1));
  element("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => { element("viewer-picture").replaceChildren(); shown?.focus(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });

  const grid = element("grid"), source = element("data");
  if (!grid || !source) return;
  const { names, prompts } = JSON.parse(source.textContent);
  const control = (name) => element("filter-" + name);

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
    const holder = element("sheet-" + index);
    if (!holder) return null;
    const bytes = Uint8Array.from(atob(holder.textContent.trim()), (letter) => letter.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: "image/webp" }));
    return { url, rows: Number(holder.dataset.rows), columns: Number(holder.dataset.columns) };
  };
  const share = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0) + "%";
  const button = (item, name, cell, sheet, row, column) => {
    const state = cell.correct === undefined ? "unjudged" : cell.correct ? "right" : "wrong";
    const scored = cell.correct === undefined && cell.score !== undefined ? cell.score.toFixed(3) : state;
    const why = cell.reason ? scored + ": " + cell.reason : scored;
    const shot = make("button", "shot " + state);
    shot.type = "button";
    shot.tabIndex = column === 0 ? 0 : -1;
    shot.setAttribute("aria-label", item.prompt + ", image " + (column + 1) + ", " + why);
    Object.assign(shot.dataset, { prompt: item.prompt, model: names[name] ?? name, note: why });
    if (cell.file) shot.dataset.file = cell.file.split("/").map(encodeURIComponent).join("/");
    if (cell.part) shot.dataset.part = "yes";
    const picture = make("i", "picture");
    if (sheet && row >= 0 && column < sheet.columns) {
      shot.sheet = { ...sheet, row, column };
      picture.style.backgroundImage = `url("${sheet.url}")`;
      picture.style.backgroundSize = `${100 * sheet.columns}% ${100 * sheet.rows}%`;
      picture.style.backgroundPosition = `${share(column, sheet.columns)} ${share(row, sheet.rows)}`;
    }
    shot.append(picture, make("span", "", why));
    return shot;
  };
  const fill = (card) => {
    const index = Number(card.dataset.index), item = prompts[index], sheet = open(index);
    if (sheet) card.dataset.sheet = sheet.url;
    const body = make("div", "body");
    for (const [name, cells] of Object.entries(item.models)) {
      const row = make("div", "row");
      row.setAttribute("role", "group");
      row.setAttribute("aria-label", names[name] ?? name);
      row.append(make("div", "name " + name, names[name] ?? name));
      cells.forEach((cell, column) => row.append(button(item, name, cell, sheet, item.sheet.indexOf(name), column)));
      body.append(row);
    }
    card.append(body);
    card.style.minHeight = "";
  };
  const empty = (card) => {
    const body = card.querySelector(".body");
    if (!body || (viewer.open && card.contains(shown))) return;
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
    card.style.minHeight = 70 + 76 * Object.keys(item.models).length + "px";  // until it is filled
    const note = [item.tag ? item.tag.replaceAll("_", " ") : "", item.held_out ? "held out" : ""];
    card.append(make("h3", "", item.prompt), make("div", "note", note.filter((part) => part).join(", ")));
    return card;
  });
  grid.append(...cards);
  cards.forEach((card) => watcher.observe(card));

  const apply = () => {
    const chosen = (name) => control(name)?.value ?? "";
    const words = chosen("words").trim().toLowerCase();
    let count = 0;
    prompts.forEach((item, index) => {
      const visible = (chosen("suite") === "" || item.suite === chosen("suite"))
        && (chosen("tag") === "" || item.tag === chosen("tag"))
        && (chosen("held") === "" || String(Boolean(item.held_out)) === chosen("held"))
        && item.words.includes(words) && won(item, chosen("won"));
      cards[index].hidden = !visible;
      count += visible ? 1 : 0;
    });
    element("shown").textContent = count + " of " + prompts.length + " prompts";
  };
  for (const name of ["suite", "tag", "held", "won", "words"]) control(name)?.addEventListener("input", apply);
  apply();
})();
