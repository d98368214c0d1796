// Draws every chart in the page's own colours, and again when the colours or the width change.
"use strict";

// Pixels kept free to the right of the longest bar for its label, at most this share of the width.
const LABEL_PX = 216, LABEL_SHARE = 0.62;

function themed(figure, width) {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line] = ["--ink", "--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = {color: muted, gridcolor: line, linecolor: line, zeroline: false, tickfont: {color: muted}};
  const layout = {
    ...figure.layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 12.5, color: ink},
    xaxis: {...axis, ...figure.layout.xaxis}, yaxis: {...axis, ...figure.layout.yaxis},
    hoverlabel: {bgcolor: style.getPropertyValue("--raised").trim(), bordercolor: line, font: {color: ink, size: 12.5}, align: "left"},
    width,
  };
  if (figure.layout.annotations)
    layout.annotations = figure.layout.annotations.map((note) => ({
      ...note, text: note.text.replace("<span>", `<span style="color:${muted}">`)}));
  if (figure.layout.meta) {
    const room = Math.min(LABEL_PX, LABEL_SHARE * width);
    layout.xaxis.range = [0, figure.layout.meta.longest * width / (width - room)];
  }
  const data = figure.data.map((trace) => ({
    ...trace,
    ...(trace.error_x && {error_x: {...trace.error_x, color: muted}}),
    ...(trace.meta === "roof" && {line: {...trace.line, color: muted}}),
  }));
  return [data, layout];
}

function draw(place) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  const [data, layout] = themed(figure, place.clientWidth);
  Plotly.react(place.querySelector("div"), data, layout, {displayModeBar: false});
}

const places = [...document.querySelectorAll(".chart")];
for (const place of places) {
  place.append(document.createElement("div"));
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    draw(place);
  }).observe(place);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => places.forEach(draw));
