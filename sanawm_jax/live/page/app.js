// The page: connection, state and buttons. The picture, timeline and map are in view.js, keys and
// sticks in input.js. The protocol is described in docs/live.md.
import { Input } from "./input.js";
import { Map2, Picture, Timeline } from "./view.js";

const VERSION = 1;
const FRAME = 1;
const $ = (id) => document.getElementById(id);
const page = document.body.dataset;

let socket = null;
let session = sessionStorage.getItem("session") || "";
let status = { state: "loading", generation: 0, node: 0, prompt: "" };
let tries = 0;
let isOver = false;
let lastInput = 0;

const picture = new Picture($("view"), shown);
const timeline = new Timeline($("timeline"), (node, isClick) => {
  send({ type: "go", node });
  if (isClick) input.focus();
});
const map = new Map2($("map"), () => pathChanged());
const input = new Input($("view"), sendControl, command);

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function sendControl(control) {
  send({ type: "control", at: performance.now(), ...speeds(), ...control });
}

function speeds() {
  return { move: Number($("move").value), turn: Number($("turn").value) };
}

function command(name) {
  if (name === "pause") send({ type: "pause", on: status.state === "running" });
  else if (name === "reset") send({ type: "reset" });
  else if (name === "back") goBack(2);
  else if (name === "full") wholeScreen();
  else if (name === "help") $("keys").open ? $("keys").close() : $("keys").showModal();
}

function goBack(chunks) {
  const node = timeline.above(chunks);
  if (node !== null) send({ type: "go", node });
}

function wholeScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("stage").requestFullscreen?.();
}

