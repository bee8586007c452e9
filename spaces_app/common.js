// Given to every panel before its own script. Text goes into the page as text nodes and attributes, never as markup.
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node[name] = value;
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};
const draw = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const hue = (step, steps) => 255 - 205 * (steps > 1 ? step / (steps - 1) : 1); // indigo first, amber last
const plural = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const plain = (pieces) => pieces.map((piece) => (piece === null ? "_" : piece)).join("");
