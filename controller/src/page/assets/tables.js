// Tables: a page of rows each, made anew when what they show has changed. Whoever has the focus in one keeps it.
const PAGE_ROWS = 50;
const pages = { image: 0, node: 0 };

const fill = (id, rows) => {
  const body = byId(id);
  const focused = body.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  body.replaceChildren(...rows);
  if (focused !== undefined) {
    [...body.querySelectorAll("[data-key]")].find((found) => found.dataset.key === focused)?.focus({ preventScroll: true });
  }
};

const phaseCell = (phase) => element("td", { class: `phase ${phase}` }, `${PHASES[phase]} ${PHASE_WORDS[phase]}`);
const numberCell = (text, extra) => element("td", { class: `number ${extra ?? ""}` }, text);
const emptyRow = (columns, text) => element("tr", {}, element("td", { colspan: columns, class: "dim" }, text));

const page = (which, rows, total) => {
  const last = Math.max(0, Math.ceil(rows.length / PAGE_ROWS) - 1);
  pages[which] = Math.max(0, Math.min(last, pages[which]));
  const from = pages[which] * PAGE_ROWS;
  const until = Math.min(rows.length, from + PAGE_ROWS);
  const of = rows.length === total ? countText(total) : `${countText(rows.length)} of ${countText(total)}`;
  say(`${which}-count`, rows.length === 0 ? `0 of ${countText(total)}` : `${countText(from + 1)}\u2013${countText(until)} of ${of}`);
  byId(`${which}-back`).disabled = pages[which] === 0;
  byId(`${which}-next`).disabled = pages[which] === last;
  return rows.slice(from, until);
};

const fillPolicies = () => {
  say("policy-count", known.policyTotal > known.policies.length ? `${countText(known.policies.length)} of ${countText(known.policyTotal)}` : "");
  const state = (policy) => {
    const wrong = policy.conditions.filter((condition) => (condition.type === "Degraded" && condition.status === "True") || (condition.type === "RegexValid" && condition.status === "False"));
    if (wrong.length > 0) {
      return [element("span", { class: "phase Failed" }, `${PHASES.Failed} ${wrong[0].reason}`), element("span", { class: "sub" }, wrong[0].message)];
    }
    if (policy.paused) {
      return [element("span", { class: "phase Pending" }, `${PHASES.Pending} Paused`)];
    }
    const ready = policy.conditions.find((condition) => condition.type === "Ready");
    const phase = ready?.status === "True" ? "Ready" : "Building";
    return [element("span", { class: `phase ${phase}` }, `${PHASES[phase]} ${ready?.reason ?? "New"}`)];
  };
  const rows = known.policies.map((policy) => {
    const more = policy.regexCount > policy.regexes.length ? `, and ${policy.regexCount - policy.regexes.length} more` : "";
    const seed = policy.seed ? `; ${policy.seed.replicas} seeds, ${policy.seed.mode}` : "";
    return element("tr", {},
      element("td", { class: "text" }, policy.name, element("span", { class: "sub" }, `${policy.regexes.join("  ")}${more}${seed}`)),
      numberCell(countText(policy.ready)), numberCell(countText(policy.building)), numberCell(countText(policy.failed)),
      element("td", { class: "text" }, ...state(policy)));
  });
  fill("policy-rows", rows.length > 0 ? rows : [emptyRow(5, "There is no policy. Nothing is prepared.")]);
};

// How many nodes have all, and some, of each image.
let copies = [];
const countCopies = () => {
  copies = known.images.map(() => [0, 0]);
  if (!known.map) {
    return;
  }
  const { cells, images } = known.map;
  for (let at = 0; at < cells.length; at += 1) {
    const value = cells[at];
    if (value !== ABSENT && value > 0) {
      copies[at % images][value === 100 ? 0 : 1] += 1;
    }
  }
};

const imageRow = (image, number) => {
  const name = imageName(image);
  const more = image.names.length > 1 ? `${image.names.slice(1).join("  ")}` : "";
  const again = image.nextAttemptAt ? `; again at ${timeText(image.nextAttemptAt)}` : "";
  const reason = image.reason ? `${image.reason}: ${image.message}${again}` : "";
  const percent = image.phase === "Building" && image.imageBytes > 0 ? ` ${Math.floor((100 * image.readBytes) / image.imageBytes)} %` : "";
  const facts = [image.platform, image.private ? "private" : "", image.hasProfile ? "profile" : "", image.seeds > 0 ? `${image.seeds} seeds` : "", more];
  const phase = phaseCell(image.phase);
  phase.append(percent);
  const [all, some] = copies[number] ?? [0, 0];
  return element("tr", {}, phase,
    element("td", { class: "text" },
      element("button", { class: "link", "data-key": image.manifest, on: () => chooseImage(number) }, name),
      element("span", { class: "sub" }, facts.filter(Boolean).join(" \u00b7 ")),
      reason && element("span", { class: "sub Failed" }, reason)),
    element("td", { class: "text wide" }, image.policies.join(", ")),
    numberCell(bytesText(image.imageBytes)), numberCell(bytesText(image.indexBytes), "wide"), numberCell(countText(image.attempts), "wide"),
    numberCell(`${countText(all)} / ${countText(some)}`), element("td", { class: "short wide" }, sinceText(image.since)));
};

const unresolvedRow = (name) => element("tr", {}, phaseCell("Failed"),
  element("td", { class: "text" }, name.name, element("span", { class: "sub" }, name.platform), element("span", { class: "sub Failed" }, name.message)),
  element("td", { class: "text wide" }, name.policies.join(", ")),
  numberCell(""), numberCell("", "wide"), numberCell("", "wide"), numberCell(""), element("td", { class: "short wide" }, ""));