// ---- connection

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/live`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => send({ type: "hello", version: VERSION, session });
  socket.onmessage = (event) => {
    tries = 0;
    if (typeof event.data === "string") handle(JSON.parse(event.data));
    else handlePicture(event.data);
  };
  socket.onclose = (event) => {
    if (isOver) return;
    if (event.code >= 4400 && event.code !== 4503) {
      end(event.reason || "the connection was closed");
    } else {
      tries += 1;
      setState("loading", event.code === 4503 ? event.reason : "connecting again");
      setTimeout(connect, Math.min(4000, 250 * 2 ** tries));
    }
  };
}

function end(reason) {
  isOver = true;
  setState("ended", reason);
  socket?.close();
}

function handle(message) {
  const handlers = {
    welcome, status: takeStatus, chunk: takeChunk, stats: takeStats, played: takePlayed,
    forget: (m) => { timeline.clear(); map.clear(); picture.expect(m.generation); },
    error: (m) => toast(m.reason),
    pong: () => {},
  };
  handlers[message.type]?.(message);
}

function welcome(message) {
  session = message.session;
  sessionStorage.setItem("session", session);
  $("model").textContent = message.model;
  $("hud-device").textContent = message.device || "–";
  picture.resize(message.width, message.height);
  map.step = message.move;
  const shelf = message.scenes.map((scene, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = scene.prompt;
    const image = document.createElement("img");
    image.src = `scene/${number}.jpg`;
    image.alt = "";
    const title = document.createElement("span");
    title.textContent = scene.title;
    button.append(image, title);
    button.dataset.scene = scene.name;
    button.onclick = () => { send({ type: "scene", name: scene.name }); input.focus(); };
    return button;
  });
  $("shelf").replaceChildren(...shelf);
}

function takeStatus(message) {
  const before = status;
  status = message;
  picture.expect(message.generation);
  if (message.prompt && message.prompt !== before.prompt && document.activeElement !== $("prompt")) {
    $("prompt").value = message.prompt;
  }
  timeline.select(message.node);
  map.select(message.node);
  for (const button of $("shelf").children) {
    button.setAttribute("aria-pressed", String(button.dataset.scene === message.scene));
  }
  $("stop").hidden = !message.playing;
  if (message.state === "ended") {
    sessionStorage.removeItem("session");
    end(message.detail || "the session has ended");
  } else {
    setState(message.state, message.detail);
  }
}

const TITLES = { loading: "Loading", waiting: "Somebody else is walking", paused: "Paused", ended: "Ended" };

function setState(state, detail) {
  page.state = state;
  $("state").textContent = state;
  $("pause").textContent = state === "paused" ? "Go on" : "Pause";
  $("notice").hidden = state === "running";
  $("notice-title").textContent = TITLES[state] || "";
  $("notice-text").textContent = detail === "paused" ? "" : detail;
  if (state === "ended") $("notice-text").textContent += ". Reload the page to begin again.";
  const isUsable = state === "running" || state === "paused";
  for (const id of ["pause", "reset", "back", "prompt-send", "save-world", "save-walk",
    "save-poses", "save-actions", "save-video", "image", "load-world", "play-walk"]) {
    $(id).disabled = !isUsable;
  }
  pathChanged();
}

function takeChunk(message) {
  timeline.add(message);
  map.add(message);
  $("timeline-text").textContent = `moment ${message.depth}: a click goes back; a key walks on from there, on a new branch`;
}

function takeStats(message) {
  $("hud-ahead").textContent = `${message.ahead} frames`;
  $("hud-model").textContent = `${Math.round(message.model_ms)} ms for ${message.frames}`;
  $("timeline").title = `${message.kept_mib} MiB kept, ${message.dropped} frames dropped`;
}

function takePlayed(message) {
  if (!message.compared) toast(`Walked ${message.chunks} chunks`);
  else toast(`Played ${message.chunks} chunks; ${message.equal} of ${message.compared} are equal bit for bit`);
}

// ---- pictures

function handlePicture(buffer) {
  const view = new DataView(buffer);
  const header = {
    kind: view.getUint8(0), version: view.getUint8(1), generation: view.getUint16(2, true),
    number: view.getUint32(4, true), node: view.getUint32(8, true), input: view.getUint32(12, true),
    inputMs: view.getFloat64(16, true), modelMs: view.getFloat64(24, true),
    sentMs: view.getFloat64(32, true), x: view.getFloat32(40, true), z: view.getFloat32(44, true),
    heading: view.getFloat32(48, true),
  };
  const jpeg = new Blob([new Uint8Array(buffer, 52)], { type: "image/jpeg" });
  if (header.kind === FRAME) picture.take(header, jpeg);
  else timeline.thumbnail(header.node, jpeg);
}

function shown(header) {
  page.frame = String(header.number);
  if (header.input > lastInput && header.inputMs > 0) {
    $("hud-key").textContent = `${Math.round(performance.now() - header.inputMs)} ms`;
  }
  lastInput = Math.max(lastInput, header.input);
  map.move(header);
}

setInterval(() => {
  $("hud-fps").textContent = picture.rate().toFixed(1);
  send({ type: "ping", at: performance.now() });
}, 1000);

// ---- buttons and files

let toastTimer = 0;
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 5000);
}

async function request(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { "x-session": session } });
  if (!answer.ok) {
    const text = await answer.text();
    let reason = text;
    try { reason = JSON.parse(text).reason; } catch { /* a plain text */ }
    throw new Error(reason || `status ${answer.status}`);
  }
  return answer;
}

async function download(button, path, name) {
  button.disabled = true;
  try {
    const blob = await (await request(path)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    toast(error.message);
  } finally {
    button.disabled = false;
  }
}

function upload(id, path) {
  $(id).onchange = async () => {
    const file = $(id).files[0];
    $(id).value = "";
    if (!file) return;
    try {
      await request(path(), { method: "POST", body: file });
    } catch (error) {
      toast(error.message);
    }
    input.focus();
  };
}

const stamp = () => new Date().toISOString().slice(0, 19).replaceAll(":", "-");
$("save-world").onclick = (e) => download(e.target, "file/world.safetensors", `world-${stamp()}.safetensors`);
$("save-walk").onclick = (e) => download(e.target, "file/walk.json", `walk-${stamp()}.json`);
$("save-poses").onclick = (e) => download(e.target, "file/poses.npy", `poses-${stamp()}.npy`);
$("save-actions").onclick = (e) => download(e.target, "file/actions.txt", `keys-${stamp()}.txt`);
$("save-video").onclick = (e) =>
  download(e.target, `file/video.mp4?overlay=${Number($("overlay").checked)}`, `walk-${stamp()}.mp4`);
upload("load-world", () => "file/world");
upload("play-walk", () => "file/walk");
upload("image", () => `file/image?prompt=${encodeURIComponent($("prompt").value)}`);

$("prompt-form").onsubmit = (event) => {
  event.preventDefault();
  if ($("prompt").value.trim()) send({ type: "prompt", text: $("prompt").value });
  else toast("Say what is in the world.");
  input.focus();
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) $("prompt-form").requestSubmit();
  if (event.key === "Enter" && !event.shiftKey) event.preventDefault();
};
for (const name of ["pause", "reset", "back", "full", "help"]) {
  $(name).onclick = () => { command(name); if (name !== "help") input.focus(); };
}
$("stop").onclick = () => { send({ type: "stop" }); input.focus(); };
for (const id of ["move", "turn"]) {
  $(id).oninput = () => {
    document.querySelector(`output[for="${id}"]`).textContent = `${Number($(id).value)}×`;
    input.changed();
  };
}

function pathChanged() {
  const isUsable = page.state === "running" || page.state === "paused";
  $("walk-path").disabled = !isUsable || map.points.length < 2;
  $("clear-path").disabled = !map.points.length;
  $("draw").setAttribute("aria-pressed", String(map.isDrawing));
}
$("draw").onclick = () => { map.draw(!map.isDrawing); pathChanged(); };
$("clear-path").onclick = () => { map.erase(); pathChanged(); };
$("walk-path").onclick = () => {
  send({ type: "path", points: map.points, move: speeds().move });
  map.draw(false);
  pathChanged();
  input.focus();
};

// ---- colours

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  timeline.redraw();
  map.redraw();
}
const wanted = matchMedia("(prefers-color-scheme: dark)");
setTheme(localStorage.getItem("theme") || (wanted.matches ? "dark" : "light"));
wanted.onchange = () => { if (!localStorage.getItem("theme")) setTheme(wanted.matches ? "dark" : "light"); };
$("theme").onclick = () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", name);
  setTheme(name);
};

setState("loading", "connecting");
connect();
