// The picture, the timeline of moments, and the map from above.

export class Picture {
  constructor(canvas, shown) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.shown = shown;
    this.generation = 0;
    this.newest = 0;
    this.times = [];
  }

  resize(width, height) {
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
  }

  // Pictures of other generations are thrown away from now on.
  expect(generation) {
    if (generation && generation % 65536 !== this.generation) {
      this.generation = generation % 65536;
      this.newest = 0;
    }
  }

  async take(header, jpeg) {
    const bitmap = await createImageBitmap(jpeg);
    const later = (header.generation - this.generation + 65536) % 65536;
    if (later && later < 32768) this.expect(header.generation);
    // decoding is not in order: an older picture does not replace a newer one
    if (header.generation === this.generation && header.number > this.newest) {
      this.newest = header.number;
      this.context.drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
      this.times.push(performance.now());
      this.shown(header);
    }
    bitmap.close();
  }

  rate() {
    const since = performance.now() - 3000;
    this.times = this.times.filter((time) => time > since);
    return this.times.length / 3;
  }
}

const WIDE = 60;
const HIGH = 48;

export class Timeline {
  constructor(element, go) {
    this.element = element;
    this.go = go;
    this.nodes = new Map();
    this.urls = new Map();
    this.rows = new Map();
    this.selected = 0;
    element.addEventListener("keydown", (event) => this.key(event));
  }

  clear() {
    for (const url of this.urls.values()) URL.revokeObjectURL(url);
    this.nodes.clear();
    this.urls.clear();
    this.rows.clear();
    this.element.replaceChildren();
    this.selected = 0;
  }

  add(node) {
    if (!this.rows.has(node.branch)) this.rows.set(node.branch, this.rows.size);
    const row = this.rows.get(node.branch);
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = -1;
    button.id = `node-${node.node}`;
    button.dataset.node = node.node;
    button.setAttribute("role", "option");
    button.setAttribute("aria-label", `Moment ${node.depth}${row ? `, branch ${row}` : ""}`);
    button.title = `moment ${node.depth} · ${node.keys || "no key"} · ${node.prompt}`;
    button.style.left = `${4 + node.depth * WIDE}px`;
    button.style.top = `${4 + row * HIGH}px`;
    button.onclick = () => this.go(node.node, true);
    if (this.urls.has(node.node)) button.style.backgroundImage = `url(${this.urls.get(node.node)})`;
    node.button = button;
    this.nodes.set(node.node, node);
    const parent = this.nodes.get(node.parent);
    if (parent && parent !== node && parent.branch !== node.branch) {
      const fork = document.createElement("i");
      fork.className = "fork";
      const top = this.rows.get(parent.branch) * HIGH + 46;
      fork.style.left = `${node.depth * WIDE - 2}px`;
      fork.style.top = `${top}px`;
      fork.style.height = `${row * HIGH + 24 - top}px`;
      this.element.append(fork);
    }
    this.element.append(button);
    if (node.parent === this.selected && node.depth > 0) this.select(node.node);
    else this.mark();
  }

  thumbnail(number, jpeg) {
    const url = URL.createObjectURL(jpeg);
    const old = this.urls.get(number);
    if (old) URL.revokeObjectURL(old);
    this.urls.set(number, url);
    const node = this.nodes.get(number);
    if (node) node.button.style.backgroundImage = `url(${url})`;
  }

  select(number) {
    const old = this.nodes.get(this.selected);
    const node = this.nodes.get(number);
    if (!node) return;
    this.selected = number;
    old?.button.setAttribute("aria-selected", "false");
    node.button.setAttribute("aria-selected", "true");
    this.element.setAttribute("aria-activedescendant", node.button.id);
    // a step along the same branch changes one moment, all else the whole way
    if (node.parent === old?.node && node.branch === old.branch) node.button.classList.add("way");
    else this.mark();
    const left = node.button.offsetLeft - this.element.clientWidth * 0.75;
    const top = node.button.offsetTop - this.element.clientHeight + HIGH + 4;
    this.element.scrollTo({ left: Math.max(0, left), top: Math.max(0, top) });
  }

  mark() {
    const way = new Set(this.way());
    for (const node of this.nodes.values()) node.button.classList.toggle("way", way.has(node.node));
  }

  way() {
    const found = [];
    let node = this.nodes.get(this.selected);
    while (node) {
      found.push(node.node);
      node = node.node ? this.nodes.get(node.parent) : null;
    }
    return found;
  }

  above(chunks) {
    const way = this.way();
    return way.length ? way[Math.min(chunks, way.length - 1)] : null;
  }

  key(event) {
    const node = this.nodes.get(this.selected);
    if (!node) return;
    let next = null;
    if (event.key === "ArrowLeft") next = node.parent;
    if (event.key === "Home") next = 0;
    if (event.key === "ArrowRight") {
      next = [...this.nodes.values()].find((other) => other.node && other.parent === node.node)?.node;
    }
    if (next === null || next === undefined || next === node.node) return;
    event.preventDefault();
    this.go(next);
  }

  redraw() {}
}