const PHASE_ORDER = ["Failed", "Building", "Pending", "Ready"];
const fillImages = () => {
  const phase = byId("phase").value;
  const wanted = byId("filter-images").value.trim().toLowerCase();
  const names = known.unresolved.filter((name) => (phase === "" || phase === "Failed") && name.name.toLowerCase().includes(wanted));
  const numbers = shown.columns.filter((number) => phase === "" || known.images[number].phase === phase);
  numbers.sort((one, other) => PHASE_ORDER.indexOf(known.images[one].phase) - PHASE_ORDER.indexOf(known.images[other].phase));
  const rows = [...names.map((name) => () => unresolvedRow(name)), ...numbers.map((number) => () => imageRow(known.images[number], number))];
  const made = page("image", rows, known.imageTotal + known.unresolved.length).map((row) => row());
  fill("image-rows", made.length > 0 ? made : [emptyRow(8, known.images.length > 0 ? "No image is left by the filters." : "No policy wants an image.")]);
};

const nodeRow = (node, number) => {
  const share = node.storeBudgetBytes ? Math.min(1, node.storeUsedBytes / node.storeBudgetBytes) : null;
  const bar = element("i");
  bar.style.width = `${Math.round((share ?? 0) * 100)}%`;
  const store = node.storeUsedBytes === null ? "" : `${bytesText(node.storeUsedBytes)}${node.storeBudgetBytes ? ` of ${bytesText(node.storeBudgetBytes)}` : ""}`;
  const phase = node.connected ? "Ready" : "Failed";
  const word = node.connected ? "connected" : node.heardAt ? `silent since ${sinceText(node.heardAt)}` : "no daemon";
  const read = node.readAtOnce === null ? "" : bytesText(node.readAtOnce + node.readAfterWaiting);
  return element("tr", {},
    element("td", { class: "text" }, element("button", { class: "link", "data-key": node.name, on: () => chooseNode(number) }, node.name)),
    element("td", { class: "short wide" }, node.zone),
    element("td", { class: "short" }, element("span", { class: `phase ${node.connected ? "Ready" : node.heardAt ? phase : "Pending"}` }, `${node.connected ? PHASES.Ready : node.heardAt ? PHASES.Failed : PHASES.Pending} ${word}`), node.schedulable === false ? element("span", { class: "sub" }, "takes no pods") : null),
    element("td", { class: "short" }, share === null ? null : element("span", { class: "meter", "aria-hidden": "true" }, bar), store),
    numberCell(node.images === null ? "" : `${countText(node.complete)} of ${countText(node.images)}`),
    numberCell(bytesText(node.fromPeers), "wide"), numberCell(bytesText(node.fromRegistries), "wide"), numberCell(read, "wide"),
    element("td", { class: "short wide dim" }, (node.ways ?? []).join(", ")), element("td", { class: "short wide dim" }, node.version ?? ""));
};

const fillNodes = () => {
  const rows = page("node", shown.rows, known.nodes.length).map((number) => nodeRow(known.nodes[number], number));
  fill("node-rows", rows.length > 0 ? rows : [emptyRow(10, known.nodes.length > 0 ? "No node is left by the filters." : "No node has joined.")]);
};

// The map as text: all images of the chosen node, or all nodes for the chosen image.
const DETAIL_MAX = 200;
const detail = { isNode: true };
const fillDetail = () => {
  const isThere = known.map && known.nodes[map.node] && known.images[map.image];
  byId("show-node").setAttribute("aria-pressed", String(detail.isNode));
  byId("show-image").setAttribute("aria-pressed", String(!detail.isNode));
  if (!isThere) {
    say("detail-title", "Nothing is chosen");
    fill("detail-rows", []);
    return;
  }
  say("detail-title", detail.isNode ? known.nodes[map.node].name : imageName(known.images[map.image]));
  byId("detail-head").replaceChildren(element("tr", {}, element("th", {}, detail.isNode ? "Image" : "Node"), element("th", { class: "number" }, "Present")));
  const numbers = detail.isNode ? [...shown.columns] : [...shown.rows];
  const percent = (number) => (detail.isNode ? cellOf(map.node, number) : cellOf(number, map.image));
  const rank = (number) => (percent(number) === ABSENT ? -1 : percent(number));
  numbers.sort((one, other) => rank(other) - rank(one));
  const rows = numbers.slice(0, DETAIL_MAX).map((number) => element("tr", {},
    element("td", { class: "text" }, detail.isNode ? imageName(known.images[number]) : known.nodes[number].name),
    element("td", { class: "number" }, cellText(percent(number)))));
  if (numbers.length > DETAIL_MAX) {
    rows.push(emptyRow(2, `and ${countText(numbers.length - DETAIL_MAX)} more: filter to see them`));
  }
  fill("detail-rows", rows);
};

const show = (isNode) => {
  detail.isNode = isNode;
  fillDetail();
};
const chooseImage = (number) => {
  detail.isNode = false;
  choose(shown.rows.includes(map.node) ? map.node : shown.rows[0] ?? -1, number);
};
const chooseNode = (number) => {
  detail.isNode = true;
  choose(number, shown.columns.includes(map.image) ? map.image : shown.columns[0] ?? -1);
};

const startTables = () => {
  for (const [which, refill] of [["image", fillImages], ["node", fillNodes]]) {
    for (const [name, step] of [["back", -1], ["next", 1]]) {
      byId(`${which}-${name}`).addEventListener("click", () => {
        pages[which] += step;
        refill();
        byId(`${which}-rows`).closest(".scroll").scrollTop = 0;
      });
    }
  }
  byId("phase").addEventListener("change", () => {
    pages.image = 0;
    fillImages();
  });
  byId("show-node").addEventListener("click", () => show(true));
  byId("show-image").addEventListener("click", () => show(false));
};
