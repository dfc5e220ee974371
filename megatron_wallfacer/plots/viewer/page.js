"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const make = (name, attributes, parent, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const add = (parent, name, text) => {
    const node = document.createElement(name);
    node.textContent = text;
    parent.append(node);
    return node;
  };
  const every = data.passes.flatMap((pass) => pass.steps.map((step, index) => ({ pass, step, index })));
  const MAX_ARROWS = 200, MAX_ROWS = 300, MAX_CELLS = 20000;
  let now = 0, follow = -1, timer = null;

  // The map: nodes in rows, and the ranks of each node in order.
  const RADIUS = 19, PITCH = 64, PAD = 14, HEADING = 22, GAP = 30;
  const nodes = Math.max(...data.nodes) + 1, perNode = data.nodes.filter((node) => node === 0).length;
  const rows = Math.ceil(perNode / data.columns);
  const box = { width: data.columns * PITCH + 2 * PAD, height: rows * PITCH + PAD + HEADING };
  const across = Math.max(1, Math.min(nodes, Math.round(Math.sqrt(nodes * (box.height + GAP) / (box.width + GAP)))));
  const down = Math.ceil(nodes / across);
  const first = data.nodes.map((node, rank) => rank - data.nodes.indexOf(node));
  const corner = (node) => [(node % across) * (box.width + GAP) + 4, Math.floor(node / across) * (box.height + GAP) + 4];
  const place = data.nodes.map((node, rank) => {
    const [left, top] = corner(node);
    return [left + PAD + (first[rank] % data.columns + 0.5) * PITCH,
            top + HEADING + (Math.floor(first[rank] / data.columns) + 0.5) * PITCH];
  });
  const map = at("map"), width = across * (box.width + GAP) - GAP + 8, height = down * (box.height + GAP) - GAP + 8;
  const smallest = 400;  // few ranks do not fill the page
  const extra = Math.max(0, smallest - width) / 2;
  map.setAttribute("viewBox", `${-extra} 0 ${width + 2 * extra} ${height}`);
  const heads = make("defs", {}, map);
  for (const axis of ["head", "team", "kv_team", "ring_outer", "ring_inner", "cp"]) {
    const marker = make("marker", { id: `end-${axis}`, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 9,
      markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" }, heads);
    make("path", { d: "M0 0.5 L8 4 L0 7.5 Z", style: `fill: var(--${axis})` }, marker);
  }
  for (let node = 0; node < nodes; node++) {
    const [x, y] = corner(node);
    make("rect", { class: "node", x, y, width: box.width, height: box.height, rx: 12 }, map);
  }
  for (const axis of data.axes) for (const group of axis.groups) {
    if (!axis.inside) continue;
    make("polyline", { class: "group", points: group.map((rank) => place[rank].join()).join(" "),
      style: `stroke: var(--${axis.axis})` }, map);
  }
  const arrows = make("g", {}, map);
  for (let node = 0; node < nodes; node++) {
    const [x, y] = corner(node);
    make("text", { class: "name", x: x + PAD, y: y + 18, "font-size": 12 }, map, `node ${node}`);
  }
  const circles = place.map(([x, y], rank) => {
    const group = make("g", { "data-rank": rank, style: "cursor: pointer" }, map);
    const circle = make("circle", { class: "rank", cx: x, cy: y, r: RADIUS, fill: data.colours[rank][0] }, group);
    make("text", { x, y: y + 5, "font-size": 14, "font-weight": 600, "text-anchor": "middle",
      style: `fill: ${data.colours[rank][1]}` }, group, rank);
    make("title", {}, group, `rank ${rank}: chunks ${data.chunks[rank].join(" and ")}`);
    group.addEventListener("click", () => { at("follow").value = follow === rank ? -1 : rank; followed(); });
    return circle;
  });

  // The square: queries down, keys to the right.
  const chunks = 2 * data.ranks, side = 480 / chunks, margin = 40;
  const square = at("square");
  square.setAttribute("viewBox", `0 0 ${480 + margin + 4} ${480 + margin + 4}`);
  make("text", { x: margin + 240, y: 12, "font-size": 13, "text-anchor": "middle" }, square, "key chunk");
  make("text", { x: 0, y: 0, "font-size": 13, "text-anchor": "middle", transform: `translate(12 ${margin + 240}) rotate(-90)` },
    square, "query chunk");
  const every2 = Math.ceil(chunks / 16);
  for (let chunk = 0; chunk < chunks; chunk += every2) {
    make("text", { x: margin + (chunk + 0.5) * side, y: margin - 6, "font-size": 10, "text-anchor": "middle" }, square, chunk);
    make("text", { x: margin - 5, y: margin + (chunk + 0.5) * side + 3.5, "font-size": 10, "text-anchor": "end" }, square, chunk);
  }
  make("rect", { class: "frame", x: margin - 1, y: margin - 1, width: 482, height: 482 }, square);
  const stripes = Math.max(1, Math.min(data.heads, Math.floor(MAX_CELLS / (chunks * chunks))));
  const cells = new Map();
  const cell = (q, k, part) => {
    const key = `${q},${k},${part}`;
    if (!cells.has(key)) cells.set(key, make("rect", { class: "cell", "data-q": q, "data-k": k, "data-part": part,
      x: margin + k * side + part * side / stripes, y: margin + q * side, width: side / stripes, height: side }, square));
    return cells.get(key);
  };
  // The rank of each pair, from the tiles: one entry per tile and step.
  const eachPair = (tiles, found) => {
    for (let i = 0; i < tiles.length; i += 8) {
      const [rank, q, k, row, rowEnd, col, colEnd, causal] = tiles.slice(i, i + 8);
      for (let r = row; r < rowEnd; r++) for (let c = col; c < colEnd; c++) {
        if (!causal || c - col <= r - row) found(rank, data.blocks[q][r], data.blocks[k][c]);
      }
    }
  };
  const partOf = (() => {
    const group = data.axes.find((axis) => axis.axis === "head");
    const part = new Array(data.ranks).fill(0);
    if (group) for (const ranks of group.groups) ranks.forEach((rank, index) => { part[rank] = index; });
    return part;
  })();
  for (const { step } of every) eachPair(step.tiles, (rank, q, k) => {
    if (partOf[rank] < stripes) cell(q, k, partOf[rank]);
  });
  let computed = new Map();

  function paint() {
    const { pass, index } = every[now];
    computed = new Map();
    pass.steps.slice(0, index + 1).forEach((step, number) => eachPair(step.tiles, (rank, q, k) => {
      const key = `${q},${k}`;
      if (!computed.has(key)) computed.set(key, []);
      computed.get(key).push({ rank, step: number });
    }));
    for (const node of cells.values()) { node.setAttribute("class", "cell"); node.style.fill = ""; delete node.dataset.rank; }
    for (const [key, works] of computed) for (const work of works) {
      if (partOf[work.rank] >= stripes) continue;
      const node = cells.get(`${key},${partOf[work.rank]}`);
      node.style.fill = data.colours[work.rank][0];
      node.dataset.rank = work.rank;
      const pale = follow >= 0 && work.rank !== follow ? " pale" : "";
      if (work.step === index) square.append(node);  // draw its outline over its neighbours
      node.setAttribute("class", `cell ${work.step === index ? "now" : "before"}${pale}`);
    }
    const pairs = computed.size;
    square.setAttribute("aria-label", `${pairs} pairs of query chunk and key chunk are computed so far`);
  }

  function messages() {
    const found = [];
    for (const transfer of every[now].step.transfers) for (let i = 0; i < transfer.ends.length; i += 3) {
      const [from, to, block] = transfer.ends.slice(i, i + 3);
      found.push({ from, to, axis: transfer.axis, payload: transfer.payload, chunks: data.blocks[block] });
    }
    return found;
  }

  function arrow(from, to, axis) {
    const [x, y] = place[from], [u, v] = place[to], length = Math.hypot(u - x, v - y);
    const bend = Math.min(0.18 * length, 34), [nx, ny] = [(v - y) / length, -(u - x) / length];
    const [mx, my] = [(x + u) / 2 + nx * bend, (y + v) / 2 + ny * bend];
    const cut = (px, py) => { const d = Math.hypot(mx - px, my - py), s = (RADIUS + 3) / d; return [px + (mx - px) * s, py + (my - py) * s]; };
    const [a, b] = [cut(x, y), cut(u, v)], over = data.nodes[from] !== data.nodes[to];
    make("path", { class: over ? "arrow across" : "arrow", d: `M${a} Q${mx},${my} ${b}`, "data-axis": axis,
      style: `stroke: var(--${axis})`, "marker-end": `url(#end-${axis})` }, arrows);
  }

  function draw() {
    const all = messages(), shown = all.filter((m) => follow < 0 || m.from === follow || m.to === follow);
    // Messages with the same sender, receiver and axis share one arrow.
    let lines = [...new Map(shown.map((m) => [`${m.from},${m.to},${m.axis}`, m])).values()];
    const folded = lines.length > MAX_ARROWS;
    if (folded) lines = lines.filter((m) => m.from === 0 || m.to === 0);
    arrows.replaceChildren();
    for (const m of lines) arrow(m.from, m.to, m.axis);
    circles.forEach((circle, rank) => circle.classList.toggle("followed", rank === follow));
    map.setAttribute("aria-label", `${all.length} messages between ${data.ranks} ranks on ${nodes} nodes`);
    at("shown").textContent = `${Math.min(shown.length, MAX_ROWS)} of ${all.length} messages` +
      (folded ? "; arrows are drawn for rank 0 only, because there are too many: select a rank for its arrows" : "");
    at("messages").replaceChildren();
    for (const m of shown.slice(0, MAX_ROWS)) {
      const row = add(at("messages"), "tr", "");
      for (const text of [m.from, m.to, m.axis, m.payload.join(", "), m.chunks.join(", ")]) add(row, "td", text);
    }
  }

  function numbers() {
    const { pass, step, index } = every[now];
    at("where").textContent = `${pass.name[0].toUpperCase()}${pass.name.slice(1)}, step ${index + 1} of ${pass.steps.length}`;
    at("text").textContent = step.text;
    const total = pass.steps[pass.steps.length - 1].sum;
    at("numbers").replaceChildren();
    for (const [name, value] of [
      ["pairs computed", `${computed.size} of ${cells.size / stripes}`],
      ["volume per rank, this step", step.volume],
      ["volume per rank, so far", `${step.sum} of ${total}`],
      ["share between nodes", step.all ? `${Math.round(100 * step.between_nodes / step.all)} %` : "\u2013"],
    ]) {
      const item = add(at("numbers"), "div", "");
      add(item, "dt", name); add(item, "dd", value);
    }
    at("slider").value = now;
    at("slider").setAttribute("aria-valuetext", at("where").textContent);
    for (const [id, off] of [["first", now === 0], ["back", now === 0], ["next", now === every.length - 1], ["last", now === every.length - 1]]) at(id).disabled = off;
  }

  function show(step) {
    now = Math.max(0, Math.min(every.length - 1, step));
    paint(); draw(); numbers();
  }
  function stop() { clearInterval(timer); timer = null; at("play").textContent = "Play"; at("play").setAttribute("aria-label", "Play"); }
  function play() {
    if (timer) return stop();
    if (now === every.length - 1) show(0);
    at("play").textContent = "Pause"; at("play").setAttribute("aria-label", "Pause");
    timer = setInterval(() => { if (now === every.length - 1) stop(); else show(now + 1); }, 1200);
  }
  function followed() { follow = Number(at("follow").value); show(now); }
  function go(step) { stop(); show(step); }

  at("title").textContent = `${data.scheme} on ${data.ranks} ranks`;
  at("subtitle").textContent = `${data.grid}; ${data.causal ? "causal" : "full"} attention; ` +
    `${chunks} chunks, two per rank; volume in units of one Q shard`;
  for (const axis of [...data.axes]) {
    const item = add(at("legend"), "li", "");
    const sign = make("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, item);
    make("line", { x1: 0, x2: 30, y1: 5, y2: 5, "stroke-width": 3, style: `stroke: var(--${axis.axis})`,
      "stroke-dasharray": axis.inside ? "none" : "6 4" }, sign);
    add(item, "span", `${axis.axis} ${axis.size}: ${axis.text}; ${axis.inside ? "within a node" : "between nodes (dashed)"}`);
  }
  add(at("follow"), "option", "all ranks").value = -1;
  for (let rank = 0; rank < data.ranks; rank++) add(at("follow"), "option", `rank ${rank}`).value = rank;
  at("slider").max = every.length - 1;
  at("slider").addEventListener("input", () => go(Number(at("slider").value)));
  at("first").addEventListener("click", () => go(0));
  at("back").addEventListener("click", () => go(now - 1));
  at("next").addEventListener("click", () => go(now + 1));
  at("last").addEventListener("click", () => go(every.length - 1));
  at("play").addEventListener("click", play);
  at("follow").addEventListener("change", followed);
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: every.length - 1 };
    if (event.key in steps) { event.preventDefault(); go(steps[event.key]); }
    if (event.key === " " && event.target === document.body) { event.preventDefault(); play(); }
  });
  const help = data.heads > 1 ? ` Stripes: ${stripes} of ${data.heads} head slices.` : "";
  const idle = `Strong: this step. Pale: earlier steps. Colour: rank, as on the left.${help}`;
  at("cell").textContent = idle;
  square.addEventListener("mousemove", (event) => {
    const { q, k } = event.target.dataset;
    const works = computed.get(`${q},${k}`);
    at("cell").textContent = works ? `Query chunk ${q}, key chunk ${k}: ` +
      works.map((work) => `rank ${work.rank} in step ${work.step + 1}`).join(", ") : idle;
  });
  show(Number(new URLSearchParams(location.hash.slice(1)).get("step") || 0));
})();
