// Bytes by source over time: areas on each other for what containers and stores got, a line for what came ahead.
const SOURCES = [
  { key: "fromRegistries", name: "from registries", colour: "--registries" },
  { key: "fromPeers", name: "from peers", colour: "--peers" },
  { key: "fromOtherLayers", name: "from other layers", colour: "--layers" },
  { key: "readAtOnce", name: "here already", colour: "--disk" },
];
const AHEAD = { key: "ahead", name: "of these, fetched ahead", colour: "--ahead" };
const chart = { window: "24h", hidden: new Set(), at: -1, isTable: false, queued: false };
const MARGIN = { left: 66, right: 8, top: 8, bottom: 22 };

const rateText = (bytes) => `${bytesText(bytes)}/s`;

const niceStep = (largest) => {
  const power = 10 ** Math.floor(Math.log10(Math.max(largest, 1) / 3));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => largest / step <= 4) ?? 10 * power;
};

const pointText = (at) => {
  const { beginsAt, stepSeconds, bytes } = known.traffic;
  const parts = [...SOURCES, AHEAD].map((source) => `${source.name} ${bytesText(bytes[source.key][at])}`);
  return `${timeText(beginsAt + at * stepSeconds * 1000)}: ${parts.join(", ")}`;
};

const drawChart = () => {
  chart.queued = false;
  const place = byId("chart");
  const [width, height] = [place.clientWidth, place.clientHeight];
  if (!known.traffic || width === 0) {
    return;
  }
  const { beginsAt, stepSeconds, bytes } = known.traffic;
  const sources = SOURCES.filter((source) => !chart.hidden.has(source.key));
  const count = bytes.ahead.length;
  const rate = (key, at) => bytes[key][at] / stepSeconds;
  const stacked = Array.from({ length: count }, (_, at) => sources.reduce((sum, source) => sum + rate(source.key, at), 0));
  const isAhead = !chart.hidden.has(AHEAD.key);
  const largest = Math.max(1, ...stacked, ...(isAhead ? bytes.ahead.map((_, at) => rate("ahead", at)) : []));
  const step = niceStep(largest);
  const top = Math.ceil(largest / step) * step;
  const x = (at) => MARGIN.left + (at / Math.max(1, count - 1)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => height - MARGIN.bottom - (value / top) * (height - MARGIN.top - MARGIN.bottom);
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (let value = 0; value <= top + step / 2; value += step) {
    picture.append(
      drawn("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      drawn("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, rateText(value)),
    );
  }
  const ticks = width < 420 ? 3 : 6;
  for (let tick = 0; tick <= ticks; tick += 1) {
    const at = Math.round((tick * (count - 1)) / ticks);
    const anchor = tick === 0 ? "start" : tick === ticks ? "end" : "middle";
    picture.append(drawn("text", { x: x(at), y: height - 5, "text-anchor": anchor }, timeText(beginsAt + at * stepSeconds * 1000)));
  }
  let floor = new Array(count).fill(0);
  for (const source of sources) {
    const ceiling = floor.map((value, at) => value + rate(source.key, at));
    const points = [...ceiling.map((value, at) => `${x(at)},${y(value)}`), ...floor.map((value, at) => `${x(at)},${y(value)}`).reverse()];
    picture.append(drawn("polygon", { points: points.join(" "), fill: `var(${source.colour})` }));
    floor = ceiling;
  }
  if (isAhead) {
    const points = bytes.ahead.map((_, at) => `${x(at)},${y(rate("ahead", at))}`).join(" ");
    picture.append(drawn("polyline", { points, fill: "none", stroke: `var(${AHEAD.colour})`, "stroke-width": 1.5, "stroke-dasharray": "4 3" }));
  }
  if (chart.at >= 0 && chart.at < count) {
    picture.append(drawn("line", { x1: x(chart.at), x2: x(chart.at), y1: MARGIN.top, y2: height - MARGIN.bottom, stroke: "var(--text)" }));
  }
  place.replaceChildren(picture);
};

const redrawChart = () => {
  if (!chart.queued) {
    chart.queued = true;
    requestAnimationFrame(drawChart);
  }
};

const fillChartTable = () => {
  if (!known.traffic || !chart.isTable) {
    return;
  }
  const { beginsAt, stepSeconds, bytes } = known.traffic;
  const columns = [...SOURCES, AHEAD];
  byId("chart-head").replaceChildren(element("tr", {}, element("th", {}, "From"), ...columns.map((source) => element("th", { class: "number" }, source.name))));
  const rows = bytes.ahead.map((_, at) => element("tr", {},
    element("td", { class: "short" }, timeText(beginsAt + at * stepSeconds * 1000)),
    ...columns.map((source) => element("td", { class: "number" }, bytesText(bytes[source.key][at])))));
  byId("chart-rows").replaceChildren(...rows.reverse());
};

const fillChart = () => {
  if (known.traffic && chart.at < 0) {
    const total = (key) => known.traffic.bytes[key].reduce((sum, value) => sum + value, 0);
    const parts = SOURCES.map((source) => `${source.name} ${bytesText(total(source.key))}`);
    say("chart-readout", `In ${known.traffic.window.replace("h", " h")}: ${parts.join(", ")}`);
  }
  redrawChart();
  fillChartTable();
};

const lookAt = (at) => {
  chart.at = Math.max(0, Math.min(known.traffic.bytes.ahead.length - 1, at));
  say("chart-readout", pointText(chart.at));
  redrawChart();
};

const startChart = (reload) => {
  const place = byId("chart");
  for (const source of [...SOURCES, AHEAD]) {
    const box = element("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      chart.hidden[box.checked ? "delete" : "add"](source.key);
      redrawChart();
    });
    const sample = source === AHEAD
      ? drawn("line", { x1: 0, x2: "100%", y1: "50%", y2: "50%", stroke: `var(${source.colour})`, "stroke-width": 2, "stroke-dasharray": "4 3" })
      : drawn("rect", { width: "100%", height: "100%", rx: 2, fill: `var(${source.colour})` });
    byId("chart-legend").append(element("label", {}, box, drawn("svg", { "aria-hidden": "true" }, sample), source.name));
  }
  for (const button of document.querySelectorAll("[data-window]")) {
    button.addEventListener("click", () => {
      document.querySelectorAll("[data-window]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      [chart.window, chart.at] = [button.dataset.window, -1];
      reload();
    });
  }
  byId("chart-table").addEventListener("click", () => {
    chart.isTable = !chart.isTable;
    byId("chart-table").setAttribute("aria-pressed", String(chart.isTable));
    [byId("chart").hidden, byId("chart-figures").hidden] = [chart.isTable, !chart.isTable];
    fillChart();
  });
  place.addEventListener("pointermove", (event) => {
    if (known.traffic) {
      const box = place.getBoundingClientRect();
      const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
      lookAt(Math.round(share * (known.traffic.bytes.ahead.length - 1)));
    }
  });
  place.addEventListener("pointerleave", () => {
    chart.at = -1;
    fillChart();
  });
  place.addEventListener("keydown", (event) => {
    const last = known.traffic ? known.traffic.bytes.ahead.length - 1 : -1;
    const to = { ArrowLeft: (chart.at < 0 ? last + 1 : chart.at) - 1, ArrowRight: chart.at + 1, Home: 0, End: last }[event.key];
    if (last >= 0 && to !== undefined) {
      lookAt(to);
      event.preventDefault();
    }
  });
  new ResizeObserver(redrawChart).observe(place);
};
