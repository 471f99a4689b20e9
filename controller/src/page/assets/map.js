// The map: a canvas as large as its place, which draws the part of all cells that is scrolled to. Where several cells
// meet in one pixel it shows their mean.
const map = {
  place: byId("map"), extent: byId("extent"), canvas: byId("map").querySelector("canvas"),
  zoom: 0, node: -1, image: -1, palette: null, queued: false, hover: null,
};
const GUTTER = 118;
const STRIP = 7;
const CELL_MAX = 26;
const LABEL_EVERY = 15;

const readPalette = () => {
  const [absent, low, high, full] = ["absent", "low", "high", "full"].map((name) => rgb(`--heat-${name}`));
  const colours = new Uint8ClampedArray(256 * 4);
  for (let value = 0; value < 256; value += 1) {
    const share = Math.min(value, 99) / 99;
    const colour = value === ABSENT ? absent : value >= 100 ? full : low.map((from, at) => from + (high[at] - from) * share);
    colours.set([...colour, 255], value * 4);
  }
  map.palette = new Uint32Array(colours.buffer);
  const scale = byId("scale");
  [scale.width, scale.height] = [100, 1];
  const image = new ImageData(100, 1);
  new Uint32Array(image.data.buffer).set(map.palette.subarray(0, 100));
  scale.getContext("2d").putImageData(image, 0, 0);
};

// How large the place is, and how large a cell.
const geometry = () => {
  const width = map.place.clientWidth;
  const height = map.place.clientHeight;
  const columns = Math.max(1, shown.columns.length);
  const rows = Math.max(1, shown.rows.length);
  const fitted = (length, count) => Math.min(CELL_MAX, length / count);
  const zoomed = (fit) => (map.zoom === 0 ? fit : Math.max(fit, Math.min(CELL_MAX, Math.max(fit, 0.5) * 2 ** map.zoom)));
  const cellWidth = zoomed(fitted(width - GUTTER, columns));
  const cellHeight = zoomed(fitted(height - STRIP, rows));
  return { width, height, columns: shown.columns.length, rows: shown.rows.length, cellWidth, cellHeight };
};

// One value for each of `width` x `height` places: a cell, or the mean of those that meet there.
const reduced = (left, top, width, height, stepX, stepY) => {
  const values = new Uint8Array(width * height);
  const clip = (value, end) => Math.min(Math.floor(value), end);
  for (let y = 0; y < height; y += 1) {
    const fromRow = clip(top + y * stepY, shown.rows.length - 1);
    const toRow = Math.max(fromRow + 1, clip(top + (y + 1) * stepY, shown.rows.length));
    for (let x = 0; x < width; x += 1) {
      const fromColumn = clip(left + x * stepX, shown.columns.length - 1);
      const toColumn = Math.max(fromColumn + 1, clip(left + (x + 1) * stepX, shown.columns.length));
      let [sum, present, count] = [0, 0, 0];
      for (let row = fromRow; row < toRow; row += 1) {
        const base = shown.rows[row] * known.map.images;
        for (let column = fromColumn; column < toColumn; column += 1) {
          const value = shown.columns[column] < known.map.images ? known.map.cells[base + shown.columns[column]] : ABSENT;
          count += 1;
          if (value !== ABSENT) {
            present += 1;
            sum += value;
          }
        }
      }
      values[y * width + x] = present === 0 ? ABSENT : Math.round(sum / count);
    }
  }
  return values;
};

const drawCells = (context, size, scrollX, scrollY) => {
  const { width, height, columns, rows, cellWidth, cellHeight } = size;
  const left = Math.floor(scrollX / cellWidth);
  const top = Math.floor(scrollY / cellHeight);
  const right = Math.min(columns, Math.ceil((scrollX + width - GUTTER) / cellWidth));
  const bottom = Math.min(rows, Math.ceil((scrollY + height - STRIP) / cellHeight));
  const across = cellWidth < 1 ? Math.max(1, Math.round((right - left) * cellWidth)) : right - left;
  const down = cellHeight < 1 ? Math.max(1, Math.round((bottom - top) * cellHeight)) : bottom - top;
  const values = reduced(left, top, across, down, (right - left) / across, (bottom - top) / down);
  const image = new ImageData(across, down);
  const pixels = new Uint32Array(image.data.buffer);
  values.forEach((value, at) => { pixels[at] = map.palette[value]; });
  const aside = new OffscreenCanvas(across, down);
  aside.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  const [x, y] = [GUTTER + left * cellWidth - scrollX, STRIP + top * cellHeight - scrollY];
  context.save();
  context.beginPath();
  context.rect(GUTTER, STRIP, width, height);
  context.clip();
  context.drawImage(aside, x, y, (right - left) * cellWidth, (bottom - top) * cellHeight);
  context.fillStyle = styleOf("--panel");
  if (cellWidth >= 6) {
    for (let column = left; column <= right; column += 1) {
      context.fillRect(Math.round(x + (column - left) * cellWidth) - 1, y, 1, (bottom - top) * cellHeight);
    }
  }
  if (cellHeight >= 6) {
    for (let row = top; row <= bottom; row += 1) {
      context.fillRect(x, Math.round(y + (row - top) * cellHeight) - 1, (right - left) * cellWidth, 1);
    }
  }
  context.restore();
  for (let column = left; column < right; column += 1) {
    const from = GUTTER + column * cellWidth - scrollX;
    const until = Math.min(width, from + Math.max(1, cellWidth - (cellWidth >= 6 ? 1 : 0)));
    if (until > GUTTER) {
      context.fillStyle = styleOfPhase(known.images[shown.columns[column]]?.phase);
      context.fillRect(Math.max(GUTTER, from), 0, until - Math.max(GUTTER, from), STRIP - 2);
    }
  }
};

