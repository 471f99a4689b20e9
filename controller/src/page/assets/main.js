// What is shown of what is known, and asking for what is new: each answer has a tag, so that one who asks again is told
// that nothing has changed.
const POLL_EVERY_MS = 5000;
const POLL_MAX_MS = 60000;
const tags = new Map();

const ask = async (path, kind) => {
  const headers = tags.has(path) ? { "If-None-Match": tags.get(path) } : {};
  const answer = await fetch(`/status/api/v1/${path}`, { headers, cache: "no-store", credentials: "same-origin", redirect: "error" });
  if (answer.status === 304) {
    return null;
  }
  if (!answer.ok) {
    throw Object.assign(new Error(`the controller answered ${answer.status}`), { status: answer.status });
  }
  const body = kind === "bytes" ? await answer.arrayBuffer() : await answer.json();
  tags.set(path, answer.headers.get("ETag"));
  return body;
};

const readMap = (buffer) => {
  const view = new DataView(buffer);
  if (view.getUint32(0) !== 0x484d4150 || view.getUint8(4) !== 1) {
    throw new Error("the map is of another version; load the page again");
  }
  return {
    nodeOrder: Number(view.getBigUint64(8, true)), imageOrder: Number(view.getBigUint64(16, true)),
    nodes: view.getUint32(24, true), images: view.getUint32(28, true), cells: new Uint8Array(buffer, 32),
  };
};

const takeNodes = (answer) => {
  const chosen = known.nodes[map.node]?.name;
  known.nodes = answer.rows.map((row) => Object.fromEntries(answer.columns.map((name, at) => [name, row[at]])));
  known.nodeOrder = answer.order;
  map.node = chosen === undefined ? -1 : known.nodes.findIndex((node) => node.name === chosen);
};

const takeImages = (answer) => {
  const chosen = known.images[map.image]?.manifest;
  [known.images, known.imageOrder, known.imageTotal, known.unresolved] = [answer.images, answer.order, answer.total, answer.unresolved];
  map.image = chosen === undefined ? -1 : known.images.findIndex((image) => image.manifest === chosen);
};

// Which rows and columns are left by the filters, and in which order.
const arrange = () => {
  const wanted = (id) => byId(id).value.trim().toLowerCase();
  const [nodes, images] = [wanted("filter-nodes"), wanted("filter-images")];
  const has = (text, part) => (text ?? "").toLowerCase().includes(part);
  shown.rows = [...known.nodes.keys()].filter((at) => has(known.nodes[at].name, nodes) || has(known.nodes[at].zone, nodes));
  shown.columns = [...known.images.keys()].filter((at) => known.images[at].names.some((name) => has(name, images)) || has(known.images[at].manifest, images));
  const sort = byId("sort").value;
  if (known.map && sort !== "name") {
    const side = sort === "most" ? -1 : 1;
    const sum = (cells) => cells.reduce((total, value) => total + (value === ABSENT ? 0 : value), 0);
    const ofRows = new Map(shown.rows.map((row) => [row, sum(shown.columns.map((column) => cellOf(row, column)))]));
    const ofColumns = new Map(shown.columns.map((column) => [column, sum(shown.rows.map((row) => cellOf(row, column)))]));
    shown.rows.sort((one, other) => side * (ofRows.get(one) - ofRows.get(other)));
    shown.columns.sort((one, other) => side * (ofColumns.get(one) - ofColumns.get(other)));
  }
  say("map-count", known.map ? `${countText(shown.rows.length)} \u00d7 ${countText(shown.columns.length)}` : "");
};

