"use strict";
// Review: one key a clip. The next clips are fetched ahead; what is not saved yet is sent again.
const AHEAD = 6, HOLDING = 20, RETRY_MS = 2000;
const at = (id) => document.getElementById(id), place = at("clip"), typed = at("typed");
const asked = Object.fromEntries(new FormData(at("queue"))), clips = [], decided = [], unsaved = [];
let now = 0, fetching = false;
asked.reviewer = asked.reviewer.trim() || "me";
function tell(text) { at("told").textContent = text; }
async function post(path, body) {
  for (;;) {
    const answer = await fetch(location.pathname + path, { method: "POST", body: JSON.stringify(body) }).catch(() => null);
    const text = answer ? await answer.text() : "The page does not answer.";
    if (answer?.ok) return text;
    tell(answer?.status < 500 ? text : `${unsaved.length} not saved yet, to be tried again: ${text}`);
    if (answer?.status < 500) return "";
    await new Promise((later) => setTimeout(later, RETRY_MS));
  }
}
async function save(action) {
  if (unsaved.push({ label: asked.label, reviewer: asked.reviewer, ...action }) > 1) return;
  for (; unsaved.length; unsaved.shift()) {
    const text = await post("", unsaved[0]);
    if (text) { at("progress").innerHTML = text; tell("Saved."); }
  }
}
async function fetchAhead() {
  if (fetching) return;
  fetching = true;
  while (clips.length - now <= AHEAD) {
    const box = document.createElement("div"), holding = clips.slice(-HOLDING).map((clip) => +clip.dataset.clip);
    box.innerHTML = await post("/next", { ...asked, holding });
    const clip = box.firstElementChild, audio = box.querySelector("audio");
    if (!clip) break;
    if (audio) { audio.preload = "auto"; audio.load(); audio.currentTime = clip.dataset.begin; }
    if (clips.push(clip) === now + 1) show(now);
  }
  fetching = false;
  if (!clips[now]) place.textContent = "There are no more clips in this queue.";
}
function show(number) {
  place.querySelector("audio")?.pause();
  now = Math.max(0, Math.min(number, clips.length));
  const clip = clips[now];
  place.replaceChildren(clip ?? "Fetching the next clip …");
  if (clip?.dataset.said) tell(`You said: ${clip.dataset.said}.`);
  // Before the first key, a browser lets no page sound.
  if (clip?.querySelector("audio") && navigator.userActivation.hasBeenActive) play(audioOf(clip.querySelector(".card")));
  fetchAhead();
}
function decide(verdict, true_label = "") {
  const clip = clips[now];
  if (!clip) return;
  clip.dataset.said = true_label || verdict;
  decided.push(now);
  save({ clip_id: +clip.dataset.clip, verdict, true_label });
  show(now + 1);
}
function undo() {
  if (decided.length) {
    delete clips[decided.at(-1)].dataset.said;
    show(decided.pop());
  }
  save({ undo: true });
}
const actions = {
  y: () => decide("right"), n: () => decide("wrong"), u: undo, k: () => show(now - 1),
  j: () => (clips[now]?.dataset.said ? show(now + 1) : decide("unsure")),
  t: () => typed.true_label.focus(), " ": () => place.querySelector(".play")?.click(),
};
document.addEventListener("keydown", (event) => {
  const control = event.target.closest("input, select, button, a, summary"), key = event.key.toLowerCase();
  if (key === "escape") control?.blur();
  if (!at("keys").checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !(key in actions)) return;
  if (control && (key === " " || control.matches("input:not([type=checkbox]), select"))) return;
  event.preventDefault();
  actions[key]();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-key]");
  // A later press of the space bar must not press this button again.
  if (button && event.detail) button.blur();
  if (button) actions[button.dataset.key]();
});
typed.addEventListener("submit", (event) => {
  event.preventDefault();
  const label = typed.true_label.value.trim();
  typed.reset();
  typed.true_label.blur();
  if (label) decide(label === asked.label ? "right" : "wrong", label);
});
fetchAhead();
