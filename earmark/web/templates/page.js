"use strict";
// Filter: hide the cards that do not fit, sort the others.
const form = document.getElementById("filter");
const cards = [...document.querySelectorAll("#cards .card")];
function fits(card, wanted) {
  const { label, state, score, text } = card.dataset;
  return (!wanted.text || text.includes(wanted.text.toLowerCase().trim()))
    && (!wanted.label || label === wanted.label)
    && (!wanted.state || state === wanted.state)
    && (!wanted.score || (score !== "" && +score >= +wanted.score))
    && (!wanted.uncertain || (score !== "" && +score < +wanted.uncertain));
}
function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const key = wanted.sort.replace("-", ""), sign = wanted.sort[0] === "-" ? -1 : 1;
  const of = (card) => (card.dataset[key] === "" ? Infinity : sign * card.dataset[key]);
  let shown = 0;
  for (const card of cards) shown += !(card.hidden = !fits(card, wanted));
  document.getElementById("cards").append(...cards.sort((one, other) => of(one) - of(other) || one.dataset.id - other.dataset.id));
  form.shown.value = shown === cards.length ? `${shown} clips` : `${shown} of ${cards.length} clips`;
}
if (form) {
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}

// Players: a button, and a waveform to seek in; one sounds at a time.
let playing = null;
function listen(player) {
  const audio = player.querySelector("audio"), now = player.querySelector(".now"), button = player.querySelector(".play");
  const draw = () => {
    now.setAttribute("x", 150 * audio.currentTime / audio.dataset.of - 0.3);
    if (!audio.paused) requestAnimationFrame(draw);
  };
  audio.addEventListener("play", () => { button.classList.add("on"); draw(); });
  for (const end of ["pause", "ended"]) audio.addEventListener(end, () => button.classList.remove("on"));
  return audio;
}
function audioOf(player) {
  return player.heard ??= listen(player);
}
function play(audio) {
  if (playing && playing !== audio) playing.pause();
  playing = audio;
  audio.play().catch(() => {}); // refused if it is paused at once
}
document.addEventListener("click", (event) => {
  const player = event.target.closest(".card");
  if (!player?.querySelector("audio")) return;
  const audio = audioOf(player), wave = event.target.closest(".wave");
  if (wave) {
    const box = wave.getBoundingClientRect();
    audio.currentTime = audio.dataset.of * (event.clientX - box.left) / box.width;
    play(audio);
  } else if (event.target.closest(".play")) {
    if (audio.paused) play(audio); else audio.pause();
  }
});
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.target.matches(".play")) audioOf(event.target.closest(".card")).currentTime += step;
});

// The live page: parts that are loaded when they are needed, and again every so often.
async function load(part) {
  const answer = await fetch(part.dataset.load);
  const text = await answer.text();
  if (text !== part.loaded) part.innerHTML = part.loaded = text;
  part.removeAttribute("aria-busy");
}
for (const part of document.querySelectorAll("[data-load]")) {
  const later = part.closest("details");
  if (later) later.addEventListener("toggle", () => load(part), { once: true }); else load(part);
  if (part.dataset.every) setInterval(() => document.hidden || load(part), 1000 * part.dataset.every);
}
