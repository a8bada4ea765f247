const config = JSON.parse(document.getElementById("config").textContent);

async function draw(figure) {
  const source = figure.querySelector("script");
  if (!source) return;
  const spec = JSON.parse(source.textContent);
  source.remove();
  try {
    await vegaEmbed(figure, { ...spec, config }, { actions: false, renderer: "svg", tooltip: { theme: "custom" } });
  } catch (error) {
    figure.textContent = "The chart cannot be drawn: " + error.message;
    throw error;
  }
}

// What is seen first, then the rest while nothing else happens, so that a print has every chart.
(async () => {
  for (const figure of document.querySelectorAll("figure")) {
    if (figure.closest("details")) await new Promise((next) => setTimeout(next, 30));
    await draw(figure);
  }
  document.documentElement.dataset.drawn = "all";
})();
for (const part of document.querySelectorAll("details")) {
  part.addEventListener("toggle", () => part.querySelectorAll("figure").forEach(draw));
}

const body = document.querySelector("#variants tbody");
for (const button of document.querySelectorAll("#variants thead button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, column = Number(button.dataset.column);
    const downwards = heading.getAttribute("aria-sort") !== "descending";
    for (const other of document.querySelectorAll("#variants thead th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", downwards ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[column];
      if (column && row.cells.length < heading.parentElement.cells.length) return null;
      if (cell.dataset.value === undefined) return cell.textContent.toLowerCase();
      return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    };
    const rows = [...body.rows].sort((one, two) => {
      const a = value(one), b = value(two);
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -1 : a > b ? 1 : 0) * (downwards ? -1 : 1);
    });
    body.append(...rows);
  });
}

const openTarget = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", openTarget);
openTarget();

let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => closed.forEach((part) => (part.open = false)));