let phaseColours = {};
const styleOfPhase = (phase) => {
  phaseColours[phase] ??= styleOf(`--${(phase ?? "Pending").toLowerCase()}`);
  return phaseColours[phase];
};

const drawLabels = (context, size, scrollY) => {
  const { height, rows, cellHeight } = size;
  const every = Math.max(1, Math.ceil(LABEL_EVERY / cellHeight));
  const first = Math.ceil(Math.floor(scrollY / cellHeight) / every) * every;
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "right";
  const chosen = shown.rows.indexOf(map.node);
  const middleOf = (row) => Math.max(STRIP + 5, STRIP + (row + 0.5) * cellHeight - scrollY);
  const write = (row, colour) => {
    context.fillStyle = styleOf(colour);
    context.fillText(shorter(context, known.nodes[shown.rows[row]].name), GUTTER - 8, middleOf(row));
  };
  const isFar = (row) => chosen < 0 || Math.abs(middleOf(row) - middleOf(chosen)) >= LABEL_EVERY - 1;
  for (let row = first; row < rows; row += every) {
    const middle = STRIP + (row + 0.5) * cellHeight - scrollY;
    if (middle > height - 4) {
      break;
    }
    if (middle >= STRIP && isFar(row)) {
      write(row, "--dim");
    }
  }
  if (chosen >= 0 && chosen * cellHeight >= scrollY - cellHeight && STRIP + (chosen + 0.5) * cellHeight - scrollY <= height) {
    write(chosen, "--text");
  }
};

const shorter = (context, text) => {
  if (context.measureText(text).width <= GUTTER - 14) {
    return text;
  }
  let length = Math.min(text.length, 40);
  while (length > 1 && context.measureText(`\u2026${text.slice(-length)}`).width > GUTTER - 14) {
    length -= 1;
  }
  return `\u2026${text.slice(-length)}`;
};

const drawChoice = (context, size, scrollX, scrollY) => {
  const row = shown.rows.indexOf(map.node);
  const column = shown.columns.indexOf(map.image);
  if (row < 0 || column < 0) {
    return;
  }
  const { width, height, cellWidth, cellHeight } = size;
  const x = GUTTER + column * cellWidth - scrollX;
  const y = STRIP + row * cellHeight - scrollY;
  context.save();
  context.beginPath();
  context.rect(GUTTER, 0, width, height);
  context.clip();
  context.fillStyle = styleOf("--text");
  context.globalAlpha = 0.35;
  context.fillRect(GUTTER, Math.round(y + cellHeight / 2), width, 1);
  context.fillRect(Math.round(x + cellWidth / 2), 0, 1, height);
  context.globalAlpha = 1;
  const [wide, high] = [Math.max(9, cellWidth + 2), Math.max(9, cellHeight + 2)];
  context.lineWidth = 2;
  context.strokeStyle = styleOf("--panel");
  const box = [Math.round(x + (cellWidth - wide) / 2), Math.round(y + (cellHeight - high) / 2), Math.round(wide), Math.round(high)];
  context.strokeRect(box[0] - 1.5, box[1] - 1.5, box[2] + 3, box[3] + 3);
  context.strokeStyle = styleOf("--text");
  context.strokeRect(...box);
  context.restore();
};

const drawMap = () => {
  map.queued = false;
  const size = geometry();
  const { width, height, columns, rows, cellWidth, cellHeight } = size;
  const ratio = window.devicePixelRatio || 1;
  const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
  if (map.canvas.width !== pixels[0] || map.canvas.height !== pixels[1]) {
    [map.canvas.width, map.canvas.height] = pixels;
    [map.canvas.style.width, map.canvas.style.height] = [`${width}px`, `${height}px`];
  }
  const over = (needed, there) => `${needed > there + 1 ? Math.round(needed) : 1}px`;
  map.extent.style.width = over(GUTTER + columns * cellWidth, width);
  map.extent.style.height = over(STRIP + rows * cellHeight, height);
  const context = map.canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  if (!known.map || columns === 0 || rows === 0) {
    context.fillStyle = styleOf("--dim");
    context.font = "14px system-ui, 'DejaVu Sans', sans-serif";
    context.textAlign = "center";
    const text = !known.map ? "Loading" : known.nodes.length === 0 ? "No node has reported yet" : known.images.length === 0 ? "No policy wants an image yet" : "Nothing is left by the filters";
    context.fillText(text, width / 2, height / 2);
    return;
  }
  const [scrollX, scrollY] = [map.place.scrollLeft, map.place.scrollTop];
  drawCells(context, size, scrollX, scrollY);
  drawLabels(context, size, scrollY);
  drawChoice(context, size, scrollX, scrollY);
  if (!map.isMarked) {
    map.isMarked = true;
    performance.mark("map-drawn");
  }
};

