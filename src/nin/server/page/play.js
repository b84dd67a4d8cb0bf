// A button that does something again and again, such as move the chosen pixel, until it is pressed once more.

import { element, silence } from "./elements.js";

const PAUSE = 700; // milliseconds

export function player(label, onTick) {
  let timer = 0;
  const button = element("button", { type: "button", onclick: () => (timer ? stop() : start()) }, label);
  const start = () => {
    timer = setInterval(onTick, PAUSE);
    silence(true); // nobody can listen to a number every second
    button.textContent = "Stop";
    onTick();
  };
  const stop = () => {
    if (!timer) return;
    clearInterval(timer);
    timer = 0;
    silence(false);
    button.textContent = label;
  };
  return { element: button, stop };
}
