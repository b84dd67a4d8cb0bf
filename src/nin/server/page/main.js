// Starts every step of the lesson, and the look inside where a network is served.

import { element } from "./elements.js";
import { inside } from "./inside.js";
import * as server from "./api-client.js";
import { oneChannel } from "./one-channel.js";
import { manyChannels } from "./many-channels.js";
import { dense } from "./dense.js";
import { shrinking } from "./shrinking.js";
import { bottleneck } from "./bottleneck.js";
import { colours } from "./colours.js";
import { network } from "./network-in-network.js";

const STEPS = { "one-channel": oneChannel, "many-channels": manyChannels, dense, shrinking, bottleneck, colours, network };

const figureOf = (id) => document.querySelector(`#${id} [data-figure]`);

async function start() {
  const health = await server.health();
  for (const [id, step] of Object.entries(STEPS)) {
    Promise.resolve()
      .then(() => step(figureOf(id), { health }))
      .catch((error) => {
        figureOf(id).append(element("p", { class: "problem" }, `This figure could not be drawn: ${error.message}`));
        console.error(error);
      });
  }
  if (health?.model) {
    document.getElementById("inside").hidden = document.getElementById("inside-link").hidden = false;
    await inside(figureOf("inside"), document.getElementById("inside-words"), health);
  }
  document.getElementById("api-link").hidden = !server.LIVE;
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
