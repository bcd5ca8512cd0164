/* The table of clusters: the slider cuts the tree, and rows are filtered and sorted, with their galleries.
 *
 * Rows of single clusters are in the page; rows of unions are created here, as text.
 */
"use strict";

(() => {
  const { data, number, plural } = report;
  const { clusters, charts: { tree } } = data;
  const k = clusters.length;
  const MOST_COLORS = 10;
  const MOST_LINKS = 6;
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const slider = document.getElementById("cut");
  const filter = document.getElementById("filter");
  const least = document.getElementById("least");
  const rows = new Map([...body.rows].map((row) => [Number(row.dataset.cluster), row]));
  const cards = new Map([...document.querySelectorAll("[data-card]")].map((card) => [Number(card.dataset.card), card]));
  const words = clusters.map(({ name, words }, id) => [String(id), name, ...words].join("\n").toLowerCase());
  let groups = [];
  let sorted = { column: 2, down: true };

  /** The clusters at the cut with `left` clusters, the largest first. */
  const groupsAt = (left) => {
    const found = new Map(clusters.map(({ size }, id) => [id, { ids: [id], size, bits: null, color: null }]));
    for (const [at, kept, merged, bits] of tree) {
      if (at < left) break;
      const [a, b] = [found.get(kept), found.get(merged)];
      found.set(kept, { ids: [...a.ids, ...b.ids], size: a.size + b.size, bits, color: null });
      found.delete(merged);
    }
    const ordered = [...found.values()].sort((a, b) => b.size - a.size || a.ids[0] - b.ids[0]);
    for (const group of ordered) group.ids.sort((a, b) => clusters[b].size - clusters[a].size || a - b);
    ordered.filter(({ ids }) => ids.length > 1).slice(0, MOST_COLORS).forEach((group, i) => (group.color = i));
    return ordered;
  };

  const element = (tag, className, ...content) => {
    const made = document.createElement(tag);
    made.className = className;
    made.append(...content);
    return made;
  };

  const link = (id) => {
    const name = element("bdi", "", clusters[id].name);
    if (!clusters[id].linked) return name;
    const made = element("a", "", name);
    made.href = `#cluster-${id}`;
    return made;
  };

  /** The row of a union: its largest clusters and its sums. */
  const union = (group) => {
    const row = document.createElement("tr");
    const dot = element("span", "dot");
    dot.style.background = `var(--${group.color === null ? "quiet" : `c${group.color}`})`;
    const shown = group.ids.slice(0, MOST_LINKS);
    const name = element("th", "long", dot);
    name.scope = "row";
    shown.forEach((id, i) => name.append(i ? ", " : "", link(id)));
    if (group.ids.length > shown.length) name.append(` and ${group.ids.length - shown.length} more`);
    const ids = shown.slice(0, 3).join("+") + (group.ids.length > 3 ? "+…" : "");
    row.append(
      element("td", "n", ids),
      name,
      element("td", "n", number(group.size)),
      element("td", "n", `${number((100 * group.size) / data.samples, 1)} %`),
      element("td", "n", number(group.bits / Math.max(1, group.size), 1)),
      ...heads.slice(5).map((_, i) => element("td", "long soft", i ? "" : plural(group.ids.length, "cluster"))),
    );
    return row;
  };

  /** The sort key of a row in a column: its number, if it starts with one. */
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const found = heads[column].classList.contains("n") ? parseFloat(text.replaceAll(",", "")) : NaN;
    return Number.isNaN(found) ? text.toLowerCase() : found;
  };

  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en"));

  const fill = () => {
    const wanted = filter.value.trim().toLowerCase();
    const few = Number(least.value) || 0;
    const shown = groups.filter(({ ids, size }) => size >= few && ids.some((id) => words[id].includes(wanted)));
    const found = shown.map((group, i) => {
      const row = group.ids.length === 1 ? rows.get(group.ids[0]) : union(group);
      return { row, key: value(row, sorted.column), i };
    });
    found.sort((a, b) => (sorted.down ? compare(b.key, a.key) : compare(a.key, b.key)) || a.i - b.i);
    body.replaceChildren(...found.map(({ row }) => row));
    const there = new Set(shown.flatMap(({ ids }) => ids));
    for (const [id, card] of cards) card.hidden = !there.has(id);
    const what = groups.length === k ? plural(k, "cluster") : `${plural(groups.length, "union")} of ${plural(k, "cluster")}`;
    document.getElementById("shown").textContent = shown.length === groups.length ? what : `${number(shown.length)} of ${what}`;
  };

  const cutAt = (left) => {
    groups = groupsAt(left);
    const text = plural(left, "cluster");
    document.getElementById("cut-text").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    report.show(groups, left);
    fill();
  };

  heads.forEach((head, column) => {
    if ("fixed" in head.dataset) return;
    const button = element("button", "", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = sorted.column === column ? !sorted.down : head.classList.contains("n") && column > 0;
      sorted = { column, down };
      mark();
      fill();
    });
  });
  const mark = () =>
    heads.forEach((head, column) => {
      if (column === sorted.column) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });

  let waiting = 0;
  slider.addEventListener("input", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => cutAt(Number(slider.value)));
  });
  for (const input of [filter, least]) input.addEventListener("input", fill);
  // show a filtered card when a link leads to it
  document.addEventListener("click", ({ target }) => {
    const id = target.closest?.('a[href^="#cluster-"]')?.getAttribute("href").slice("#cluster-".length);
    if (id !== undefined && cards.has(Number(id))) cards.get(Number(id)).hidden = false;
  });

  report.cutAt = (left) => {
    slider.value = left;
    cutAt(left);
  };
  report.goto = (id) => {
    if (!cards.has(id)) return;
    cards.get(id).hidden = false;
    location.hash = `cluster-${id}`;
  };
  mark();
  cutAt(Number(slider.value));
})();
