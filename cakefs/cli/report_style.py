"""Looks and behaviour of the report: a style sheet and a script that touches nothing but the page."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf7;--card:#fff;--fg:#201e1a;--mute:#726c62;--line:#e7e2d8;--u:#d3cdc1;
--veil:rgb(255 255 255/.76);--edge:rgb(60 50 30/.13);--l0:.5;--l1:.27;--c0:.16;--bar:#3b63c4;--bar2:#b8b1a4}
@media(prefers-color-scheme:dark){:root{--bg:#141519;--card:#1b1d22;--fg:#eceae5;--mute:#98948c;--line:#2b2e35;--u:#474a52;
--veil:rgb(27 29 34/.76);--edge:rgb(255 255 255/.1);--l0:.82;--l1:-.27;--c0:.15;--bar:#7ea2ff;--bar2:#5b5f69}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:40px 32px 96px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;font-variant-numeric:tabular-nums}
.kicker{margin:0;color:var(--mute);font-size:13px;letter-spacing:.02em}
h1{margin:.2em 0 .1em;font-size:clamp(26px,3.4vw,40px);line-height:1.15;letter-spacing:-.022em;font-weight:680}
.lead{margin:.3em 0 0;color:var(--mute);max-width:70ch;font-size:16px}
h2{margin:0 0 14px;font-size:17px;letter-spacing:-.01em;font-weight:640}
small{color:var(--mute);font-weight:400;font-size:12.5px}
.bills{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:20px;margin:30px 0 26px}
.bill{margin:0;padding:18px 20px 16px;background:var(--card);border:1px solid var(--line);border-radius:12px}
.bill figcaption{font-weight:600;margin-bottom:10px}
.bill dl{display:grid;grid-template-columns:118px 1fr;gap:7px 12px;margin:0;align-items:center}
.bill dt{color:var(--mute);font-size:13.5px}
.bill dd{margin:0;display:flex;align-items:center;gap:9px;padding-right:72px}
.bill b{font-weight:600;font-size:13.5px;white-space:nowrap;margin-right:-72px}
.bar{height:13px;min-width:2px;border-radius:3px;background:var(--bar2);flex:none}
.bar.c{background:var(--bar)}
.legend{display:flex;flex-wrap:wrap;gap:8px 26px;margin:0 0 26px;color:var(--mute);font-size:13px}
.legend>span{display:flex;align-items:center;gap:8px}
.legend .cells{display:flex;gap:1px}
.legend i{width:14px}
.family{margin:0 0 22px;padding:18px 20px 20px;background:var(--card);border:1px solid var(--line);border-radius:12px}
.map{overflow-x:auto}
.row{display:grid;grid-template-columns:250px calc(var(--r)*15px) minmax(calc(var(--n)*5px),1fr) 92px;gap:0 14px;
align-items:center;padding:3px 0;min-width:calc(384px + var(--r)*15px + var(--n)*5px)}
.axis{color:var(--mute);font-size:11px;line-height:1.2;padding:0 0 2px}
.axis b{font-weight:400;width:0;overflow:visible;white-space:nowrap}
.name{position:sticky;left:0;z-index:1;background:var(--card);overflow-wrap:anywhere;line-height:1.3;
padding:2px 6px 2px 0}
.name>*{margin-right:8px}
.name b{font-weight:560;font-size:14px}
.name em{font-style:normal;font-size:11px;color:var(--mute);border:1px solid var(--line);
border-radius:20px;padding:0 7px;white-space:nowrap}
.name u{display:inline-block;width:9px;height:9px;border-radius:50%;text-decoration:none}
.rest{display:flex;gap:1px;justify-content:flex-end}
.rest i{width:14px}
.row .cells{display:grid;grid-template-columns:repeat(var(--n),minmax(4px,24px));gap:1px}
.size{text-align:right;font-size:13.5px;line-height:1.25;white-space:nowrap}
.size small{display:block;font-size:11.5px}
i,u{--f:oklch(calc(var(--l0) + var(--t)*var(--l1)) calc(var(--c0) - var(--t)*.03) calc(var(--h) + 70*var(--t)));
background:linear-gradient(var(--veil),var(--veil)) 0 0/100% calc(100% - var(--p,100%)) no-repeat,
var(--g,linear-gradient(var(--f),var(--f)))}
i{display:block;height:24px;border-radius:2.5px;box-shadow:inset 0 0 0 1px var(--edge)}
i.u{--f:var(--u)}
.dim i{opacity:.22}
.dim i.hit{opacity:1;box-shadow:0 0 0 1.5px var(--fg)}
#tip{position:fixed;z-index:9;pointer-events:none;max-width:360px;padding:9px 12px;border-radius:9px;
background:var(--fg);color:var(--bg);font-size:13px;line-height:1.4;
box-shadow:0 8px 26px rgb(0 0 0/.28);display:none;white-space:pre-line}
.numbers{margin-top:40px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:8px 14px 8px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--mute);font-weight:500;font-size:12.5px;white-space:nowrap}
tbody th{font-weight:560}
tbody th small{display:block}
.n{text-align:right;white-space:nowrap}
td:nth-child(6){max-width:520px}
.numbers p{color:var(--mute);font-size:13px;max-width:90ch}
@media(max-width:760px){body{padding:24px 16px 64px}.rest i{width:8px}
.row{grid-template-columns:140px calc(var(--r)*9px) minmax(calc(var(--n)*5px),1fr) 76px;
min-width:calc(258px + var(--r)*9px + var(--n)*5px)}}
@media print{body{max-width:none}.family{break-inside:avoid}}
"""

