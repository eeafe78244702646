"use strict";
// A long recording: the stretch behind a click is fetched and played.
async function hear({ type, target }) {
  const at = type === "click" ? target.dataset.at : target.matches(".at") ? target.value : undefined;
  if (at === undefined) return;
  const part = target.closest(".long").querySelector(".stretch");
  part.dataset.load = `${target.closest(".long").dataset.stretch}?at=${at}`;
  await load(part);
  if (part.querySelector("audio")) play(audioOf(part.querySelector(".card")));
}
for (const kind of ["click", "change"]) document.addEventListener(kind, hear);
