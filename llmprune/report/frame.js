(() => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const themes = read("themes");
  const plots = [...document.querySelectorAll(".plot")].map((place) => ({ place, figure: read(`${place.id}-data`) }));
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

  const draw = (theme, width) => {
    for (const { place, figure } of plots) {
      const { data, layout } = structuredClone(figure); // plotly keeps and changes what it is given
      Object.assign(layout, { template: themes[theme], autosize: width === undefined, width });
      Plotly.react(place, data, layout, config);
    }
  };
  const drawn = () => draw(dark.matches ? "dark" : "light");
  drawn();
  dark.addEventListener("change", drawn);
  addEventListener("beforeprint", () => draw("light", 640)); // paper is white, and narrower than most screens
  addEventListener("afterprint", drawn);
})();
