// The panel's view: draws the snapshot that the kernel sends, once per animation frame, and says what was clicked.
// Rows are kept by key and changed in place, so that focus and screen readers stay where they are.

const SECTIONS = ["transfers", "pending", "jobs", "sessions", "devices", "servers"];
const TITLES = {
  transfers: "Transfers", pending: "Pending", jobs: "Jobs", sessions: "Sessions", devices: "Devices", servers: "Server",
};
const EMPTY = { transfers: "nothing moves", pending: "nothing waits" };
const TONES = {
  ready: "ok", idle: "ok", done: "ok", free: "ok",
  busy: "work", running: "work", sent: "work", copying: "work", parked: "work", queued: "work",
  draining: "warn", unresponsive: "warn", kernel: "warn", cancelled: "warn", unhealthy: "warn", "you wait": "warn",
  lost: "bad", failed: "bad", "no answer": "bad",
};

const SILENT = 13000; // ms: an idle panel hears something every four seconds

function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
}

function span(seconds) {
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function some(count, thing) {
  return `${count} ${thing}${count === 1 ? "" : "s"}`;
}

function milliseconds(value) {
  if (value < 1) return `${(value * 1000).toPrecision(2)} µs`;
  return value < 1000 ? `${value.toPrecision(3)} ms` : span(value / 1000);
}

function make(tag, className, parent) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function attribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// A row of four cells: what it is, how it is, a figure, buttons.
class Row {
  constructor(send) {
    this.send = send;
    this.node = make("li");
    this.main = make("div", "rpcnb-main", this.node);
    this.detail = make("div", "rpcnb-detail", this.node);
    this.figure = make("div", "rpcnb-faint rpcnb-number", this.node);
    this.buttons = make("div", "rpcnb-buttons", this.node);
    this.button = null;
  }

  title(text, hint) {
    put(this.main, text);
    attribute(this.main, "title", hint || text);
  }

  state(word, text) {
    this.dot = this.dot || make("span", "", this.detail);
    this.words = this.words || make("span", "rpcnb-faint", this.detail);
    const tone = `rpcnb-state ${TONES[word] || ""}`;
    if (this.dot.className !== tone) this.dot.className = tone;
    put(this.dot, word);
    put(this.words, text ? ` ${text}` : "");
  }

  bar(share, label) {
    if (!this.track) {
      this.track = make("div", "rpcnb-bar", this.figure);
      this.track.setAttribute("role", "progressbar");
      this.fill = make("div", "", this.track);
      this.under = make("div", "", this.figure);
    }
    const known = share !== null;
    this.node.classList.toggle("rpcnb-unknown", !known);
    attribute(this.track, "aria-label", label);
    if (known) {
      attribute(this.track, "aria-valuenow", String(Math.round(share * 100)));
      this.fill.style.transform = `scaleX(${share.toFixed(4)})`;
    } else {
      this.track.removeAttribute("aria-valuenow");
      this.fill.style.transform = "";
    }
  }

  error(text) {
    this.trouble = this.trouble || make("div", "rpcnb-error", this.detail);
    put(this.trouble, text || "");
  }

  spark(values) {
    if (!this.line) {
      const space = "http://www.w3.org/2000/svg";
      this.svg = document.createElementNS(space, "svg");
      this.svg.setAttribute("viewBox", "0 0 100 20");
      this.svg.setAttribute("preserveAspectRatio", "none");
      this.svg.setAttribute("role", "img");
      this.line = document.createElementNS(space, "polyline");
      this.svg.append(this.line);
      this.figure.prepend(this.svg);
      this.after = make("span", "", this.figure);
      this.under = make("div", "", this.figure);
    }
    this.svg.style.display = values.length > 1 ? "" : "none";
    const most = Math.max(...values, 1e-9);
    const step = 100 / Math.max(1, values.length - 1);
    attribute(this.line, "points", values.map((value, index) => `${(index * step).toFixed(1)},${(19 - (18 * value) / most).toFixed(1)}`).join(" "));
    const last = values.length ? milliseconds(values[values.length - 1]) : "";
    attribute(this.svg, "aria-label", values.length ? `latency of the last ${values.length} calls, now ${last}` : "no calls yet");
    put(this.after, last && ` ${last}`);
  }

  // One button at most; `message` null takes it away. A clicked one stays disabled until its row says something new.
  action(text, label, message) {
    if (!message) {
      if (this.button) { this.button.remove(); this.button = null; }
      return;
    }
    const what = JSON.stringify(message);
    if (!this.button) {
      this.button = make("button", "", this.buttons);
      this.button.type = "button";
      this.button.addEventListener("click", () => {
        this.button.disabled = this.clicked = true;
        put(this.button, `${this.text} …`);
        this.send(JSON.parse(this.what));
      });
    }
    if (this.what !== what || this.text !== text || (this.button.disabled && !this.clicked)) {
      this.what = what;
      this.text = text;
      this.button.disabled = this.clicked = false;
      put(this.button, text);
    }
    attribute(this.button, "aria-label", label);
  }

  hint(text) {
    this.said = this.said || make("span", "rpcnb-faint", this.buttons);
    put(this.said, text);
  }
}

const DRAW = {
  transfers(row, data) {
    const arrow = data.way === "up" ? "↑" : "↓";
    row.title(`${arrow} ${data.what}`, `${data.way === "up" ? "to" : "from"} the server, ${data.session}`);
    const share = data.total ? Math.min(1, data.moved / data.total) : null;
    row.bar(data.state === "done" ? 1 : share, `transfer of ${data.what}`);
    const left = data.rate && data.total && !data.ended ? `, ${span((data.total - data.moved) / data.rate)} left` : "";
    const rate = data.rate && !data.ended ? `, ${bytes(data.rate)}/s${left}` : "";
    put(row.under, `${bytes(data.moved)}${data.total ? ` of ${bytes(data.total)}` : ""}${rate}`);
    row.state(data.state, data.session);
    row.error(data.error);
    row.node.classList.toggle("rpcnb-done", data.state === "done");
    row.node.classList.toggle("rpcnb-failed", data.state === "failed");
    const over = ["done", "failed", "cancelled"].includes(data.state);
    if (!over) row.action("cancel", `cancel the transfer of ${data.what}`, { op: "cancel", id: data.id });
    else if (data.state === "done" || !data.ended) row.action("", "", null);
    else row.action("dismiss", `dismiss the transfer of ${data.what}`, { op: "dismiss", id: data.id });
  },

  pending(row, data, now) {
    row.title(data.function, `call ${data.id}`);
    row.state(data.state, data.session);
    const limit = data.deadline && !data.ended ? `, ${span(data.deadline - now)} to its time limit` : "";
    put(row.figure, `${span((data.ended || now) - data.since)}${limit}${data.waits ? `, waits for ${data.waits}` : ""}`);
    if (data.ended || data.state === "draining") row.action("", "", null);
    else row.action("cancel", `cancel ${data.function}`, { op: "cancel", id: data.id });
    row.hint(data.remote ? "" : " no remote cancel");
  },

  jobs(row, data, now) {
    row.title(data.name, `job of ${data.session}`);
    row.state(data.state, `${data.function}, ${data.session}`);
    row.error(data.error);
    put(row.figure, `${span((data.ended || now) - data.since)}, ${bytes(data.output)} printed`);
    if (data.state === "running") row.action("cancel", `cancel the job ${data.name}`, { op: "cancel_job", session: data.session, name: data.name });
    else row.action("", "", null);
  },

  sessions(row, data, now) {
    row.title(data.name, `${data.peer}, ${data.kind}`);
    row.state(data.state, `${data.peer}${data.key ? `, key ${data.key}` : ""} (${data.kind})`);
    row.error(data.error);
    row.spark(data.latencies || []);
    const limit = data.expires ? `, ends in ${span(data.expires - now)}` : "";
    put(row.under, `${some(data.requests, "request")}, ↑ ${bytes(data.sent)}, ↓ ${bytes(data.received)}, ${bytes(data.held)} held${limit}`);
    if (data.reconnects) row.action("reconnect", `reconnect ${data.name}`, { op: "reconnect", session: data.name });
    else if (data.state === "lost" || data.state === "closed") row.action("", "", null);
    else row.action("close", `close ${data.name}`, { op: "close", session: data.name });
  },

  devices(row, data) {
    row.title(data.key || data.tracker, `of the tracker ${data.tracker}`);
    row.state(data.state, data.board || "");
    row.error(data.error);
    const facts = [data.holder, data.since && `since ${data.since}`, data.limit && `limit ${data.limit}`];
    put(row.figure, facts.filter(Boolean).join(", "));
  },

  servers(row, data, now) {
    row.title(data.address, data.name);
    row.state(data.busy ? "kernel" : "ready", data.busy ? `a cell keeps the kernel busy, ${span(now - data.busy)}` : "");
    const key = data.key ? `key ${data.key}, ` : "";
    put(row.figure, `${key}${data.token ? "token" : "no token"}, ${some(data.functions, "function")}`);
    row.list = row.list || make("ul", "", row.node);
    row.list.style.gridColumn = "1 / -1";
    const rows = [];
    for (const client of data.clients) {
      rows.push({ key: client.peer, ...client });
      for (const [name, since] of client.calls || []) {
        rows.push({ key: `${client.peer} ${name} ${since}`, peer: "", state: "parked", function: name, since });
      }
    }
    if (data.more) rows.push({ key: "more", peer: "", state: "", function: `and ${data.more} more clients` });
    keep(row.list, (row.clients = row.clients || new Map()), rows, (one) => one.key, (line, one) => {
      line.title(one.peer ? `client ${one.peer}` : "");
      line.state(one.state, one.function);
      const queued = one.queued ? `${some(one.queued, "request")} behind it` : "";
      put(line.figure, [one.since && span(now - one.since), queued].filter(Boolean).join(", "));
    }, row.send);
  },
};

const KEYS = {
  transfers: (data) => data.id,
  pending: (data) => data.id,
  jobs: (data) => `${data.session} ${data.name}`,
  sessions: (data) => data.name,
  devices: (data) => `${data.tracker} ${data.board || data.holder} ${data.key}`,
  servers: (data) => data.address,
};

function keep(list, rows, data, keyOf, draw, send) {
  const seen = new Set();
  let at = 0;
  for (const one of data) {
    const key = String(keyOf(one));
    if (seen.has(key)) continue;
    seen.add(key);
    if (!rows.has(key)) rows.set(key, new Row(send));
    const row = rows.get(key);
    if (list.children[at] !== row.node) list.insertBefore(row.node, list.children[at] || null);
    draw(row, one);
    at += 1;
  }
  for (const [key, row] of rows) {
    if (!seen.has(key)) { row.node.remove(); rows.delete(key); }
  }
}

let panels = 0;

function render({ model, el }) {
  const number = (panels += 1);
  const root = make("div", "rpcnb-panel", el);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "rpcnb");
  const parts = new Map();
  for (const name of SECTIONS) {
    const section = make("section", "", root);
    const title = make("h4", "", section);
    title.id = `rpcnb-${number}-${name}`;
    section.setAttribute("aria-labelledby", title.id);
    make("span", "", title).textContent = TITLES[name];
    const count = make("span", "rpcnb-count", title);
    const list = make("ul", "", section);
    const more = make("div", "rpcnb-more", section);
    const empty = make("div", "rpcnb-empty", section);
    parts.set(name, { section, count, list, more, empty, rows: new Map() });
  }
  const note = make("div", "rpcnb-note", root);
  const said = make("div", "rpcnb-hidden", root);
  said.setAttribute("role", "status");
  const send = (message) => model.send(message);

  let shift = 0; // this clock's seconds ahead of the kernel's
  let heard = Date.now(); // when the kernel has last said something
  let wanted = false;
  let spoken = "";

  function draw() {
    wanted = false;
    const silent = Date.now() - heard > SILENT;
    root.classList.toggle("rpcnb-silent", silent);
    root.querySelectorAll("button").forEach((button) => { if (silent) button.disabled = true; });
    if (silent) {
      put(note, "the kernel says nothing: if it was restarted, run this cell again");
      return;
    }
    const snapshot = model.get("snapshot") || {};
    const now = Date.now() / 1000 - shift;
    const words = [];
    for (const [name, part] of parts) {
      const found = snapshot[name] || { rows: [], more: 0 };
      const shown = (snapshot.sections || SECTIONS).includes(name);
      const idle = found.rows.length === 0;
      part.section.style.display = shown && (!idle || EMPTY[name] || name === "sessions") ? "" : "none";
      keep(part.list, part.rows, found.rows, KEYS[name], (row, data) => DRAW[name](row, data, now), send);
      put(part.count, found.rows.length ? ` ${found.rows.length + found.more}` : "");
      put(part.more, found.more ? `and ${found.more} more` : "");
      if (name === "sessions" && idle) {
        if (!part.empty.firstChild) {
          part.empty.append("no session is open; connect with ", make("code"), " or ", make("code"));
          part.empty.querySelectorAll("code")[0].textContent = "%rpc_connect HOST:PORT";
          part.empty.querySelectorAll("code")[1].textContent = "%rpc_connect demo";
        }
        part.empty.style.display = "";
      } else if (name === "sessions") {
        part.empty.style.display = "none";
      } else {
        put(part.empty, idle ? EMPTY[name] || "" : "");
      }
      if (found.rows.length && (name === "transfers" || name === "pending")) words.push(`${found.rows.length} ${name}`);
    }
    put(note, snapshot.note || "");
    const text = words.join(", ") || "idle";
    if (text !== spoken) { spoken = text; put(said, text); }
  }

  function soon() {
    if (!wanted) { wanted = true; requestAnimationFrame(draw); }
  }

  function changed() {
    const snapshot = model.get("snapshot") || {};
    heard = Date.now();
    if (snapshot.now) shift = heard / 1000 - snapshot.now;
    soon();
  }

  model.on("change:snapshot", changed);
  const timer = setInterval(soon, 500);
  // A snapshot that was saved long ago must not move this clock.
  draw();
  model.send({ op: "hello" });
  return () => {
    clearInterval(timer);
    try { model.send({ op: "bye" }); } catch (error) { /* the kernel has gone, and with it who would care */ }
    model.off("change:snapshot", changed);
  };
}

export default { render };
