"""The page's style sheet: system fonts, light and dark by the reader's setting, one column on a phone."""

CSS = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5b6575;--paper:#fff;--card:#f5f7fa;--line:#dde2ea;--good:#1f7a43;
--bad:#b3372f;--accent:#1f5fae}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#a3acba;--paper:#14171c;--card:#1d2229;--line:#343b46;
--good:#67c48c;--bad:#f08a80;--accent:#7db4f5}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
p.lead{font-size:1.15rem;margin:.4rem 0 1rem;padding:.9rem 1.1rem;background:var(--card);
border-left:4px solid var(--accent);border-radius:0 .4rem .4rem 0}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.7rem;margin:1rem 0}
.numbers div{background:var(--card);border-radius:.5rem;padding:.7rem .9rem}
.numbers b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.numbers span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto;margin:.4rem 0 1rem}
table{border-collapse:collapse;min-width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.3rem 0}
th,td{padding:.35rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
th{color:var(--soft);font-weight:600}
tr.best td{background:var(--card);font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}
td.why{white-space:normal;text-align:left;min-width:14rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1.2rem}
figure{margin:0;padding:.8rem;border:1px solid var(--line);border-radius:.5rem}
figure h3{font-size:1rem;margin:0 0 .4rem}
figure svg{width:100%;height:auto;display:block;color:var(--ink)}
figure svg text{font-family:inherit}
li{margin:.25rem 0}
code{font-size:.9em;overflow-wrap:anywhere}
"""
