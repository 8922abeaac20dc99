const stations = [...document.querySelectorAll(".station > h2")];
const layers = [...document.querySelectorAll("#layers > details")];
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "o") {
    const open = !layers.every((layer) => layer.open);
    for (const layer of layers) layer.open = open;
  }
  const way = { n: 1, p: -1 }[event.key];
  if (!way) return;
  const here = stations.indexOf(document.activeElement);
  const next = stations[Math.max(0, Math.min(stations.length - 1, here + way))];
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "start" });
});