const fillTiles = () => {
  const { images, nodes, policies, traffic, cluster, version, startedAt } = known.summary;
  const total = traffic.total;
  const read = total.readAtOnce + total.readAfterWaiting;
  const failed = images.phases.Failed + images.unresolved;
  say("cluster", `cluster ${cluster} \u00b7 controller ${version} \u00b7 ${countText(policies.total)} ${policies.total === 1 ? "policy" : "policies"}`);
  say("t-ready", countText(images.phases.Ready));
  say("n-ready", `of ${countText(images.total)}, ${countText(images.phases.Building)} building, ${countText(images.phases.Pending)} waiting`);
  say("t-failed", countText(failed));
  byId("t-failed").classList.toggle("Failed", failed > 0);
  say("n-failed", images.unresolved > 0 ? `${countText(images.unresolved)} of them cannot be resolved` : failed > 0 ? "the table of images says why" : "nothing is wrong");
  say("t-nodes", countText(nodes.connected));
  say("n-nodes", `of ${countText(nodes.total)}, stores hold ${bytesText(nodes.storeUsedBytes)}`);
  say("t-copies", countText(nodes.completeCopies));
  say("n-copies", `of ${countText(nodes.copies)} that were begun`);
  say("t-registry", bytesText(total.fromRegistries));
  say("n-registry", `${bytesText(total.registryWire)} compressed; peers ${bytesText(total.fromPeers)}`);
  say("t-saved", bytesText(traffic.registryBytesSaved));
  say("n-saved", `of ${bytesText(read)} read, since ${timeText(startedAt)}`);
};

const isConsistent = () => known.map && known.map.nodeOrder === known.nodeOrder && known.map.imageOrder === known.imageOrder;

// Asks for everything that has changed. Lists and map are of one order, or are asked for once more.
const refresh = async () => {
  const chosen = chart.window;
  const [summary, traffic, policies, images, nodes, cells] = await Promise.all([
    ask("summary"), ask(`traffic?window=${chosen}`), ask("policies"), ask("images"), ask("nodes"), ask("map", "bytes"),
  ]);
  if (traffic && chosen === chart.window) {
    known.traffic = traffic;
    fillChart();
  }
  if (summary) {
    known.summary = summary;
    fillTiles();
  }
  if (policies) {
    [known.policies, known.policyTotal] = [policies.policies, policies.total];
    fillPolicies();
  }
  if (images) {
    takeImages(images);
  }
  if (nodes) {
    takeNodes(nodes);
  }
  if (cells) {
    known.map = readMap(cells);
  }
  if (!isConsistent()) {
    // A node or an image came between two answers.
    return;
  }
  if (images || nodes || cells) {
    arrange();
    countCopies();
    fillAll();
  }
};

const fillAll = () => {
  fillImages();
  fillNodes();
  if ((map.node < 0 || map.image < 0) && shown.rows.length > 0 && shown.columns.length > 0) {
    [map.node, map.image] = [shown.rows[0], shown.columns[0]];
  }
  fillDetail();
  drawMap();
};

const tellState = (text, isWrong) => {
  say("state", text);
  byId("state").classList.toggle("wrong", isWrong);
};

let [timer, failures, isAsking, isHurried] = [0, 0, false, false];
const poll = async () => {
  clearTimeout(timer);
  if (isAsking) {
    isHurried = true;
    return;
  }
  isAsking = true;
  try {
    await refresh();
    failures = 0;
    tellState(`as of ${new Date().toLocaleTimeString([], { hourCycle: "h23" })}`, false);
  } catch (error) {
    failures += 1;
    // What came with the rest was not taken: it has to be said again.
    tags.clear();
    const isOut = error.status === 401 || error.status === 403;
    tellState(isOut ? "Signed out: load the page again" : `Not up to date: ${error.message}`, true);
  }
  isAsking = false;
  if (!document.hidden) {
    const wait = Math.min(POLL_MAX_MS, POLL_EVERY_MS * 2 ** Math.min(failures, 4));
    timer = setTimeout(poll, isHurried ? 0 : isConsistent() || failures > 0 ? wait : 1000);
  }
  isHurried = false;
};

startMap();
startChart(() => {
  // Of this window nothing is kept.
  tags.delete(`traffic?window=${chart.window}`);
  poll();
});
startTables();
readPalette();
drawMap();
let filtering = 0;
for (const id of ["filter-nodes", "filter-images", "sort"]) {
  byId(id).addEventListener("input", () => {
    clearTimeout(filtering);
    filtering = setTimeout(() => {
      pages.image = 0;
      pages.node = 0;
      arrange();
      fillAll();
    }, 120);
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  phaseColours = {};
  readPalette();
  redrawMap();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
poll();