SCRIPT = """
"use strict";
(() => {
const {models, tints} = JSON.parse(document.getElementById("data").textContent);
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
const places = new Map();
for (const cell of document.querySelectorAll("i[data-t]"))
  for (const tint of cell.dataset.t.split(",")) {
    if (!places.has(tint)) places.set(tint, []);
    places.get(tint).push(cell);
  }
const size = bytes => {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < 5) { bytes /= 1000; unit++; }
  return (unit ? bytes.toPrecision(3) : bytes) + " " + units[unit];
};
let lit = [];
const clear = () => {
  for (const cell of lit) cell.classList.remove("hit");
  lit = [];
  document.body.classList.remove("dim");
  tip.style.display = "none";
};
const say = cell => {
  const row = cell.closest(".row"), [all, here, shared] = cell.dataset.s.split(",").map(Number);
  const lines = [models[row.dataset.m] + ", " + cell.dataset.p];
  lines.push(size(all) + (here < all ? ", " + Math.floor(100 * here / all) + " % here" : ", here"));
  const own = (cell.dataset.t || "").split(",").filter(Boolean);
  if (!own.length) lines.push("nowhere else");
  else {
    if (shared < all) lines.push(size(shared) + " of it elsewhere, too");
    const others = new Set();
    for (const tint of own) for (const other of places.get(tint)) if (other !== cell) others.add(other);
    const names = new Set([...others].map(other => models[other.closest(".row").dataset.m]));
    const [home, place] = tints[own[0]];
    lines.push("at home in " + models[home] + ", " + place);
    lines.push("in " + others.size + (others.size === 1 ? " other place, " : " other places, ") +
      names.size + (names.size === 1 ? " model" : " models"));
  }
  return lines.join("\\n");
};
document.addEventListener("pointerover", event => {
  const cell = event.target.closest(".row i");
  clear();
  if (!cell) return;
  tip.textContent = say(cell);
  tip.style.display = "block";
  if (cell.dataset.t) {
    lit = cell.dataset.t.split(",").flatMap(tint => places.get(tint));
    for (const other of lit) other.classList.add("hit");
    document.body.classList.add("dim");
  }
});
document.addEventListener("pointermove", event => {
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12
    : event.clientY + 18) + "px";
});
document.addEventListener("pointerleave", clear);
})();
"""
