// Starts every step of the lesson, and the look inside where a network is served.

import { element } from "./elements.js";
import { oneChannel } from "./step1.js";
import { manyChannels } from "./step2.js";
import { dense } from "./step3.js";
import { shrinking } from "./step4.js";
import { bottleneck } from "./step5.js";
import { colours } from "./step6.js";
import { network } from "./step7.js";

const STEPS = { "one-channel": oneChannel, "many-channels": manyChannels, dense, shrinking, bottleneck, colours, network };

async function health() {
  try {
    const answer = await fetch("api/health");
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

const figureOf = (id) => document.querySelector(`#${id} [data-figure]`);

async function start() {
  const server = await health();
  for (const [id, step] of Object.entries(STEPS)) {
    Promise.resolve()
      .then(() => step(figureOf(id), { server }))
      .catch((error) => {
        figureOf(id).append(element("p", { class: "problem" }, `This figure could not be drawn: ${error.message}`));
        console.error(error);
      });
  }
  if (server?.model) {
    document.getElementById("inside").hidden = document.getElementById("inside-link").hidden = false;
    const { inside } = await import("./inside.js");
    await inside(figureOf("inside"), document.getElementById("inside-words"));
  }
  followScrolling();
  document.documentElement.dataset.ready = "";
}

// Marks in the list of steps the one that is being read.
function followScrolling() {
  const links = new Map([...document.querySelectorAll(".top a")].map((link) => [link.getAttribute("href").slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(target.id).setAttribute("aria-current", "step");
      }
    }
  }, { rootMargin: "-40% 0px -55% 0px" });
  for (const id of links.keys()) seen.observe(document.getElementById(id));
}

start();
