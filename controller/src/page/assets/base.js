// Helpers: elements are made of text only, never of markup, because names of images and nodes are anybody's.
const byId = (id) => document.getElementById(id);

const element = (name, attributes, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key === "on") {
      made.addEventListener("click", value);
    } else if (value !== undefined) {
      made.setAttribute(key, value);
    }
  }
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
};

const drawn = (name, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
};

const say = (id, text) => {
  const place = byId(id);
  if (place.textContent !== text) {
    place.textContent = text;
  }
};

const UNITS = ["B", "KB", "MB", "GB", "TB", "PB", "EB"];
const bytesText = (bytes) => {
  if (bytes === null || bytes === undefined) {
    return "";
  }
  let value = Math.abs(bytes);
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit > 0 && value < 99.5 ? 1 : 0;
  return `${bytes < 0 ? "\u2212" : ""}${value.toFixed(digits)} ${UNITS[unit]}`;
};
const countText = (count) => count.toLocaleString("en");
const timeText = (ms) => new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

const sinceText = (ms) => {
  const seconds = Math.max(0, (Date.now() - ms) / 1000);
  if (seconds < 60) {
    return "now";
  }
  const [value, unit] = seconds < 3600 ? [seconds / 60, "min"] : seconds < 172800 ? [seconds / 3600, "h"] : [seconds / 86400, "d"];
  return `${Math.floor(value)} ${unit}`;
};

const PHASES = { Ready: "\u25cf", Building: "\u25d0", Pending: "\u25cb", Failed: "\u25b2" };
const PHASE_WORDS = { Ready: "Ready", Building: "Building", Pending: "Waiting", Failed: "Failed" };

// What is known: the last answers, and which of their rows are shown in which order.
const known = {
  summary: null, policies: [], policyTotal: 0, images: [], imageOrder: -1, imageTotal: 0, unresolved: [], nodes: [], nodeOrder: -1,
  map: null, traffic: null,
};
const shown = { rows: [], columns: [] };

const ABSENT = 255;
const cellOf = (node, image) => (known.map && image < known.map.images ? known.map.cells[node * known.map.images + image] : ABSENT);
const cellText = (percent) => (percent === ABSENT ? "not there" : percent === 100 ? "complete" : `${percent} %`);
const imageName = (image) => image.names[0] ?? image.manifest;

// The theme's colours as numbers, read again when the theme changes.
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (name) => {
  const text = styleOf(name).replace("#", "");
  const wide = text.length === 3 ? [...text].map((digit) => digit + digit).join("") : text;
  return [0, 2, 4].map((at) => parseInt(wide.slice(at, at + 2), 16));
};
