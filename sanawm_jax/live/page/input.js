// Keys, mouse, touch and gamepad become one state: held keys, four sticks, and how far the mouse
// turned. It is sent when it changes, at most thirty times a second.

const LETTERS = "wasdijkl";
const ARROWS = { ArrowUp: "w", ArrowDown: "s", ArrowLeft: "a", ArrowRight: "d" };
const COMMANDS = { KeyP: "pause", Space: "pause", KeyR: "reset", KeyZ: "back", KeyF: "full", KeyH: "help" };
const DEGREES = 0.12; // that a pixel of the mouse turns
const DEAD = 0.15; // of a stick that counts as rest

export class Input {
  constructor(canvas, send, command) {
    this.canvas = canvas;
    this.send = send;
    this.command = command;
    this.number = 0;
    this.keys = new Set();
    this.touch = [0, 0, 0, 0];
    this.pad = [0, 0, 0, 0];
    this.look = [0, 0];
    this.isStale = false;
    this.wasStart = false;
    addEventListener("keydown", (event) => this.keyDown(event));
    addEventListener("keyup", (event) => this.release(letter(event)));
    addEventListener("blur", () => this.releaseAll());
    document.addEventListener("visibilitychange", () => { if (document.hidden) this.releaseAll(); });
    this.caps();
    this.mouse();
    this.joystick(document.getElementById("stick-move"), (x, y) => { this.touch[0] = -y; this.touch[1] = x; });
    this.joystick(document.getElementById("stick-look"), (x, y) => { this.touch[2] = x; this.touch[3] = -y; });
    setInterval(() => this.flush(), 33);
  }

  focus() { this.canvas.focus({ preventScroll: true }); }

  changed() { this.isStale = true; this.flush(); }

  flush() {
    this.gamepad();
    if (!this.isStale) return;
    this.isStale = false;
    const stick = this.touch.map((value, i) => Math.max(-1, Math.min(1, value + this.pad[i])));
    const look = this.look.map((value) => Math.max(-90, Math.min(90, value)));
    this.look = [0, 0];
    this.number += 1;
    this.send({ number: this.number, keys: [...this.keys].join(""), stick, look });
    for (const cap of document.querySelectorAll("#caps button")) {
      cap.classList.toggle("lit", this.keys.has(cap.dataset.key));
    }
  }

  keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
    const key = letter(event);
    if (event.key.startsWith("Arrow") && event.target.closest("#timeline, input")) return;
    if (key) {
      event.preventDefault();
      this.hold(key);
    } else if (!event.repeat && (event.key === "?" || COMMANDS[event.code])) {
      if (event.code === "Space" && event.target.closest("button, dialog")) return;
      event.preventDefault();
      this.command(event.key === "?" ? "help" : COMMANDS[event.code]);
    }
  }

  hold(key) {
    if (this.keys.has(key)) return;
    this.keys.add(key);
    this.changed();
  }

  release(key) {
    if (this.keys.delete(key)) this.changed();
  }

  releaseAll() {
    this.keys.clear();
    this.touch = [0, 0, 0, 0];
    this.changed();
  }

  caps() {
    for (const cap of document.querySelectorAll("#caps button")) {
      const key = cap.dataset.key;
      cap.addEventListener("pointerdown", (event) => {
        cap.setPointerCapture(event.pointerId);
        this.hold(key);
      });
      for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
        cap.addEventListener(name, () => this.release(key));
      }
    }
  }

  mouse() {
    const canvas = this.canvas;
    canvas.addEventListener("click", (event) => {
      canvas.focus();
      if (event.pointerType !== "touch") canvas.requestPointerLock?.()?.catch?.(() => {});
    });
    addEventListener("mousemove", (event) => {
      if (document.pointerLockElement !== canvas) return;
      this.look[0] += DEGREES * event.movementX;
      this.look[1] -= DEGREES * event.movementY;
      this.isStale = true;
    });
  }

  joystick(element, set) {
    const knob = element.firstElementChild;
    const move = (event) => {
      const box = element.getBoundingClientRect();
      let x = (event.clientX - box.left) / box.width * 2 - 1;
      let y = (event.clientY - box.top) / box.height * 2 - 1;
      const length = Math.hypot(x, y);
      if (length > 1) { x /= length; y /= length; }
      knob.style.transform = `translate(${x * 34}px, ${y * 34}px)`;
      set(rest(x), rest(y));
      this.isStale = true;
    };
    const stop = () => { knob.style.transform = ""; set(0, 0); this.changed(); };
    element.addEventListener("pointerdown", (event) => { element.setPointerCapture(event.pointerId); move(event); });
    element.addEventListener("pointermove", (event) => { if (element.hasPointerCapture(event.pointerId)) move(event); });
    for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, stop);
  }

  gamepad() {
    const pad = [...(navigator.getGamepads?.() || [])].find((found) => found && found.connected);
    if (!pad) return;
    const [x = 0, y = 0, u = 0, v = 0] = pad.axes.map(rest);
    const now = [-y, x, u, -v];
    if (now.some((value, i) => Math.abs(value - this.pad[i]) > 0.01)) {
      this.pad = now;
      this.isStale = true;
    }
    const isStart = Boolean(pad.buttons[9]?.pressed);
    if (isStart && !this.wasStart) this.command("pause");
    this.wasStart = isStart;
  }
}

function letter(event) {
  if (ARROWS[event.key]) return ARROWS[event.key];
  const name = event.code.startsWith("Key") ? event.code.slice(3).toLowerCase() : event.key.toLowerCase();
  return name.length === 1 && LETTERS.includes(name) ? name : "";
}

function isTyping(target) {
  return target.closest?.("textarea, dialog[open], input:not([type=checkbox]):not([type=file]):not([type=range])");
}

function rest(value) {
  return Math.abs(value) < DEAD ? 0 : (value - Math.sign(value) * DEAD) / (1 - DEAD);
}
