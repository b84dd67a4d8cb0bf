// Shows openapi.json to people.

import { element } from "./elements.js";

const description = await (await fetch("openapi.json")).json();
const operations = Object.entries(description.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, operation]) => show(path, method, operation)));
document.getElementById("operations").append(...operations);

function show(path, method, operation) {
  const parameters = (operation.parameters ?? []).map(({ name, schema, description: words, required }) =>
    [name, `${schema.type}${required ? "" : `, ${schema.default} if not given`}${words ? `: ${words}` : ""}`]);
  const bodies = Object.keys(operation.requestBody?.content ?? {}).map((type) => ["body", type]);
  const answers = Object.entries(operation.responses).map(([status, answer]) => [status, answer.description]);
  return element("section", { class: "block" },
    element("h2", {}, element("code", {}, `${method.toUpperCase()} `, ...path.split(/(?=\/)/).flatMap((part) => [element("wbr"), part]))),
    element("p", {}, operation.description),
    rows([...parameters, ...bodies, ...answers]));
}

function rows(pairs) {
  return element("table", { class: "figures" }, element("tbody", {}, ...pairs.map(([name, words]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, words)))));
}
