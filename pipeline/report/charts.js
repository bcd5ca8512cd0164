/* The charts of the page, by Apache ECharts, from the JSON that the page holds.
 *
 * Names of clusters are untrusted: they are inserted as text (tooltips are elements, never strings
 * of HTML) or drawn on a canvas. Colours come from page.css, and are read again when the theme
 * changes. A chart is drawn when it comes near the window.
 */
"use strict";

const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { charts: given, clusters } = data;
  const k = clusters.length;
  const MOST_NAMES = 40; // on the map
  const reduced = matchMedia("(prefers-reduced-motion: reduce)");
  const drawn = new Map(); // name -> { chart, option }
  let groups = clusters.map((cluster, id) => ({ ids: [id], size: cluster.size, color: null }));
  let cut = k;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const number = (value, digits = 0) =>
    value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
  const short = (text, most) => ([...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text);
  const plural = (count, what) => `${number(count)} ${what}${count === 1 ? "" : "s"}`;
  const color = (group) => css(group.color === null ? (cut === k ? "accent" : "quiet") : `c${group.color}`);

  /** A tooltip: a heading and lines, as text. */
  const tip = (title, ...lines) => {
    const box = document.createElement("div");
    const head = box.appendChild(document.createElement("b"));
    box.className = "tip";
    head.textContent = title;
    for (const line of lines) box.appendChild(document.createElement("div")).textContent = line;
    return box;
  };

  const named = (group, most = 3) => {
    const names = group.ids.slice(0, most).map((id) => clusters[id].name);
    const more = group.ids.length - names.length;
    return names.join(", ") + (more ? ` and ${more} more` : "");
  };

  const about = (group) =>
    tip(
      named(group, 5),
      group.ids.length === 1 ? `cluster ${group.ids[0]}` : `${group.ids.length} clusters`,
      `${plural(group.size, "sample")}, ${number((100 * group.size) / data.samples, 1)} %`,
    );

  // -- what all charts share ----------------------------------------------------------------

  const text = (size = 12) => ({ color: css("soft"), fontSize: size, fontFamily: getComputedStyle(document.body).fontFamily });
  const base = (more) => ({
    animation: !reduced.matches,
    animationDuration: 300,
    animationDurationUpdate: 250,
    textStyle: text(),
    grid: { left: 12, right: 18, top: 40, bottom: 34, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
    ...more,
    tooltip: {
      confine: true,
      backgroundColor: css("paper"),
      borderColor: css("control"),
      textStyle: { ...text(), color: css("ink") },
      ...(more.tooltip || {}),
    },
  });
  const axis = (more) => ({
    type: "value",
    nameLocation: "middle",
    nameGap: 26,
    nameTextStyle: text(),
    splitLine: { show: false },
    axisTick: { show: false },
    ...more,
    axisLine: { show: true, onZero: false, lineStyle: { color: css("line") }, ...(more.axisLine || {}) },
    axisLabel: { ...text(), hideOverlap: true, ...(more.axisLabel || {}) },
  });
  const upright = (name, more = {}) =>
    axis({ name, nameLocation: "end", nameGap: 14, nameTextStyle: { ...text(), align: "left", padding: [0, 0, 0, -24] }, scale: true,
      axisLine: { show: false }, splitLine: { show: true, lineStyle: { color: css("line") } }, ...more });
  const line = (name, points, shade, more = {}) => ({
    name, type: "line", data: points, symbol: "none", lineStyle: { width: 2, color: shade }, itemStyle: { color: shade }, ...more,
  });
  const legend = (names) => ({ data: names, right: 8, top: 0, icon: "roundRect", itemWidth: 14, itemHeight: 4, textStyle: text() });
  const series = (rows, unit) => (found) =>
    tip(`${unit} ${number(found[0].value[0])}`, ...found.filter((p) => rows.includes(p.seriesName)).map((p) => `${p.seriesName}: ${number(p.value[1], 3)}`));
  const powers = (last) => {
    const found = [];
    for (let power = 1; power <= last; power *= 10) for (const step of [1, 2, 5]) if (step * power <= last) found.push(step * power);
    return found;
  };

  // -- coding length ------------------------------------------------------------------------

  const curve = () => {
    const { ks, bits, low, high, k: chosen, flat_from, flat_to } = given.curve;
    const saving = bits[0] - Math.min(...bits);
    const floor = Math.min(...low) - 0.05 * saving;
    // values above those of one cluster are cut off
    const ceiling = Math.min(Math.max(...bits, ...high), bits[0] + 0.1 * saving) + 0.02 * saving;
    const at = ks.indexOf(chosen);
    const ticks = powers(ks[ks.length - 1]);
    const zip = (values) => ks.map((each, i) => [each, values[i]]);
    const band = { stack: "band", symbol: "none", lineStyle: { opacity: 0 }, silent: true, type: "line", tooltip: { show: false } };
    return base({
      tooltip: { trigger: "axis", formatter: ([point]) => {
        const i = ks.indexOf(point.value[0]);
        return tip(plural(ks[i], "cluster"), `${number(bits[i], 2)} bits per sample`, `90 % of resamples: ${number(low[i], 2)} to ${number(high[i], 2)}`);
      } },
      xAxis: axis({ type: "log", name: "clusters, k", min: 1, max: ks[ks.length - 1], axisLabel: { customValues: ticks, formatter: (v) => number(v) } }),
      yAxis: upright("bits per sample", saving > 0 ? { min: floor, max: ceiling, axisLabel: { showMinLabel: false, showMaxLabel: false, formatter: (v) => number(v, saving < 5 ? 1 : 0) } } : {}),
      series: [
        line("bits", zip(bits), css("accent"), {
          z: 3,
          markArea: { silent: true, itemStyle: { color: css("green"), opacity: 0.13 }, label: { color: css("green"), position: "insideTop", fontSize: 12 },
            data: [[{ name: `equally good: ${flat_from}${flat_to > flat_from ? ` to ${flat_to}` : ""}`, xAxis: flat_from }, { xAxis: flat_to }]] },
          markPoint: at < 0 ? undefined : { symbol: "circle", symbolSize: 12, itemStyle: { color: css("warm") }, label: { show: true, position: "top", distance: 8, color: css("warm"), fontWeight: 600, formatter: `k = ${chosen}` },
            data: [{ coord: [chosen, bits[at]] }] },
        }),
        { ...band, data: zip(low) },
        { ...band, data: ks.map((each, i) => [each, high[i] - low[i]]), areaStyle: { color: css("accent"), opacity: 0.16 } },
      ],
    });
  };

  // -- tree and map -------------------------------------------------------------------------

  /** The points of every merge, [x, y] of its two parts and of itself, and the order of the leaves. */
  const shape = (() => {
    const children = new Map(); // cluster -> its merges, in order
    for (const merge of given.tree) children.set(merge[1], [...(children.get(merge[1]) || []), merge]);
    const order = [];
    const walk = (top) => { // without recursion: a chain may be as deep as there are clusters
      const open = [[top, (children.get(top) || []).length]];
      while (open.length) {
        const [leaf, left] = open.pop();
        if (!left) { order.push(leaf); continue; }
        open.push([children.get(leaf)[left - 1][2], (children.get(children.get(leaf)[left - 1][2]) || []).length], [leaf, left - 1]);
      }
    };
    if (k) walk(given.tree.length ? given.tree[given.tree.length - 1][1] : 0);
    const place = new Map(order.map((leaf, y) => [leaf, [k, y]]));
    const lines = given.tree.map(([left, kept, merged]) => {
      const [a, b] = [place.get(kept), place.get(merged)];
      const middle = (a[1] + b[1]) / 2;
      place.set(kept, [left, middle]);
      return [[a[0], a[1]], [left, a[1]], [left, b[1]], [b[0], b[1]]];
    });
    return { order, lines };
  })();

  /** Leaves whose names fit into the visible part of the tree. */
  const leaves = () => {
    const chart = drawn.get("tree");
    const { start = 0, end = 100 } = chart.getOption()?.dataZoom?.[0] ?? {};
    const every = Math.max(1, Math.ceil((k * (end - start) * 17) / 100 / (chart.getHeight() - 56)));
    return shape.order.map((_, y) => y).filter((y) => y % every === 0);
  };

  const tree = () => {
    const inside = new Map(); // a cluster -> its group at the cut
    for (const group of groups) for (const id of group.ids) inside.set(id, group);
    const position = new Map(shape.order.map((leaf, y) => [leaf, y]));
    const middle = new Map(shape.order.map((leaf, y) => [leaf, y])); // y of the group of each cluster at the cut
    given.tree.forEach(([left, kept], i) => { if (left >= cut) middle.set(kept, (shape.lines[i][1][1] + shape.lines[i][2][1]) / 2); });
    const narrow = document.getElementById("plot-tree").clientWidth < 500;
    return base({
      grid: { left: narrow ? 92 : 150, right: 20, top: 12, bottom: 44 },
      tooltip: { trigger: "item" },
      dataZoom: [{ type: "inside", id: "zoom", yAxisIndex: 0, zoomOnMouseWheel: "ctrl", moveOnMouseWheel: "shift", filterMode: "none", minValueSpan: Math.min(4, k) }],
      xAxis: axis({ type: "log", inverse: true, min: 1, max: k, name: "clusters left", axisLabel: { customValues: [...new Set([...powers(k), k])], formatter: (v) => number(v) } }),
      yAxis: axis({ inverse: true, min: -0.6, max: k - 0.4, axisLine: { show: false },
        axisLabel: { customValues: leaves(), margin: 12, color: css("ink"), formatter: (y) => short(clusters[shape.order[Math.round(y)]]?.name ?? "", narrow ? 12 : 20) } }),
      series: [
        {
          type: "lines", coordinateSystem: "cartesian2d", polyline: true, clip: true, animation: false,
          data: shape.lines.map((coords, i) => {
            const [left, kept, merged, , lost] = given.tree[i];
            const own = inside.get(kept);
            return { coords, merge: [left, kept, merged, lost], lineStyle: left >= cut ? { color: color(own), width: 1.8, opacity: 1 } : { color: css("control"), width: 1, opacity: 0.75 } };
          }),
          tooltip: { formatter: ({ data: { merge: [left, kept, merged, lost] } }) =>
            tip(`${clusters[kept].name} + ${clusters[merged].name}`, `merged at ${plural(left, "cluster")}`, `${number(lost)} bits lost`) },
        },
        {
          type: "scatter", animation: false, z: 4, clip: true,
          data: groups.map((group) => ({ value: [cut, middle.get(Math.min(...group.ids)) ?? position.get(group.ids[0])], group, itemStyle: { color: color(group) },
            symbolSize: Math.max(5, Math.min(22, 60 * Math.sqrt(group.size / data.samples))) })),
          tooltip: { formatter: (point) => about(point.data.group) },
          markLine: { silent: true, symbol: "none", label: { show: false }, lineStyle: { color: css("warm"), width: 1.5, type: "dashed" }, data: [{ xAxis: cut }], animation: false },
        },
      ],
    });
  };

  const map = () => {
    const points = [];
    for (const group of groups)
      for (const id of group.ids)
        points.push({ value: given.map[id], id, group, symbolSize: Math.max(6, Math.min(70, 150 * Math.sqrt(clusters[id].size / data.samples))), itemStyle: { color: color(group) } });
    points.sort((a, b) => clusters[b.id].size - clusters[a.id].size || a.id - b.id);
    for (const point of points.slice(MOST_NAMES)) point.label = { show: false };
    const wheel = { type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, filterMode: "none" };
    const bare = { type: "value", show: false, scale: true, boundaryGap: ["14%", "14%"] };
    return base({
      grid: { left: 6, right: 6, top: 6, bottom: 6 },
      dataZoom: [{ ...wheel, id: "zoom", xAxisIndex: 0 }, { ...wheel, id: "zoom-y", yAxisIndex: 0 }],
      xAxis: bare,
      yAxis: bare,
      series: [{
        type: "scatter", data: points, itemStyle: { opacity: 0.72, borderColor: css("paper"), borderWidth: 1 },
        label: { show: true, position: "top", distance: 3, formatter: (point) => short(clusters[point.data.id].name, 18), minMargin: 5, color: css("ink"), fontSize: 11.5, textBorderColor: css("paper"), textBorderWidth: 2 },
        labelLayout: { hideOverlap: true },
        emphasis: { focus: "none", itemStyle: { opacity: 1 } },
        tooltip: { formatter: ({ data: { id, group } }) =>
          tip(clusters[id].name, `cluster ${id}, ${plural(clusters[id].size, "sample")}`, ...(group.ids.length > 1 ? [`with ${named({ ids: group.ids.filter((other) => other !== id) })}`] : [])) },
      }],
    });
  };

  // -- features before and after training ---------------------------------------------------

  const heat = (when) => () => {
    const owners = given.heat.clusters;
    const count = owners.length;
    const percent = Uint8Array.from(atob(given.heat[when]), (c) => c.charCodeAt(0));
    const cells = Array.from(percent, (value, i) => [i % count, Math.floor(i / count), value / 100]);
    const hidden = { type: "category", show: false, data: owners.map((_, i) => i) };
    return base({
      animation: false,
      grid: { left: 0, right: 0, top: 4, bottom: 4 },
      tooltip: { formatter: ({ value: [a, b, cosine] }) => tip(`|cosine| ${number(cosine, 2)}`, ...new Set([clusters[owners[a]].name, clusters[owners[b]].name])) },
      xAxis: hidden,
      yAxis: { ...hidden, inverse: true },
      visualMap: { show: false, min: 0, max: 1, dimension: 2, inRange: { color: [css("paper"), css("wash"), css("accent"), css("ink")] } },
      series: [{ type: "heatmap", data: cells, progressive: 4000, emphasis: { disabled: true } }],
    });
  };

  const spectra = (when) => () => {
    const lines = Object.entries(given.spectra[when]);
    const named = (id) => (id === "" ? "all samples" : clusters[id].name);
    return base({
      animation: false,
      tooltip: { trigger: "axis", formatter: (found) => tip(`singular value ${found[0].value[0]}`, ...found.slice(0, 8).map((p) => `${named(p.seriesName)}: ${number(p.value[1], 3)}`)) },
      xAxis: axis({ name: "singular value", min: 1, max: Math.max(...lines.map(([, values]) => values.length)), minInterval: 1, axisLabel: { showMaxLabel: false } }),
      yAxis: upright("share of the largest", { min: 0, max: 1 }),
      series: lines.map(([id, values]) => {
        const all = id === "";
        return line(id, values.map((value, i) => [i + 1, value]), css(all ? "ink" : "accent"), { z: all ? 3 : 2, lineStyle: { width: all ? 3 : 1.2, opacity: all ? 1 : 0.6, color: css(all ? "ink" : "accent") } });
      }),
    });
  };

  const training = () => {
    const { step } = given.training;
    const names = { expansion: ["expansion R", "accent"], compression: ["compression R_c", "green"], loss: ["loss", "violet"] };
    const titles = Object.values(names).map(([title]) => title);
    return base({
      legend: legend(titles),
      tooltip: { trigger: "axis", formatter: series(titles, "step") },
      xAxis: axis({ name: "step", max: "dataMax", axisLabel: { formatter: (v) => number(v) } }),
      yAxis: upright("nats"),
      series: Object.entries(names).map(([key, [title, shade]]) => line(title, step.map((each, i) => [each, given.training[key][i]]), css(shade))),
    });
  };

  const validations = () => {
    const { step, information, kept } = given.validations;
    return base({
      tooltip: { trigger: "axis", formatter: series(["information"], "step") },
      xAxis: axis({ name: "step", max: "dataMax", axisLabel: { formatter: (v) => number(v) } }),
      yAxis: upright("nats"),
      series: [line("information", step.map((each, i) => [each, information[i]]), css("violet"), {
        symbol: "circle", symbolSize: 8,
        markLine: { silent: true, symbol: "none", lineStyle: { color: css("warm"), type: "dashed" }, label: { color: css("warm"), formatter: `kept: step ${number(kept)}`, position: "insideEndTop", rotate: 0, align: kept > step[step.length - 1] / 2 ? "right" : "left", distance: 6 }, data: [{ xAxis: kept }] },
      })],
    });
  };

  // -- true classes ------------------------------------------------------------------

  const confusion = () => {
    const { classes, clusters: shown, counts } = given.confusion;
    const totals = shown.map((_, x) => counts.reduce((sum, row) => sum + row[x], 0));
    const cells = [];
    counts.forEach((row, y) => row.forEach((count, x) => cells.push([x, y, count / Math.max(1, totals[x]), count])));
    const narrow = document.getElementById("plot-confusion").clientWidth < 500;
    const edge = { axisLine: { show: false }, splitArea: { show: false } };
    return base({
      animation: false,
      grid: { left: narrow ? 96 : 160, right: 4, top: 8, bottom: 88 },
      tooltip: { formatter: ({ value: [x, y, share, count] }) => tip(`${classes[y]} in ${clusters[shown[x]].name}`, `${plural(count, "sample")}, ${number(100 * share, 1)} % of those shown of cluster ${shown[x]}`) },
      xAxis: axis({ ...edge, type: "category", data: shown.map((id) => clusters[id].name), axisLabel: { rotate: 60, formatter: (name) => short(name, 13) } }),
      yAxis: axis({ ...edge, type: "category", inverse: true, data: classes, axisLabel: { formatter: (name) => short(name, narrow ? 13 : 22) } }),
      visualMap: { show: false, min: 0, max: 1, dimension: 2, inRange: { color: [css("paper"), css("wash"), css("accent"), css("ink")] } },
      series: [{ type: "heatmap", data: cells, itemStyle: { borderColor: css("line"), borderWidth: 0.5 }, emphasis: { disabled: true } }],
    });
  };

  const confidence = () => {
    const tenths = given.confidence;
    const bars = ["right", "mean confidence"];
    return base({
      legend: legend(bars),
      tooltip: { trigger: "axis", formatter: ([{ dataIndex: i }]) => tip(`tenth ${i + 1}`, plural(tenths[i].samples, "sample"), `right: ${number(100 * tenths[i].right, 1)} %`, `mean confidence: ${number(100 * tenths[i].confidence, 1)} %`) },
      xAxis: axis({ type: "category", name: "tenths of the samples, least confident first", data: tenths.map((_, i) => i + 1) }),
      yAxis: upright("%", { min: 0, max: 100 }),
      series: [
        { name: bars[0], type: "bar", data: tenths.map((tenth) => 100 * tenth.right), itemStyle: { color: css("accent"), borderRadius: [3, 3, 0, 0] }, barCategoryGap: "28%" },
        line(bars[1], tenths.map((tenth) => 100 * tenth.confidence), css("warm"), { symbol: "circle", symbolSize: 6 }),
      ],
    });
  };

  // -- drawing ------------------------------------------------------------------------------

  const options = {
    curve, tree, map, training, validations, confusion, confidence,
    "heat-before": heat("before"), "heat-after": heat("after"),
    "spectra-before": spectra("before"), "spectra-after": spectra("after"),
  };
  const draw = (name, whole = true) => {
    const known = drawn.get(name);
    if (known) known.setOption(options[name](), whole);
  };
  const begin = (place) => {
    const name = place.id.slice("plot-".length);
    const chart = echarts.init(place, null, { renderer: "canvas" });
    drawn.set(name, chart);
    draw(name);
    let width = place.clientWidth;
    new ResizeObserver(() => {
      chart.resize();
      if ((width < 500) !== (place.clientWidth < 500)) draw(name);
      width = place.clientWidth;
    }).observe(place);
    if (name === "map") chart.on("click", ({ data: { id } }) => report.goto(id));
    if (name === "tree") {
      chart.on("click", ({ data: { merge } }) => merge && report.cutAt(merge[0]));
      chart.on("datazoom", () => chart.setOption({ yAxis: { axisLabel: { customValues: leaves() } } }));
    }
  };

  document.documentElement.classList.add("on");
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries)
        if (isIntersecting) {
          seen.unobserve(target);
          begin(target);
        }
    },
    { rootMargin: "400px" },
  );
  for (const place of document.querySelectorAll(".plot")) seen.observe(place);
  const redraw = () => [...drawn.keys()].forEach((name) => draw(name));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  reduced.addEventListener("change", redraw);

  for (const button of document.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => {
      const chart = drawn.get(button.dataset.zoom);
      for (const { id, start, end } of chart ? chart.getOption().dataZoom : []) {
        const half = Math.min(50, ((end - start) / 2) * Number(button.dataset.by));
        const middle = Math.max(half, Math.min(100 - half, (start + end) / 2));
        chart.dispatchAction({ type: "dataZoom", dataZoomId: id, start: middle - half, end: middle + half });
      }
    });

  return {
    data, number, plural,
    /** Show these groups of clusters, from the cut of the tree at `at`. */
    show(found, at) {
      groups = found;
      cut = at;
      for (const name of ["tree", "map"]) draw(name, false);
    },
  };
})();
