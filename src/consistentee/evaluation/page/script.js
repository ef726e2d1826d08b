(() => {
  "use strict";
  const holder = document.getElementById("curve");
  if (!holder) return;
  const { layers, points, said, chosen } = JSON.parse(holder.textContent);
  const slider = document.getElementById("explore");
  const form = slider.form;
  const back = document.getElementById("back");
  const figures = Object.fromEntries(
    [...document.querySelectorAll("[data-figure]")].map((cell) => [cell.dataset.figure, cell]),
  );
  const written = Object.fromEntries(Object.entries(figures).map(([name, cell]) => [name, cell.textContent]));
  const scale = (chart, name) => {
    const [low, high, start, end] = chart.dataset[name].split(" ").map(Number);
    return { low, high, start, end, at: (value) => start + ((value - low) / (high - low)) * (end - start) };
  };
  const curves = [...document.querySelectorAll('[data-chart="trade_off"]')];
  const tops = [2, 5, 10, 20, 30, 40, 60, 80, 100];
  const exits = [...document.querySelectorAll('[data-chart="exits"]')].map((chart) => ({
    y: scale(chart, "y"),
    bars: [...chart.querySelectorAll("rect.bar")],
    values: [...chart.querySelectorAll("text.value")],
    ticks: [...chart.querySelectorAll("text.ytick")],
  }));
  slider.max = String(points.length - 1);

  const drawExits = (histogram) => {
    const total = histogram.reduce((sum, count) => sum + count, 0) || 1;
    const shares = histogram.map((count) => (100 * count) / total);
    const top = tops.find((value) => value >= Math.min(Math.max(...shares), 100)) || 100;
    for (const { y, bars, values, ticks } of exits) {
      ticks.forEach((tick, place) => { tick.textContent = String((top * place) / 2); });
      bars.forEach((bar, place) => {
        const height = (shares[place] / top) * (y.start - y.end);
        bar.setAttribute("y", y.start - height);
        bar.setAttribute("height", height);
        if (!values[place]) return;
        values[place].setAttribute("y", y.start - height - 5);
        values[place].textContent = shares[place] >= 0.5 ? shares[place].toFixed(0) : "";
      });
    }
  };

  const show = (place) => {
    const [threshold, quality, layer, histogram] = points[place];
    const saved = 1 - layer / layers;
    const texts = { threshold, ...said[place] };
    for (const [name, text] of Object.entries(texts)) figures[name].textContent = text;
    const spoken = `threshold ${threshold}: ${texts.quality}, ${texts.saved} of the layers saved`;
    slider.setAttribute("aria-valuetext", spoken);
    for (const chart of curves) {
      const at = [scale(chart, "x").at(100 * saved), scale(chart, "y").at(100 * quality)];
      const cross = chart.querySelector(".cross");
      cross.setAttribute("visibility", "visible");
      for (const name of ["x1", "x2"]) cross.querySelector(".across").setAttribute(name, at[0]);
      for (const name of ["y1", "y2"]) cross.querySelector(".level").setAttribute(name, at[1]);
      cross.querySelector("circle").setAttribute("cx", at[0]);
      cross.querySelector("circle").setAttribute("cy", at[1]);
    }
    drawExits(histogram);
  };

  const reset = () => {
    slider.value = String(chosen.place);
    slider.setAttribute("aria-valuetext", "reported threshold");
    for (const [name, text] of Object.entries(written)) figures[name].textContent = text;
    for (const chart of curves) chart.querySelector(".cross").setAttribute("visibility", "hidden");
    drawExits(chosen.histogram);
    back.disabled = true;
  };

  const choose = (place) => {
    slider.value = String(place);
    back.disabled = false;
    show(place);
  };

  slider.addEventListener("input", () => choose(Number(slider.value)));
  back.addEventListener("click", () => { reset(); slider.focus(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  slider.addEventListener("keydown", (event) => { if (event.key === "Escape") reset(); });
  for (const chart of curves) {
    const follow = (event) => {
      const box = chart.getBoundingClientRect();
      const { low, high, start, end } = scale(chart, "x");
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const saved = (low + ((x - start) / (end - start)) * (high - low)) / 100;
      let nearest = 0;
      points.forEach((point, place) => {
        const here = Math.abs(1 - point[2] / layers - saved);
        if (here < Math.abs(1 - points[nearest][2] / layers - saved)) nearest = place;
      });
      choose(nearest);
    };
    chart.addEventListener("pointermove", follow);
    chart.addEventListener("pointerdown", follow);
    chart.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") reset(); });
  }
  form.hidden = false;
  reset();
})();

(() => {
  "use strict";
  const legend = document.getElementById("legend");
  if (!legend) return;
  const figure = legend.closest("figure");
  const pressed = new Set();
  const light = (methods) => {
    figure.classList.toggle("dimmed", methods.size > 0);
    for (const one of figure.querySelectorAll("[data-method]")) {
      one.classList.toggle("lit", methods.has(one.dataset.method));
    }
  };
  for (const item of legend.querySelectorAll("li[data-method]")) {
    const method = item.dataset.method;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.append(...item.querySelector(".label").childNodes);
    item.querySelector(".label").replaceWith(button);
    button.addEventListener("click", () => {
      if (!pressed.delete(method)) pressed.add(method);
      button.setAttribute("aria-pressed", String(pressed.has(method)));
      light(pressed);
    });
    item.addEventListener("pointerenter", () => light(new Set([...pressed, method])));
    item.addEventListener("pointerleave", () => light(pressed));
  }
})();