const redrawMap = () => {
  if (!map.queued) {
    map.queued = true;
    requestAnimationFrame(drawMap);
  }
};

const tellCell = (node, image) => {
  const text = `${known.nodes[node].name}, ${imageName(known.images[image])}: ${cellText(cellOf(node, image))}`;
  say("readout", text);
};

// Chooses a cell by the numbers of its node and image, and scrolls to it.
const choose = (node, image) => {
  [map.node, map.image] = [node, image];
  const { width, height, cellWidth, cellHeight } = geometry();
  const x = shown.columns.indexOf(image) * cellWidth;
  const y = shown.rows.indexOf(node) * cellHeight;
  const into = (from, room, at, length) => (at < from ? at : at + length > from + room ? at + length - room : from);
  if (x >= 0 && y >= 0) {
    map.place.scrollLeft = into(map.place.scrollLeft, width - GUTTER, x, cellWidth);
    map.place.scrollTop = into(map.place.scrollTop, height - STRIP, y, cellHeight);
    tellCell(node, image);
  }
  redrawMap();
  fillDetail();
};

const zoomTo = (zoom) => {
  const before = geometry();
  const centre = [(map.place.scrollLeft + (before.width - GUTTER) / 2) / before.cellWidth, (map.place.scrollTop + (before.height - STRIP) / 2) / before.cellHeight];
  map.zoom = Math.max(0, Math.min(6, zoom));
  drawMap();
  const after = geometry();
  const chosen = [shown.columns.indexOf(map.image), shown.rows.indexOf(map.node)];
  const [x, y] = chosen[0] >= 0 && chosen[1] >= 0 ? chosen : centre;
  map.place.scrollLeft = x * after.cellWidth - (after.width - GUTTER) / 2;
  map.place.scrollTop = y * after.cellHeight - (after.height - STRIP) / 2;
  [byId("zoom-out").disabled, byId("zoom-fit").disabled] = [map.zoom === 0, map.zoom === 0];
  byId("zoom-in").disabled = map.zoom === 6 || (after.cellWidth >= CELL_MAX && after.cellHeight >= CELL_MAX);
  drawMap();
};

const cellAt = (event) => {
  const { columns, rows, cellWidth, cellHeight } = geometry();
  const box = map.place.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - map.place.clientLeft - GUTTER + map.place.scrollLeft) / cellWidth);
  const row = Math.floor((event.clientY - box.top - map.place.clientTop - STRIP + map.place.scrollTop) / cellHeight);
  const isInside = known.map && column >= 0 && row >= 0 && column < columns && row < rows;
  return isInside ? [shown.rows[row], shown.columns[column]] : null;
};

const moveBy = (rows, columns) => {
  if (!known.map || shown.rows.length === 0 || shown.columns.length === 0) {
    return;
  }
  const within = (value, count) => Math.max(0, Math.min(count - 1, value));
  const row = Math.max(0, shown.rows.indexOf(map.node));
  const column = Math.max(0, shown.columns.indexOf(map.image));
  choose(shown.rows[within(row + rows, shown.rows.length)], shown.columns[within(column + columns, shown.columns.length)]);
};

const MOVES = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -Infinity], End: [0, Infinity],
};

const startMap = () => {
  map.place.addEventListener("scroll", redrawMap, { passive: true });
  map.place.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) {
      choose(...cell);
    }
  });
  map.place.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) {
      tellCell(...cell);
    }
  });
  map.place.addEventListener("pointerleave", () => {
    if (map.node >= 0 && map.image >= 0) {
      tellCell(map.node, map.image);
    }
  });
  map.place.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey) {
      return;
    }
    const move = event.ctrlKey ? { Home: [-Infinity, -Infinity], End: [Infinity, Infinity] }[event.key] : MOVES[event.key];
    if (move) {
      moveBy(...move);
    } else if (event.key === "+" || event.key === "-") {
      zoomTo(map.zoom + (event.key === "+" ? 1 : -1));
    } else {
      return;
    }
    event.preventDefault();
  });
  byId("zoom-in").addEventListener("click", () => zoomTo(map.zoom + 1));
  byId("zoom-out").addEventListener("click", () => zoomTo(map.zoom - 1));
  byId("zoom-fit").addEventListener("click", () => zoomTo(0));
  byId("zoom-out").disabled = true;
  byId("zoom-fit").disabled = true;
  new ResizeObserver(redrawMap).observe(map.place);
};
