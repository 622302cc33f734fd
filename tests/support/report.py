"""Measured results as a table and as JSON: the Python twin of tests/bench/report.c.

build/bench/<target>.json is an array of {"name", "value", "unit", "against", "ratio", "bar", "met"}. `against` is what the
value is compared with, `ratio` value / against, `bar` the limit that the ratio (or, without `against`, the value) must
keep; null where there is none.
"""
import json
import os

from . import BUILD


def row(name, value, unit, against=None, bar=None, at_least=True):
    """One result. With a bar, `met` says whether the ratio (or the bare value) is at least, or at most, the bar."""
    ratio = None if against in (None, 0) else value / against
    judged = value if against is None else ratio
    met = None
    if bar is not None:
        met = judged is not None and bool(judged >= bar if at_least else judged <= bar)
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio, "bar": bar, "met": met}


def table(head, lines, out=print):
    """Aligned columns: the first to the left, the others to the right. Cells are strings or numbers."""
    text = [[cell if isinstance(cell, str) else "" if cell is None else f"{cell:,.4g}" for cell in line] for line in lines]
    width = [max(len(line[i]) for line in [list(head)] + text) for i in range(len(head))]

    def show(line):
        out("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width))).rstrip())

    show(list(head))
    show(["-" * w for w in width])
    for line in text:
        show(line)


def finish(target, rows, show=True, out=print):
    """Prints the rows, writes build/bench/<target>.json, returns whether every bar was met."""
    if show:
        table(["name", "value", "unit", "against", "ratio", "bar", "met"],
              [[r["name"], r["value"], r["unit"], r["against"], r["ratio"], r["bar"],
                {None: "", True: "yes", False: "NO"}[r["met"]]] for r in rows], out)
    folder = os.path.join(BUILD, "bench")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, target + ".json")
    with open(path, "w", encoding="utf8") as file:
        json.dump(rows, file, indent=1)
        file.write("\n")
    out(f"written: {os.path.relpath(path)}")
    return all(r["met"] is not False for r in rows)
