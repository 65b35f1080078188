// Runs before the first paint, so that a chosen theme never flashes the other one. Without a choice the system's holds.
try {
  const chosen = localStorage.getItem("gemwright.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // a browser that keeps nothing for this page keeps no theme either
}
