// Follows a training: asks the server how far it is, and shows its curves.

import { element } from "./elements.js";

const SECONDS = 3;
const [name, text, bar, note, answers, charts] = ["name", "text", "bar", "note", "answers", "charts"].map((id) => document.getElementById(id));
let drawn = "";

async function refresh() {
  let training;
  try {
    training = await (await fetch("api/training")).json();
  } catch {
    text.textContent = "The server does not answer: was nin serve ended?";
    setTimeout(refresh, 1000 * SECONDS);
    return;
  }
  if (training.name) name.textContent = training.name;
  if (text.textContent !== training.text) text.textContent = training.text;
  document.title = `${training.name}: ${training.text}`;
  bar.hidden = training.state !== "training";
  bar.max = Math.max(1, training.steps);
  bar.value = training.step;
  note.hidden = !training.note;
  note.textContent = training.note;
  answers.hidden = !training.answers;
  answers.textContent = `The network that answers is that of ${training.answers}.`;
  draw(training.charts);
  if (training.state !== "finished" && training.state !== "none") setTimeout(refresh, 1000 * SECONDS);
  document.documentElement.dataset.ready = "";
}

function draw(found) {
  const now = JSON.stringify(found);
  if (now === drawn) return;
  drawn = now;
  charts.replaceChildren(...Object.entries(found).map(([title, svg]) => {
    const figure = element("figure", {}, element("figcaption", {}, title));
    // drawn by the server from numbers: there is no text of anybody in it
    figure.insertAdjacentHTML("beforeend", svg);
    return figure;
  }));
}

refresh();
