"use strict";
// A long recording: the stretch behind a click is fetched and played.
async function hear({ type, target }) {
  const at = type === "click" ? target.dataset.at : target.matches(".at") ? target.value : undefined;
  if (at === undefined) return;
  const long = target.closest(".long"), part = long.querySelector(".stretch");
  long.querySelector(".at").value = at;
  part.dataset.load = `${long.dataset.stretch}?at=${at}`;
  await load(part);
  if (part.querySelector("audio")) play(audioOf(part.querySelector(".card")));
}
for (const kind of ["click", "change"]) document.addEventListener(kind, hear);
