// Draws every chart in the page's own colours, and again when the colours or the width change.
"use strict";

const FONT_PX = 12.5;
const MOST_LABEL = 0.8;  // of the width; a longer label is cut off rather than leaving no room for bars
const pen = document.createElement("canvas").getContext("2d");

// The end of the axis at which every label still fits behind its bar.
function labelledRange(labels, width) {
  pen.font = `bold ${FONT_PX}px ${getComputedStyle(document.body).fontFamily}`;
  const ends = labels.x.map((end, i) => {
    const text = new DOMParser().parseFromString(labels.text[i], "text/html").body.textContent;
    const room = Math.min(pen.measureText(text).width + 8, MOST_LABEL * width);
    return end * width / (width - room);
  });
  return [0, Math.max(...ends)];
}

function themed(figure, width) {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line, raised, error] =
    ["--ink", "--muted", "--line", "--raised", "--error"].map((name) => style.getPropertyValue(name).trim());
  const axis = {color: muted, gridcolor: line, linecolor: line, zeroline: false};
  const layout = {
    ...figure.layout, width,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: FONT_PX, color: ink},
    xaxis: {...axis, ...figure.layout.xaxis}, yaxis: {...axis, ...figure.layout.yaxis},
    annotations: (figure.layout.annotations || []).map((note) => (
      {...note, text: note.text.replace("<span>", `<span style="color:${muted}">`)})),
    hoverlabel: {bgcolor: raised, bordercolor: line, font: {color: ink, size: FONT_PX}, align: "left"},
  };
  const labels = figure.data.find((trace) => trace.meta === "labels");
  if (labels) layout.xaxis.range = labelledRange(labels, width);
  const data = figure.data.map((trace) => ({
    ...trace,
    ...(trace.error_x && {error_x: {...trace.error_x, color: muted}}),
    ...(trace.meta === "error" && {textfont: {color: error}}),
    ...(trace.meta === "roof" && {line: {...trace.line, color: muted}}),
  }));
  return [data, layout];
}

function draw(place) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  Plotly.react(place.querySelector("div"), ...themed(figure, place.clientWidth), {displayModeBar: false});
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
