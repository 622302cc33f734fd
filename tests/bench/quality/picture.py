"""The frontier as an SVG: quality against bytes, one panel for each measure and length. Written by hand, no library needed."""
import math
from xml.sax.saxutils import escape

PANEL_W, PANEL_H, GAP_X, GAP_Y, LEFT, TOP, LEGEND = 270, 200, 62, 74, 64, 92, 118
INK, SOFT, GRID = "#1f2933", "#66727f", "#e3e8ed"
STYLE = {  # family: colour, width, dash
    "cooled fold": ("#c8102e", 3.2, ""), "balance": ("#e8743b", 2.4, ""), "fold": ("#e8743b", 1.6, "5 3"),
    "balance (equal shares)": ("#e8743b", 1.2, "2 3"),
    "uniform": ("#9aa5b1", 1.4, ""), "StreamingLLM": ("#7b8794", 1.4, "2 3"), "BalanceKV (authors)": ("#5b8c5a", 1.6, ""),
    "KeyDiff": ("#3d7ea6", 1.6, ""), "SnapKV": ("#8d6cab", 1.6, ""), "WildCat": ("#1b998b", 1.6, ""),
}
MARKS = {"int4 alone": "#52606d", "int2 alone": "#52606d", "dense4": "#c8102e", "dense8": "#c8102e"}
MEASURES = [("needle recall", lambda s: s.needle, 1.0), ("bAbI recall", lambda s: s.babi, 1.0),
            ("NLL above exact, nats", lambda s: s.above, None), ("attention error", lambda s: s.error, None)]


class Panel:
    """One set of axes: bytes on a logarithmic scale (4 % to 55 % of bf16), the measure on a linear one, clipped."""

    LOW, HIGH = math.log(1 / 40), math.log(0.6)

    def __init__(self, left, top, low, high):
        self.left, self.top, self.low, self.high = left, top, low, high

    def x(self, rate):
        return self.left + PANEL_W * (math.log(1 / rate) - self.LOW) / (self.HIGH - self.LOW)

    def y(self, value):
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.top + PANEL_H * (1 - share)

    def axes(self, out, title):
        out.append(text(self.left, self.top - 12, title, 13, INK, weight="600"))
        for i in range(5):
            value = self.low + (self.high - self.low) * i / 4
            y = self.y(value)
            out.append(line(self.left, y, self.left + PANEL_W, y, GRID))
            out.append(text(self.left - 8, y + 4, f"{value:.2f}", 11, SOFT, "end"))
        for rate in (2, 4, 8, 16, 32):
            x = self.x(rate)
            out.append(line(x, self.top, x, self.top + PANEL_H, GRID))
            out.append(text(x, self.top + PANEL_H + 17, f"1/{rate}", 11, SOFT, "middle"))


def text(x, y, words, size, colour, anchor="start", weight="400"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>')


def line(x1, y1, x2, y2, colour, width=1.0, dash=""):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")


def curve(points, colour, width, dash):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{1.3 + width / 2:.1f}" fill="{colour}"/>' for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + f"/>{dots}")


def frontier(table, family, measure, lowest):
    """[(rate, value)] of a family: at each nominal rate its best width."""
    points = {}
    for s in table:
        if s.family == family and s.nominal and measure(s) is not None:
            seen = points.get(s.nominal)
            better = seen is None or (measure(s) < seen[1] if lowest else measure(s) > seen[1])
            points[s.nominal] = (s.rate, measure(s)) if better else seen
    return [points[nominal] for nominal in sorted(points)]


def draw_panel(out, panel, table, title, measure, lowest):
    panel.axes(out, title)
    for family, (colour, width, dash) in reversed(STYLE.items()):  # ours last, on top
        points = frontier(table, family, measure, lowest)
        if points:
            out.append(curve([(panel.x(rate), panel.y(value)) for rate, value in points], colour, width, dash))
    for s in table:
        if s.family in MARKS and measure(s) is not None:
            x, y = panel.x(s.rate), panel.y(measure(s))
            out.append(f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{MARKS[s.family]}" '
                       f'transform="rotate(45 {x:.1f} {y:.1f})"><title>{escape(s.name)}</title></rect>')


def draw_legend(out, top, width, families):
    column = (width - 2 * LEFT) / 5
    for i, family in enumerate(families):
        x, y = LEFT + column * (i % 5), top + 24 * (i // 5)
        colour, thickness, dash = STYLE[family]
        out.append(line(x, y - 4, x + 28, y - 4, colour, thickness, dash))
        out.append(text(x + 36, y, family, 12, INK, weight="600" if i < 4 else "400"))
    out.append(text(LEFT, top + 24 * -(-len(families) // 5) + 6, "Diamonds: every token at few bits (dense8, dense4 ours; "
                    "int4, int2). Baselines with the better of 3 and 4 bits. Further up (recall) or down (NLL, error), and further "
                    "left, is better.", 12, SOFT))


def limits(table, measure, high):
    """Lowest and highest value of a panel: recall from 0 to 1, others from the data, 0 included."""
    values = [measure(s) for s in table if s.family in STYLE and s.nominal and measure(s) is not None] or [1.0]
    return (0.0, high) if high else (min(0.0, *values), max(0.01, *values))


def draw(sums, path):
    """Panels for the shortest window of each length."""
    shortest = min(window for _, window in sums)
    shown = [(key, table) for key, table in sums.items() if key[1] == shortest]
    width = LEFT + len(MEASURES) * (PANEL_W + GAP_X)
    height = TOP + len(shown) * (PANEL_H + GAP_Y) + LEGEND
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           'font-family="Helvetica, Arial, sans-serif">', f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
           text(LEFT, 32, "What a compressed KV cache still knows, for its bytes", 20, INK, weight="700"),
           text(LEFT, 54, f"stored bytes as a share of bf16; newest {shortest} tokens exact; compressed before any question is "
                "known", 13, SOFT)]
    for row, ((tokens, _), table) in enumerate(shown):
        top = TOP + row * (PANEL_H + GAP_Y)
        for number, (title, measure, high) in enumerate(MEASURES):
            panel = Panel(LEFT + number * (PANEL_W + GAP_X), top, *limits(table, measure, high))
            draw_panel(out, panel, table, f"{title}, {tokens:,} tokens", measure, number > 1)
    present = {s.family for _, table in shown for s in table}
    draw_legend(out, TOP + len(shown) * (PANEL_H + GAP_Y) + 4, width, [family for family in STYLE if family in present])
    out.append("</svg>")
    with open(path, "w", encoding="utf8") as file:
        file.write("\n".join(out) + "\n")
    print(f"drawn: {path}")
