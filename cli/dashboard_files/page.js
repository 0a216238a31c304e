// SPDX-License-Identifier: Apache-2.0
// The page of `rekindle dashboard`. Text of servers and images is only ever set as text, never as HTML.
"use strict";

const POLL_MS = 2000;
const ARMED_MS = 4000;
const MESSAGE_MS = 8000;
const COLOURS = 12;
const MAGNIFIED = 10; // starts that take less than a tenth of the longest are drawn again, magnified
const KIND = {
  ready: "good", starting: "wait", stopping: "wait", hibernated: "rest", ended: "off", killed: "bad",
  restored: "good", cache: "wait", cold: "wait", started: "good", failed: "bad",
};
const ASKING = { stop: "Really stop?", hibernate: "Really?" };

// The token is in the fragment of the printed address; it is moved out of sight, and kept for a reload.
if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
const token = sessionStorage.getItem("token") || "";
const colours = new Map(); // of phases, in the order in which they are seen
const shown = {}; // the last content of each part, so that it is only drawn anew when it differs
const busy = new Map(); // commands that run, by the server's name
let armed = null;
let state = null;

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "style") Object.assign(made.style, value);
    else if (name === "class") made.className = value;
    else if (name === "on") made.addEventListener("click", value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function bytes(number) {
  if (number < 1e6) return `${Math.round(number / 1e3)} kB`;
  if (number < 1e9) return `${Math.round(number / 1e6)} MB`;
  return `${(number / 1e9).toFixed(number < 1e10 ? 2 : 1)} GB`;
}

function seconds(number) {
  if (number < 10) return `${number.toFixed(2)} s`;
  return number < 100 ? `${number.toFixed(1)} s` : `${Math.round(number)} s`;
}

function age(since) {
  const passed = Math.max(0, Date.now() / 1000 - since);
  if (passed < 60) return `${Math.floor(passed)} s`;
  if (passed < 3600) return `${Math.floor(passed / 60)} min`;
  return passed < 86400 ? `${Math.floor(passed / 3600)} h` : `${Math.floor(passed / 86400)} d`;
}

function since(moment, words = "") {
  return element("span", { "data-since": moment, "data-words": words }, age(moment) + words);
}

function badge(text) {
  return element("span", { class: `state ${KIND[text] || "off"}` }, text);
}

function table(heads, rows) {
  const head = heads.map(([text, kind]) => element("th", { scope: "col", class: kind || "" }, text));
  return element("div", { class: "card" }, element("table", {},
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
}

function empty(before, command, after = "") {
  return element("div", { class: "card" },
    element("p", { class: "empty" }, before, element("code", { class: "mono" }, command), after));
}

function summary({ replicas, summary: found, images }) {
  const running = replicas.filter((each) => each.memory);
  const own = running.reduce((sum, each) => sum + each.memory.own_bytes, 0);
  const ready = replicas.filter((each) => each.state === "ready").length;
  const resting = replicas.filter((each) => each.state === "hibernated").length;
  const kept = Object.values(found.kept_bytes).reduce((sum, each) => sum + each, 0);
  const first = found.first_token_seconds;
  const tiles = [
    [String(ready), ready === 1 ? "server ready" : "servers ready"],
    [String(resting), "hibernating"],
    [first === null ? "–" : seconds(first), `to the first token (median of ${found.first_tokens})`],
    [bytes(own), "memory that is their own"],
    [bytes(kept), `on disk, ${images.length} ${images.length === 1 ? "image" : "images"}`],
  ];
  return tiles.map(([number, text]) => element("div", { class: "tile" },
    element("b", {}, number), element("span", {}, text)));
}

function memory({ memory: found, state: now }, most) {
  if (!found) return element("td", {}, element("small", {}, now === "ready" ? "in another container" : ""));
  const width = (number) => `${(100 * number) / most}%`;
  const title = `${bytes(found.own_bytes)} of its own, ${bytes(found.shared_bytes)} of mapped files`;
  return element("td", {},
    element("div", { class: "memory", role: "img", "aria-label": title, title },
      element("i", { style: { width: width(found.own_bytes) } }),
      element("i", { style: { width: width(found.shared_bytes) } })),
    element("small", {}, `${bytes(found.own_bytes)} own, ${bytes(found.shared_bytes)} shared`));
}

function button(name, action) {
  const key = `${action} ${name}`;
  const isArmed = armed === key;
  const label = action === "stop" && state.replicas.some((each) => each.name === name && each.state === "hibernated")
    ? "Forget" : action[0].toUpperCase() + action.slice(1);
  const options = {
    type: "button", "data-key": key, class: isArmed ? "armed" : "", "aria-label": `${label} ${name}`,
    on: () => (ASKING[action] && armed !== key ? arm(key) : act(action, name)),
  };
  if (busy.has(name)) options.disabled = "";
  const doing = busy.get(name) === action ? "…" : "";
  return element("button", options, isArmed ? ASKING[action] : label + doing);
}

function servers({ replicas }) {
  if (!replicas.length) return [empty("No server yet. Start one: ", "rekindle restore IMAGE --detach")];
  const sum = (each) => (each.memory ? each.memory.own_bytes + each.memory.shared_bytes : 0);
  const most = Math.max(1, ...replicas.map(sum));
  const rows = replicas.map((each) => element("tr", { "data-name": each.name },
    element("td", {}, element("b", {}, each.name), element("small", {}, each.image || "not of an image")),
    element("td", {}, badge(each.state),
      element("small", {}, each.exit_status === null ? each.rung || "" : `status ${each.exit_status}`)),
    element("td", { class: "mono" }, each.endpoint || "–"),
    memory(each, most),
    element("td", { class: "number" }, since(each.created)),
    element("td", { class: "buttons" }, ...each.actions.map((action) => button(each.name, action)))));
  return [table([["Name"], ["State"], ["Endpoint"], ["Memory"], ["Age", "number"], [""]], rows)];
}

function colour(name) {
  if (name === "other") return "var(--other)"; // between phases
  if (!colours.has(name)) colours.set(name, colours.size % COLOURS);
  return `var(--p${colours.get(name)})`;
}

function bar(start, longest) {
  const parts = start.phases.filter((phase) => phase.seconds > 0);
  const told = parts.map((phase) => `${phase.name} ${seconds(phase.seconds)}`).join(", ");
  const total = Math.max(1e-9, parts.reduce((sum, phase) => sum + phase.seconds, 0));
  const first = start.first_token_seconds === null ? "" : `, first token ${seconds(start.first_token_seconds)}`;
  return element("div", { class: "track" },
    element("div", { class: "bar", role: "img", "aria-label": told, style: { width: `${(72 * total) / longest}%` } },
      ...parts.map((phase) => element("i", {
        title: `${phase.name}: ${phase.seconds.toFixed(3)} s`,
        style: { width: `${(100 * phase.seconds) / total}%`, background: colour(phase.name) },
      }))),
    element("span", {}, seconds(start.seconds) + first));
}

function row(start, longest) {
  const what = start.wakes ? "wake" : start.verb;
  const reasons = new Set(start.reasons.map((each) => `${each.code}: ${each.here}`));
  const reason = start.error || [...reasons].join("; ");
  return element("div", { class: "start" },
    element("div", {}, `${start.replica || start.image || "–"} `, badge(start.outcome),
      element("small", {}, `${what} of ${start.image || "a command"}, `, since(start.at, " ago"))),
    bar(start, longest),
    start.outcome !== "restored" && reason ? element("div", { class: "why" }, reason) : null);
}

function starts({ starts: found }) {
  if (!found.length) return [empty("No start yet. What ", "rekindle restore", " does is shown here.")];
  const total = (start) => start.phases.reduce((sum, phase) => sum + phase.seconds, 0);
  const longest = Math.max(1e-9, ...found.map(total));
  const quick = found.filter((start) => total(start) < longest / MAGNIFIED);
  const slow = found.filter((start) => !quick.includes(start));
  const parts = slow.map((start) => row(start, longest));
  if (quick.length) {
    const most = Math.max(1e-9, ...quick.map(total));
    parts.push(element("h3", {}, `magnified ${Math.round(longest / most)} times`));
    parts.push(...quick.map((start) => row(start, most)));
  }
  const names = [...new Set(found.flatMap((start) => start.phases.filter((each) => each.seconds > 0.005)
    .map((phase) => phase.name)))];
  const legend = names.map((name) => element("li", {},
    element("i", { style: { background: colour(name) } }), name));
  return [element("div", { class: "card picture" }, ...parts, element("ul", { class: "legend" }, ...legend))];
}

function shortened(signer) {
  return signer && signer.replace(/^(key .{12}).*/, "$1…");
}

function images({ images: found }) {
  if (!found.length) return [empty("No image yet. Make one: ", "rekindle snapshot NAME -- vllm serve …")];
  const rows = found.map((each) => element("tr", { "data-image": each.name },
    element("td", {}, element("b", {}, each.name),
      element("small", { class: "mono", title: each.digest }, each.digest.slice(0, 19)),
      element("small", {}, each.kind + (each.proved === false ? ", not proved" : ""))),
    element("td", {}, each.signer ? element("span", { class: "state good" }, "signed")
      : element("span", { class: "state bad" }, "not verified"),
    element("small", { title: each.signer || "" }, shortened(each.signer) || each.problem || "")),
    element("td", { class: "number" }, bytes(each.bytes),
      each.memory_bytes ? element("small", {}, `${bytes(each.memory_bytes)} unpacked`) : null),
    element("td", { class: "number" }, each.in_use ? badge("in use") : since(each.used, " ago")),
    element("td", {}, element("div", { class: "needs" }, ...each.needs.map(([name, value]) =>
      element("span", {}, element("em", {}, name), value))))));
  return [table([["Name"], ["Signature"], ["Size", "number"], ["Used", "number"], ["Needs"]], rows)];
}

const PARTS = { summary, servers, starts, images };

function draw() {
  document.getElementById("where").textContent = `${state.host} · ${state.home} · ${state.version}`;
  for (const [name, make] of Object.entries(PARTS)) {
    const { now, ...rest } = state;
    const needed = { summary: rest, servers: [rest.replicas, armed, [...busy]], starts: rest.starts, images: rest.images };
    const key = JSON.stringify(needed[name]);
    if (shown[name] === key) continue;
    shown[name] = key;
    const place = document.getElementById(name);
    const focused = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    place.replaceChildren(...make(state));
    if (focused) place.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }
}

function arm(key) {
  armed = key;
  draw();
  setTimeout(() => {
    if (armed === key) {
      armed = null;
      draw();
    }
  }, ARMED_MS);
}

let hide = 0;
function say(text, fine = false) {
  const place = document.getElementById("message");
  place.textContent = text;
  place.className = fine ? "fine" : "";
  place.hidden = false;
  clearTimeout(hide);
  hide = setTimeout(() => { place.hidden = true; }, MESSAGE_MS);
}

async function ask(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function act(action, name) {
  armed = null;
  busy.set(name, action);
  draw();
  try {
    const { status, output } = await ask(`/api/${action}`, { name });
    const lines = output.trim().split("\n");
    if (status) say(`${action} ${name} failed (${status})\n${output.trim()}`);
    else say(lines[lines.length - 1] || `${action} ${name}: done`, true);
  } catch (error) {
    say(`${action} ${name}: ${error.message}`);
  } finally {
    busy.delete(name);
    await refresh();
  }
}

function live(text, isLost) {
  const place = document.getElementById("live");
  if (place.textContent !== text) place.textContent = text;
  place.className = isLost ? "lost" : "";
}

async function refresh() {
  try {
    state = await ask("/api/state");
    draw();
    live("live", false);
  } catch (error) {
    live(error.message === "Failed to fetch" ? "rekindle dashboard has ended" : error.message, true);
  }
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_MS);
}

setInterval(() => {
  for (const each of document.querySelectorAll("[data-since]")) {
    each.textContent = age(Number(each.dataset.since)) + each.dataset.words;
  }
}, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
poll();
