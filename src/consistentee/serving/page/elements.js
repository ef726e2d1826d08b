/** What the scripts of all playgrounds share; they stand in one function, one behind the other. */
const at = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const ms = (time) => time === null ? "\u2026" : time >= 1000 ? `${(time / 1000).toFixed(2)}\u00a0s` : `${time.toFixed(time < 10 ? 2 : 1)}\u00a0ms`;
const short = (value) => String(Number(value.toPrecision(4)));
const make = (tag, values = {}, ...inside) => {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...inside);
  return made;
};
const complain = (text) => { at("error").textContent = text; };
const runsByKey = (form, ...fields) => {
  for (const field of fields) {
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
  }
};
