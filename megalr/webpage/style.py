"""The page's style sheet: light, dark and for print, from 320 pixels wide on. Text has a contrast of 4.5 or more."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f7f8fa; --ink: #1b1f26; --soft: #586070; --rule: #dfe3e8; --grid: #e6e9ee;
  --good: #1a7446; --warn: #8a5a00; --busy: #0b62a4; --code: #f3f5f7;
  --c0: #0b62a4; --c1: #b4420a; --c2: #1a7446; --c3: #7546a3; --c4: #806000; --c5: #ad2b69; --c6: #00727f;
  --c7: #5a6270;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12151a; --card: #191d24; --ink: #e7eaef; --soft: #a3acb9; --rule: #2c323c; --grid: #262c35;
    --good: #62d296; --warn: #e8b54a; --busy: #6cb3f5; --code: #1d222a;
    --c0: #6cb3f5; --c1: #ff9a68; --c2: #62d296; --c3: #c4a3f2; --c4: #e0bd45; --c5: #f48dc0; --c6: #52d0df;
    --c7: #a9b1bd;
  }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --rule: #bbbbbb; --grid: #dddddd;
    --good: #1a7446; --warn: #8a5a00; --busy: #0b62a4; --code: #ffffff;
    --c0: #0b62a4; --c1: #b4420a; --c2: #1a7446; --c3: #7546a3; --c4: #806000; --c5: #ad2b69; --c6: #00727f;
    --c7: #5a6270;
  }
}
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.b0 { --c: var(--c0); } .b1 { --c: var(--c1); } .b2 { --c: var(--c2); } .b3 { --c: var(--c3); }
.b4 { --c: var(--c4); } .b5 { --c: var(--c5); } .b6 { --c: var(--c6); } .b7 { --c: var(--c7); }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 9 3 2 3; }
.d4 { stroke-dasharray: 4 2; } .d5 { stroke-dasharray: 12 4; } .d6 { stroke-dasharray: 1 2; }
.d7 { stroke-dasharray: 6 2 1 2; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
.page { max-width: 1160px; margin: 0 auto; padding: 0 20px 48px; }
header { padding: 28px 0 4px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 10px; padding-top: 8px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 80ch; }
.top { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
.state {
  font-weight: 600; font-size: 14px; border: 1px solid currentColor; border-radius: 99px; padding: 1px 12px;
}
.state.finished { color: var(--good); } .state.stopped { color: var(--warn); }
.state.running { color: var(--busy); }
.method { color: var(--soft); margin: 6px 0 0; overflow-wrap: anywhere; max-width: none; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; margin: 18px 0 0;
  padding: 0;
}
.facts div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 8px 12px; }
.facts dt { color: var(--soft); font-size: 13px; } .facts dd { margin: 0; font-size: 18px; font-weight: 600; }
.facts small { display: block; font-size: 12px; font-weight: 400; color: var(--soft); }
.facts .main dd { font-size: 26px; line-height: 1.25; color: var(--c1); }
.warnings {
  border-left: 4px solid var(--warn); background: var(--card); padding: 6px 14px; margin: 16px 0 0;
  overflow-wrap: anywhere;
}
nav {
  position: sticky; top: 0; z-index: 5; background: var(--paper); border-bottom: 1px solid var(--rule);
  margin: 14px -20px 0;
  padding: 8px 20px; display: flex; gap: 4px 16px; overflow-x: auto; white-space: nowrap; font-size: 14px;
}
nav a, a { color: var(--c0); } nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
section { scroll-margin-top: 44px; }
.note { color: var(--soft); font-size: 13.5px; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px; }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.grid:not(.small) > :last-child:nth-child(odd) { grid-column: 1 / -1; }
.meter {
  display: inline-block; width: 90px; height: 9px; margin-right: 8px; border-radius: 3px; background: var(--grid);
}
.meter i { display: block; height: 100%; border-radius: 3px; background: var(--c0); print-color-adjust: exact; }
.wide { grid-column: 1 / -1; }
.chart, .card {
  margin: 0; min-width: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px;
  break-inside: avoid;
}
.grid + .grid, .grid + .card, .grid + details, .chart + .grid, .chart + .card, .card + .card { margin-top: 18px; }
.chart { display: flex; flex-direction: column; } .chart .frame { margin-top: auto; }
figcaption { min-height: 24px; }
figcaption .note { margin: 0; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 4px 0 0; padding: 0; font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.key { width: 24px; height: 10px; flex: none; }
.frame { position: relative; padding: 24px 12px 0 54px; font-size: 12px; color: var(--soft); }
.frame.both { padding-right: 58px; }
.ylabel { position: absolute; top: 2px; left: 0; right: 0; display: flex; justify-content: space-between; }
.plot { position: relative; height: 190px; cursor: crosshair; touch-action: pan-y; user-select: none; }
.tall .plot { height: 330px; } .small .plot { height: 150px; }
.plot:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
.plot svg, .lane svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; overflow: hidden; }
.plot svg { border-bottom: 1px solid var(--soft); }
svg path { fill: none; vector-effect: non-scaling-stroke; }
path.gridline { stroke: var(--grid); stroke-width: 1; }
path.line { stroke: var(--c); stroke-width: 1.9; stroke-linejoin: round; }
path.line.faint { stroke-width: 1; opacity: .55; }
path.line.points { stroke: none; }
path.dots { stroke: var(--c); stroke-width: 6.5; stroke-linecap: round; }
path.mark { stroke: var(--c); stroke-width: 1.2; opacity: .6; stroke-dasharray: 4 4; }
path.mark.o1 { stroke-dashoffset: 4; }
path.level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
path.tick { stroke: var(--c); stroke-width: 1.4; }
.labels span { position: absolute; white-space: nowrap; pointer-events: none; line-height: 1; }
.labels .y { right: calc(100% + 6px); transform: translateY(-50%); }
.labels .r { left: calc(100% + 6px); transform: translateY(-50%); }
.labels .x { top: calc(100% + 6px); transform: translateX(-50%); }
.labels .at {
  right: 4px; transform: translateY(-130%); background: var(--card); padding: 1px 3px; border-radius: 3px;
}
.xlabel { text-align: center; padding-top: 22px; }
.lanes { margin-top: 8px; }
.lane { position: relative; height: 14px; margin-top: 20px; border-bottom: 1px solid var(--grid); }
.lane span { position: absolute; bottom: 100%; left: 0; line-height: 1.3; color: var(--c); white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
tbody tr:last-child td { border-bottom: 0; }
.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 10em; }
.pairs th { text-align: left; width: 1%; white-space: normal; padding-left: 0; vertical-align: top; }
.card h3 { margin-bottom: 6px; }
.tag {
  font-size: 12px; color: var(--good); border: 1px solid currentColor; border-radius: 99px; padding: 0 7px;
  margin-right: 6px;
}
.bars { margin-top: 10px; } .bar + .bar { margin-top: 10px; }
.bar-label { font-size: 13px; overflow-wrap: anywhere; }
.stack { display: flex; height: 30px; gap: 1px; }
.piece {
  background: var(--c); color: var(--paper); font-size: 12px; line-height: 30px; text-align: center;
  min-width: 1px; overflow: hidden; white-space: nowrap;
}
.piece { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.swatch {
  display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: var(--c); flex: none;
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; }
pre {
  background: var(--code); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; margin: 8px 0 0;
  overflow: auto; max-height: 460px; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
footer {
  margin-top: 40px; border-top: 1px solid var(--rule); padding-top: 10px; color: var(--soft); font-size: 13px;
}
.tip {
  position: absolute; z-index: 4; pointer-events: none; background: var(--paper); color: var(--ink);
  border: 1px solid var(--rule); border-radius: 6px; padding: 5px 9px; font-size: 12.5px; line-height: 1.45;
  box-shadow: 0 2px 10px rgb(0 0 0 / .18); max-width: min(360px, 78vw); overflow-wrap: anywhere;
  top: 6px; margin: 0 12px;
}
.tip i {
  display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--c); margin-right: 6px;
}
.hair { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.drag { position: absolute; top: 0; bottom: 0; background: var(--c0); opacity: .16; pointer-events: none; }
.hint { display: none; line-height: 20px; } .scripted .hint { display: block; }
[hidden] { display: none !important; }
@media (max-width: 620px) {
  .page { padding: 0 12px 32px; } nav { margin: 12px -12px 0; padding: 8px 12px; } header { padding-top: 18px; }
  h1 { font-size: 23px; } .facts { grid-template-columns: 1fr 1fr; gap: 8px; } .chart, .card { padding: 10px; }
  .frame { padding-left: 46px; } .frame.both { padding-right: 50px; } .tall .plot { height: 250px; }
  th, td { padding: 3px 7px; } .piece { font-size: 11px; }
}
@media print {
  nav, .hint { display: none !important; } body { font-size: 12px; } pre { max-height: none; }
  .page { max-width: none; padding: 0; }
  .grid { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; }
}
"""