export class Map2 {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.changed = changed;
    this.step = 0.025;
    this.isDrawing = false;
    this.points = [];
    this.clear();
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.isDrawing) return;
      canvas.setPointerCapture(event.pointerId);
      this.points = [];
      this.addPoint(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.isDrawing && canvas.hasPointerCapture(event.pointerId)) this.addPoint(event);
    });
    canvas.addEventListener("pointerup", () => this.changed());
  }

  clear() {
    this.nodes = new Map();
    this.selected = 0;
    this.here = { x: 0, z: 0, heading: 0 };
    this.redraw();
  }

  add(node) {
    const [x, z, heading] = node.place;
    this.nodes.set(node.node, { x, z, heading, parent: node.parent, number: node.node });
    if (node.parent === this.selected) this.selected = node.node;
    this.redraw();
  }

  select(number) { this.selected = number; this.redraw(); }

  move(header) { this.here = header; this.redraw(); }

  draw(on) {
    if (on) this.frozen = this.fit();
    this.isDrawing = on;
    this.canvas.classList.toggle("drawing", on);
    this.redraw();
  }

  erase() { this.points = []; this.redraw(); }

  addPoint(event) {
    const box = this.canvas.getBoundingClientRect();
    const { scale, x, z } = this.frozen;
    const px = (event.clientX - box.left) / box.width * this.canvas.width;
    const py = (event.clientY - box.top) / box.height * this.canvas.height;
    const point = [x + (px - this.canvas.width / 2) / scale, z - (py - this.canvas.height / 2) / scale];
    const last = this.points[this.points.length - 1];
    if (last && Math.hypot(point[0] - last[0], point[1] - last[1]) < 2 * this.step) return;
    if (this.points.length < 500) this.points.push(point);
    this.redraw();
    this.changed();
  }

  // Pixels per unit, and the place in the middle; all of the walk is seen.
  fit() {
    const places = [...this.nodes.values(), this.here];
    const xs = places.map((place) => place.x);
    const zs = places.map((place) => place.z);
    const low = [Math.min(...xs), Math.min(...zs)];
    const high = [Math.max(...xs), Math.max(...zs)];
    const { width, height } = this.canvas;
    const scale = Math.min(width / (high[0] - low[0] + 1.6), height / (high[1] - low[1] + 1.6));
    return { scale, x: (low[0] + high[0]) / 2, z: (low[1] + high[1]) / 2 };
  }

  redraw() {
    if (this.isQueued) return;
    this.isQueued = true;
    requestAnimationFrame(() => { this.isQueued = false; this.paint(); });
  }

  paint() {
    const { context, canvas } = this;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const { scale, x, z } = this.isDrawing ? this.frozen : this.fit();
    const at = (place) => [canvas.width / 2 + (place.x - x) * scale, canvas.height / 2 - (place.z - z) * scale];
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = colour("--edge");
    context.lineWidth = 1;
    const unit = scale > 60 ? 0.5 : scale > 12 ? 2 : 10;
    const left = x - canvas.width / 2 / scale;
    const bottom = z - canvas.height / 2 / scale;
    context.beginPath();
    for (let u = Math.ceil(left / unit) * unit; u < left + canvas.width / scale; u += unit) {
      const [px] = at({ x: u, z });
      context.moveTo(px, 0);
      context.lineTo(px, canvas.height);
    }
    for (let v = Math.ceil(bottom / unit) * unit; v < bottom + canvas.height / scale; v += unit) {
      const [, py] = at({ x, z: v });
      context.moveTo(0, py);
      context.lineTo(canvas.width, py);
    }
    context.stroke();
    const way = new Set();
    for (let node = this.nodes.get(this.selected); node; node = node.number ? this.nodes.get(node.parent) : null) {
      way.add(node.number);
    }
    for (const isOnWay of [false, true]) {
      context.strokeStyle = colour(isOnWay ? "--walked" : "--other");
      context.lineWidth = isOnWay ? 5 : 3;
      context.beginPath();
      for (const node of this.nodes.values()) {
        const parent = this.nodes.get(node.parent);
        if (!parent || way.has(node.number) !== isOnWay) continue;
        context.moveTo(...at(parent));
        context.lineTo(...at(node));
      }
      context.stroke();
    }
    if (this.points.length) {
      context.strokeStyle = colour("--drawn");
      context.lineWidth = 4;
      context.setLineDash([8, 8]);
      context.beginPath();
      context.moveTo(...at(this.here));
      for (const [px, pz] of this.points) context.lineTo(...at({ x: px, z: pz }));
      context.stroke();
      context.setLineDash([]);
    }
    const [hx, hy] = at(this.here);
    context.save();
    context.translate(hx, hy);
    context.rotate(this.here.heading);
    context.fillStyle = colour("--ink");
    context.strokeStyle = colour("--map");
    context.lineWidth = 3;
    context.beginPath();
    for (const [px, py] of [[0, -20], [13, 14], [0, 7], [-13, 14]]) context.lineTo(px, py);
    context.closePath();
    context.stroke();
    context.fill();
    context.restore();
  }
}
