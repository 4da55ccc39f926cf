"""Answers that would do something where a page is careless: run a script, load something, or lead where they should not."""

from __future__ import annotations

ELSEWHERE = "https://elsewhere.example"

HOSTILE = [
    "<script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 2'>",
    f"<img src={ELSEWHERE}/a.png>",
    f"![a picture]({ELSEWHERE}/a.png)",
    f"![a picture][1]\n\n[1]: {ELSEWHERE}/b.png",
    "![svg](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+)",
    "<svg><script>window.harmed = 3</script></svg><svg onload='window.harmed = 4'>",
    f"<iframe src='{ELSEWHERE}'></iframe><object data='{ELSEWHERE}'></object><embed src='{ELSEWHERE}'>",
    f"<link rel=stylesheet href='{ELSEWHERE}/a.css'><style>@import '{ELSEWHERE}/b.css'; body {{ display: none }}</style>",
    f"<form action='{ELSEWHERE}'><button>Go on</button></form><base href='{ELSEWHERE}'>",
    f"<meta http-equiv=refresh content='0; url={ELSEWHERE}'>",
    "[click](javascript:window.harmed=5) [click](JaVaScRiPt:window.harmed=5) [click](vbscript:msgbox(1))",
    "[click](data:text/html,<script>window.harmed=6</script>) [click](java&#x73;cript:window.harmed=7)",
    "<javascript:window.harmed=8> [click]( javascript:window.harmed=9)",
    f"[a link]({ELSEWHERE}/a 'title\" onmouseover=\"window.harmed=10') and <{ELSEWHERE}/b>",
    "```html\n<script>window.harmed = 11</script><img src=x onerror='window.harmed = 12'>\n```",
    '```"><script>window.harmed=13</script>\ntext\n```',
    "`<img src=x onerror='window.harmed = 14'>`",
    "<details open ontoggle='window.harmed = 15'><summary>x</summary></details>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.harmed=16&gt;'>",
    "<div id=question name=question style='position:fixed;inset:0'>over all</div>",
    "| a |\n|:-:|\n| <img src=x onerror='window.harmed = 17'> |",
    "<a href='javascript:window.harmed=18' autofocus onfocus='window.harmed=19' tabindex=1>x</a>",
]
