"use strict";
// Turns the numbers on the page into options of the chart library, and keeps the charts in the colours of the page.
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const select = document.getElementById("curve");
  const many = data.groups.length > 60;
  const PRINT_WIDTH = 680; // CSS pixels between the margins of A4 and of Letter

  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const LINES = 6; // that a reader can tell apart
  const series = (i) => colour("c" + (i % LINES));
  const hatch = () => ({ symbol: "rect", dashArrayX: [1, 0], dashArrayY: [2, 4], rotation: -Math.PI / 4, color: colour("page") });

  const short = (given) => {
    const x = +given.toPrecision(3);
    for (const [size, letter] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
      if (Math.abs(x) >= size) return +(x / size).toPrecision(3) + letter;
    }
    return String(x);
  };
  const percent = (x) => +(100 * x).toPrecision(3) + " %";
  const whole = (x) => (x == null ? "–" : Math.round(x).toLocaleString("en"));
  const named = (g) => g.number + " " + (g.name || g.about);

  const axis = (more) => ({
    axisLine: { lineStyle: { color: colour("muted") } },
    axisTick: { lineStyle: { color: colour("muted") } },
    splitLine: { lineStyle: { color: colour("line") } },
    nameTextStyle: { color: colour("muted") },
    ...more,
    axisLabel: { color: colour("muted"), hideOverlap: true, ...(more.axisLabel || {}) },
  });
  const base = (more) => ({
    animation: false,
    aria: { enabled: false }, // the template labels every chart with its numbers or their place
    textStyle: { fontFamily: "system-ui, sans-serif", color: colour("text") },
    tooltip: {
      confine: true, backgroundColor: colour("panel"), borderColor: colour("line"), textStyle: { color: colour("text") },
      extraCssText: "max-width:20rem;white-space:normal", ...(more.tooltip || {}),
    },
    legend: { type: "scroll", top: 0, left: 0, textStyle: { color: colour("text") }, pageIconColor: colour("text"),
      pageIconInactiveColor: colour("line"), pageTextStyle: { color: colour("text") }, ...(more.legend || {}) },
    grid: { left: 8, right: 16, top: 40, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "all", ...(more.grid || {}) },
    ...Object.fromEntries(Object.entries(more).filter(([k]) => !["tooltip", "legend", "grid"].includes(k))),
  });

  const onScreen = () => !root.classList.contains("printing");
  // Bars of at least five pixels at first; on paper all of them.
  const slider = () => {
    const fit = Math.floor(document.querySelector(".chart").clientWidth / 5);
    return { type: "slider", height: 22, bottom: 6, labelFormatter: "", showDataShadow: false, brushSelect: false, startValue: 0,
      endValue: Math.min(fit, data.groups.length) - 1, backgroundColor: colour("panel"), borderColor: colour("muted"),
      fillerColor: colour("line"), handleStyle: { color: colour("page"), borderColor: colour("muted") },
      moveHandleStyle: { color: colour("muted") } };
  };

  // One bar per group: the original behind, what is left in front of it; what stayed whole is hatched.
  const overDepth = (before, after, format, name) => base({
    tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, valueFormatter: format },
    grid: { bottom: many && onScreen() ? 40 : 4 },
    dataZoom: many && onScreen() ? [slider()] : [],
    xAxis: axis({ type: "category", data: data.groups.map(named), name: "group", nameLocation: "middle", nameGap: 24,
      axisLabel: { formatter: (v) => v.split(" ")[0] } }),
    yAxis: axis({ type: "value", name, nameLocation: "end", nameTextStyle: { align: "left", color: colour("muted") }, axisLabel: { formatter: short } }),
    series: [
      { name: "before", type: "bar", barGap: "-100%", barMaxWidth: 72, itemStyle: { color: colour("before") }, data: data.groups.map(before) },
      { name: "after", type: "bar", barMaxWidth: 72, itemStyle: { color: colour("after") }, data: data.groups.map((g) => (g.locked ? null : after(g))) },
      { name: "channels left whole", type: "bar", barMaxWidth: 72, itemStyle: { color: colour("whole"), decal: data.groups.length > 30 ? undefined : hatch() },
        data: data.groups.map((g) => (g.locked ? after(g) : null)) },
    ],
  });

  // The picked group alone, or those with the largest error; they differ in dashes as well as in colour.
  const curves = () => {
    const all = data.groups.filter((g) => g.curve && g.curve.length);
    const worst = [...all].sort((a, b) => b.error - a.error).slice(0, LINES);
    const drawn = all.filter((g) => (select.value ? String(g.number) === select.value : worst.includes(g)));
    const tip = (p) => echarts.format.encodeHTML(p.seriesName === "chosen" ? named(p.data.group) : p.seriesName) +
      "<br>" + p.value[0] + " % kept: " + percent(p.value[1]);
    return base({
      tooltip: { trigger: "item", formatter: tip },
      legend: { data: drawn.map(named) },
      grid: { right: 32, bottom: 4 },
      xAxis: axis({ type: "value", min: 0, max: 100, name: "channels kept (%)", nameLocation: "middle", nameGap: 26 }),
      yAxis: axis({ type: "log", axisLabel: { formatter: percent } }),
      series: [
        ...drawn.map((g, i) => (
          { name: named(g), type: "line", data: g.curve, symbol: "none", triggerLineEvent: true, itemStyle: { color: series(i) },
            lineStyle: { width: 2, color: series(i), type: ["solid", "dashed", "dotted", [10, 3, 2, 3], [14, 4], [2, 5]][i] },
            emphasis: { lineStyle: { width: 3 } },
            endLabel: { show: true, formatter: String(g.number), color: colour("text"), fontWeight: 600 } })),
        { name: "chosen", type: "scatter", symbolSize: 10, z: 5, itemStyle: { borderColor: colour("page"), borderWidth: 1 },
          data: drawn.map((g, i) => [g, i]).filter(([g]) => g.error > 0).map(([g, i]) => (
            { value: [+(100 * g.share).toFixed(1), g.error], group: g, itemStyle: { color: series(i) } })) },
      ],
    });
  };

  const options = {
    widths: () => overDepth((g) => g.channels, (g) => g.kept, whole, ""),
    macs: () => overDepth((g) => g.macs[0], (g) => g.macs[1], (x) => (x == null ? "–" : short(x)), ""),
    errors: curves,
    tested: () => {
      const points = (key) => data.path.steps.map((s) => ({ value: [s.macs, s[key]], step: s }));
      const tip = (p) => short(p.data.step.macs) + " MACs, " + (p.data.step.passed ? "passed" : "failed") + (p.data.step.chosen ? ", returned" : "") +
        "<br>loss " + percent(p.data.step.risk) + ", bound " + percent(p.data.step.bound);
      return base({
        tooltip: { trigger: "item", formatter: tip },
        grid: { right: 32, bottom: 4 },
        xAxis: axis({ type: "value", scale: true, inverse: true, name: "MACs, smaller to the right", nameLocation: "middle", nameGap: 26, axisLabel: { formatter: short } }),
        yAxis: axis({ type: "value", min: 0, axisLabel: { formatter: percent } }),
        series: [["loss", "risk", "after", "circle"], ["bound", "bound", "before", "diamond"]].map(([name, key, tone, symbol], i) => (
          { name, type: "line", symbol, symbolSize: (v, p) => (p.data.step.chosen ? 14 : 8), showAllSymbol: true, itemStyle: { color: colour(tone) },
            lineStyle: { color: colour(tone), type: i ? "dashed" : "solid" }, data: points(key),
            markLine: i ? undefined : { silent: true, symbol: "none", lineStyle: { color: colour("warn"), type: "dashed" },
              label: { formatter: "asked for", position: "insideEndTop", color: colour("warn") }, data: [{ yAxis: data.path.level }] } })),
      });
    },
    refits: () => {
      const points = (key) => data.refits.map((f) => (f[key] > 0 ? f[key] : null));
      return base({
        tooltip: { trigger: "axis", valueFormatter: (x) => (x == null ? "–" : percent(x)) },
        grid: { bottom: 4 },
        xAxis: axis({ type: "category", data: data.refits.map(named), name: "layer", nameLocation: "middle", nameGap: 24,
          axisLabel: { formatter: (v) => v.split(" ")[0] } }),
        yAxis: axis({ type: "log", axisLabel: { formatter: percent } }),
        series: [["before", "before", "circle"], ["after", "after", "diamond"]].map(([name, tone, symbol]) => (
          { name, type: "line", symbol, symbolSize: 8, showSymbol: data.refits.length <= 40, showAllSymbol: true, itemStyle: { color: colour(tone) }, lineStyle: { color: colour(tone) }, data: points(name) })),
      });
    },
    bounds: () => base({
      tooltip: { trigger: "item", formatter: (p) => p.seriesName === undefined || !p.value.length ? "" :
        echarts.format.encodeHTML(p.value[0] + " " + p.value[2]) + "<br>" + echarts.format.encodeHTML(p.seriesName) + ": " + p.value[1] },
      grid: { bottom: 4 },
      xAxis: axis({ type: "value", min: 0, max: data.groups.length + 1, minInterval: 1, name: "group", nameLocation: "middle", nameGap: 24,
        splitLine: { show: false } }),
      yAxis: axis({ type: "log" }),
      series: Object.entries(data.bounds).map(([name, points], i) => ({
        name, type: "scatter", symbol: ["circle", "diamond", "triangle", "rect"][i % 4], symbolSize: 9, itemStyle: { color: series(i) }, data: points,
        markLine: i ? undefined : { silent: true, symbol: "none", lineStyle: { color: colour("warn"), type: "dashed" },
          label: { formatter: "a constant answer", position: "insideEndTop", color: colour("warn") }, data: [{ yAxis: 1 }] },
      })),
    }),
  };

  const charts = [...document.querySelectorAll(".chart")].map((place) => ({
    option: options[place.dataset.chart],
    chart: echarts.init(place, null, { renderer: "svg" }),
  }));
  const draw = (size) => {
    for (const { option, chart } of charts) {
      chart.resize(size);
      chart.setOption(option(), { notMerge: true });
      chart.getZr().flush();
    }
  };
  draw({ width: "auto" });

  if (select) select.addEventListener("change", () => draw({ width: "auto" }));
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (onScreen()) draw({ width: "auto" }); }, 100);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw({ width: "auto" }));

  // Paper is white, has no scroll bars, and nothing on it can be unfolded.
  let folded = [];
  const onPaper = (yes) => {
    if (yes !== onScreen()) return;
    root.classList.toggle("printing", yes);
    if (yes) folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = yes;
    draw({ width: yes ? PRINT_WIDTH : "auto" });
  };
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
  matchMedia("print").addEventListener("change", (e) => onPaper(e.matches));
})();
