"""The page of the report: its style sheet, for wide and narrow windows, light and dark, and its script, for mouse and keys."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
{reload}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{
  color-scheme: light dark;
  --paper: #fff; --ink: #222; --soft: #595959; --line: #ddd; --grid: #e8e8e8;
  --link: #2457a6; --alarm: #d7191c; --rescue: #12803a; --hot: #e6007e; --columns: 1;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #15181c; --ink: #e6e6e6; --soft: #a8adb3; --line: #3a4047; --grid: #2a2f35;
    --link: #86b4ff; --alarm: #ff7272; --rescue: #5fd38a; --hot: #ff7ac4;
  }}
}}
@media (min-width: 760px) {{ :root {{ --columns: 2; }} }}
@media (min-width: 1150px) {{ :root {{ --columns: 3; }} }}
body {{ font: 14px/1.45 "DejaVu Sans", Verdana, sans-serif; color: var(--ink); background: var(--paper);
  margin: 1em auto; padding: 0 clamp(8px, 2vw, 28px); max-width: 1500px; }}
h1 {{ font-size: 20px; margin: 0 0 .6em; overflow-wrap: anywhere; }}
h2 {{ font-size: 16px; margin: 0; }}
h3 {{ font-size: 13px; margin: 0 0 .2em; overflow-wrap: anywhere; }}
h3 span {{ font-weight: normal; color: var(--soft); }}
nav {{ margin: 1em 0; display: flex; flex-wrap: wrap; gap: .3em 1em; }}
a {{ color: var(--link); }}
p, .legend {{ color: var(--soft); margin: .3em 0; }}
:focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .25em 1.2em .25em 0; border-bottom: 1px solid var(--line); }}
thead th {{ position: sticky; top: 0; background: var(--paper); vertical-align: bottom; }}
tbody th {{ min-width: 7em; overflow-wrap: anywhere; }}
.scroll {{ max-height: max(22em, 80vh); overflow: auto; width: fit-content; max-width: 100%; }}
#verdict ul {{ box-sizing: border-box; padding-left: 1.4em; margin: .4em 0 1em; overflow-wrap: anywhere; }}
details {{ margin-top: 1.2em; }}
summary {{ font-weight: bold; cursor: pointer; }}
@media (max-width: 759px) {{
  th, td {{ white-space: nowrap; }}
  tbody th {{ white-space: normal; max-width: 9em; }}  /* a long name leaves room for what it did */
}}
main, .row {{ display: grid; gap: 14px 16px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }}
section {{ grid-column: 1 / -1; margin-top: 1em; }}
@media (min-width: 1150px) {{
  .n1 {{ grid-column: span 1; }} .n1 > .row {{ --columns: 1; }}
  .n2 {{ grid-column: span 2; }} .n2 > .row {{ --columns: 2; }}
}}
@media (min-width: 760px) and (max-width: 1149px) {{ .n1 {{ grid-column: span 1; }} .n1 > .row {{ --columns: 1; }} }}
.row {{ margin-top: .6em; align-items: end; }}
figure {{ margin: 0; min-width: 0; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-size: 11px; fill: var(--soft); }}
svg path {{ fill: none; stroke-width: 1.2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }}
svg .grid {{ stroke: var(--grid); stroke-width: 1; }}
svg .model {{ stroke: var(--ink); }}
svg.many path {{ stroke-width: .8; }}
svg .dot.dot {{ stroke-width: 5; stroke-linecap: round; }}
svg .validation {{ stroke: var(--link); stroke-dasharray: 7 2 2 2; }}
svg .run-validation {{ stroke-dasharray: 7 2 2 2; }}
svg .ceiling {{ stroke: var(--soft); stroke-dasharray: 5 3; }}
svg .alarm, svg .lost {{ stroke: var(--alarm); stroke-width: 1.6; }}
svg .rescue {{ stroke: var(--rescue); stroke-dasharray: 7 2 2 2; }}
svg .first-alarm {{ stroke: var(--alarm); stroke-dasharray: 1.5 2.5; }}
svg .hot.hot {{ stroke: var(--hot) !important; stroke-width: 2.6; }}
svg image {{ image-rendering: pixelated; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .1em 1.2em; padding: 0; list-style: none; font-size: 12px; }}
.legend svg {{ display: inline-block; width: 26px; height: 12px; vertical-align: -2px; }}
.legend i {{ display: inline-block; width: 90px; height: .8em; vertical-align: -1px; margin: 0 .4em; }}
#name {{ position: fixed; left: 8px; bottom: 8px; padding: .1em .5em; max-width: 90vw; overflow-wrap: anywhere;
  background: var(--ink); color: var(--paper); pointer-events: none; }}
#name:empty {{ display: none; }}
</style>
<header>
<h1>{title}</h1>
{summary}
<nav aria-label="Figures">{links}</nav>
<p id="keys">Lighter curves are deeper layers. Point at a curve for the name of its layer, which lights up in every panel; or go
to a panel by Tab, and from curve to curve by the arrow keys.</p>
</header>
<main>
{sections}
</main>
<div id="name" role="status"></div>
<script>
const name = document.getElementById("name"), layers = {{}};
for (const path of document.querySelectorAll('svg path[id*="/"]:not(.alarm, .lost)')) {{
  const [run, panel, layer] = path.id.split("/").map(decodeURIComponent);
  path.layer = panel.startsWith("all ") ? run : layer;
  path.text = `${{layer}} · ${{panel}} · ${{run}}`;
  (path.ownerSVGElement.curves ??= []).push(path);
  (layers[path.layer] ??= []).push(path);
}}
function show(path, x, y) {{
  for (const hot of document.querySelectorAll(".hot")) hot.classList.remove("hot");
  name.textContent = path ? path.text : "";
  name.style = "";
  if (!path) return;
  for (const other of layers[path.layer]) {{
    other.classList.add("hot");
    other.parentNode.append(other);  // in front of the others
  }}
  if (x === undefined) return;
  name.style.left = `${{Math.max(0, Math.min(x + 14, innerWidth - name.offsetWidth - 5))}}px`;
  name.style.top = `${{Math.min(y + 14, innerHeight - name.offsetHeight - 5)}}px`;
  name.style.bottom = "auto";
}}
// How far below or above the point (x, y) the curve passes, in units of the drawing.
function gap(path, x, y) {{
  const at = path.points ??= path.getAttribute("d").match(/-?[\\d.]+/g).map(Number);
  if (x < at[0] - 5 || x > at.at(-2) + 5) return Infinity;
  let i = 2;
  while (i < at.length - 2 && at[i] < x) i += 2;
  const part = Math.min(1, Math.max(0, (x - at[i - 2]) / (at[i] - at[i - 2] || 1)));
  return Math.abs(at[i - 1] + part * (at[i + 1] - at[i - 1]) - y);
}}
document.addEventListener("pointermove", event => {{
  const panel = event.target.closest("figure svg");
  let nearest = null, least = 10;
  if (panel) {{
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(panel.getScreenCTM().inverse());
    for (const path of panel.curves ?? []) {{
      const distance = gap(path, point.x, point.y);
      if (distance < least) [nearest, least] = [path, distance];
    }}
  }}
  show(nearest, event.clientX, event.clientY);
}});
document.addEventListener("keydown", event => {{
  const by = {{ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}}[event.key], panel = event.target;
  if (event.key == "Escape") show(null);
  if (!by || !panel.curves) return;
  event.preventDefault();
  panel.order ??= [...panel.curves];
  panel.at = panel.at === undefined ? 0 : (panel.at + by + panel.order.length) % panel.order.length;
  show(panel.order[panel.at]);
}});
document.addEventListener("focusout", () => show(null));
</script>
</html>
"""
