"use strict";
// Review: one key a clip. The next clips are fetched ahead, and what is not saved yet is kept.
const AHEAD = 6, RETRY_MS = 2000;
const at = (id) => document.getElementById(id), queue = at("queue"), typed = at("typed"), place = at("clip");
const kept = `unsaved ${location.pathname}`, unsaved = JSON.parse(localStorage.getItem(kept) || "[]");
const asked = Object.fromEntries(new FormData(queue)), clips = [], verdicts = new Map();
let now = -1, fetching = false, saving = false, wanted = true;
asked.reviewer = asked.reviewer.trim() || "me";
function tell(text) { at("told").textContent = text; }
async function post(path, body) {
  const answer = await fetch(location.pathname + path, { method: "POST", body: JSON.stringify(body) });
  const text = await answer.text();
  if (!answer.ok) throw Object.assign(new Error(text), { refused: answer.status < 500 });
  return text;
}
async function again(path, body) {
  for (;;) {
    try { return await post(path, body); } catch (error) {
      if (error.refused) throw error;
      tell(`${unsaved.length} not saved yet: the page does not answer. It will be tried again.`);
      await new Promise((later) => setTimeout(later, RETRY_MS));
    }
  }
}
async function save(action) {
  if (action) unsaved.push({ ...action, label: asked.label, reviewer: asked.reviewer });
  localStorage.setItem(kept, JSON.stringify(unsaved));
  if (saving) return;
  saving = true;
  while (unsaved.length) {
    try {
      at("progress").innerHTML = await again("", unsaved[0]);
      tell("Saved.");
    } catch (error) { tell(error.message); }
    unsaved.shift();
    localStorage.setItem(kept, JSON.stringify(unsaved));
  }
  saving = false;
}
async function fetchAhead() {
  if (fetching) return;
  fetching = true;
  while (clips.length - 1 - now < AHEAD) {
    const holding = clips.slice(-20).map((clip) => +clip.dataset.clip);
    let text = "";
    try { text = await again("/next", { ...asked, holding }); } catch (error) { tell(error.message); }
    if (!text.trim()) break;
    const box = document.createElement("div");
    box.innerHTML = text;
    const clip = box.firstElementChild, audio = clip.querySelector("audio");
    if (audio) {
      audio.preload = "auto";
      audio.load();
      audio.currentTime = clip.dataset.begin;
    }
    clips.push(clip);
    if (wanted) show(now + 1);
  }
  fetching = false;
  if (wanted) place.textContent = "There are no more clips in this queue.";
}
function show(number) {
  const before = clips[now]?.querySelector("audio");
  if (before) before.pause();
  now = Math.max(0, Math.min(number, clips.length));
  const clip = clips[now];
  wanted = !clip;
  if (!clip) place.textContent = "Fetching the next clip …"; else {
    place.replaceChildren(clip);
    place.removeAttribute("aria-busy");
    listenNow();
    if (verdicts.has(clip)) tell(`You said: ${verdicts.get(clip)}.`);
  }
  if (wanted) now = clips.length - 1;
  fetchAhead();
}
function listenNow() {
  const audio = place.querySelector("audio");
  if (audio && navigator.userActivation.hasBeenActive) play(audioOf(place.querySelector(".card")));
}
function decide(verdict, more = {}) {
  const clip = clips[now];
  if (wanted || !clip) return;
  verdicts.set(clip, more.true_label || verdict);
  save({ clip_id: +clip.dataset.clip, verdict, ...more });
  show(now + 1);
}
const actions = {
  y: () => decide("right"),
  n: () => decide("wrong"),
  j: () => (verdicts.has(clips[now]) ? show(now + 1) : decide("unsure")),
  k: () => show(now - 1),
  u: () => {
    const last = [...verdicts.keys()].at(-1);
    if (last) { verdicts.delete(last); show(clips.indexOf(last)); }
    save({ undo: true });
  },
  t: () => typed.true_label.focus(),
  " ": () => place.querySelector(".play")?.click(),
};
document.addEventListener("keydown", (event) => {
  const control = event.target.closest("input, select, button, a, summary");
  if (event.key === "Escape") control?.blur();
  if (!at("keys").checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (control && (event.key === " " || control.matches("input:not([type=checkbox]), select"))) return;
  const action = actions[event.key.toLowerCase()];
  if (action) { event.preventDefault(); action(); }
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-key]");
  if (!button) return;
  // A later press of the space bar must not press this button again.
  if (event.detail) button.blur();
  actions[button.dataset.key]();
});
typed.addEventListener("submit", (event) => {
  event.preventDefault();
  const label = typed.true_label.value.trim();
  typed.reset();
  typed.true_label.blur();
  if (label === asked.label) decide("right"); else if (label) decide("wrong", { true_label: label });
});
save();
fetchAhead();
