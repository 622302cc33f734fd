"""Results summed over contexts, as tables and as rows with bars (build/bench/quality.json)."""
import math

from support import report

from .configurations import JUDGED

# By rate, with the short window: needles and places answered at least, nats above the exact cache at most.
BARS = {8: (0.99, 0.94, 0.015), 16: (0.98, 0.93, 0.04), 32: (0.97, 0.90, 0.08)}
LONG_WINDOW, LONG_BARS = 512, {16: 0.004, 32: 0.015}
SAME_BYTES = 1.01  # records of one budget differ by what alignment and whole tokens leave over
PIECE_ERROR, PIECE_NLL = 1.10, 0.02  # a fold against compressing in one piece


def mean(values):
    """None of nothing: a table without contexts of a kind has no such measure."""
    return sum(values) / len(values) if values else None


class Sum:
    """One way of storing contexts of one length, over all of them."""

    def __init__(self, tokens, row):
        self.tokens, self.family, self.bits, self.nominal = tokens, row["family"], row["bits"], row["nominal"]
        self.window, self.ours = row["window"], row["ours"]
        self.lists = {"needle": [], "babi": [], "nll": [], "above": [], "kl": [], "error": []}
        self.stored, self.raw = 0, 0.0

    def add(self, row, base):
        for name in ("needle", "babi"):
            self.lists[name] += row.get(name, [])
        for name in ("nll", "kl", "error"):
            self.lists[name] += [row[name]] if name in row else []
        self.lists["above"] += [row["nll"] - base["nll"]] if "nll" in row else []
        self.stored += row["bytes"]
        self.raw += row["bytes"] * row["rate"]

    @property
    def name(self):
        return self.family + (f" int{self.bits}" if self.bits and self.nominal else "") + \
            (f" {self.nominal}x" if self.nominal else "")

    needle = property(lambda self: mean(self.lists["needle"]))
    babi = property(lambda self: mean(self.lists["babi"]))
    nll = property(lambda self: mean(self.lists["nll"]))
    above = property(lambda self: mean(self.lists["above"]))
    kl = property(lambda self: mean(self.lists["kl"]))
    layers = property(lambda self: [mean(layer) for layer in zip(*self.lists["error"])])
    error = property(lambda self: mean(self.layers))
    rate = property(lambda self: self.raw / self.stored if self.stored else 1.0)

    @property
    def spread(self):
        """Standard error of `above` over contexts."""
        values, middle = self.lists["above"], self.above
        n = len(values)
        return math.sqrt(sum((x - middle) ** 2 for x in values) / (n - 1) / n) if n > 1 else None


def sum_up(done):
    """{(tokens, window): [Sum]} with the exact cache first, from [(job, exact judgement, rows)]."""
    sums = {}
    for (tokens, *_), base, rows in done:
        for window in sorted({row["window"] for row in rows}):
            exact = {**base, "family": "exact", "bits": 0, "nominal": 0, "window": window, "ours": False, "bytes": 0,
                     "rate": 1.0}
            table = sums.setdefault((tokens, window), {})
            for row in [exact, *(row for row in rows if row["window"] == window)]:
                table.setdefault((row["family"], row["bits"], row["nominal"]), Sum(tokens, row)).add(row, base)
    return {key: list(table.values()) for key, table in sorted(sums.items())}


def find(table, family, nominal):
    return next((s for s in table if s.family == family and s.nominal == nominal), None)


def best(table, nominal, measure, lowest):
    """The best baseline at a rate: any of its widths; every token at few bits competes where it has not fewer bytes."""
    rivals = [s for s in table if not s.ours and s.family != "exact" and measure(s) is not None and
              (s.nominal == nominal or (s.nominal == 0 and nominal / 2 < s.rate <= nominal))]
    return (min if lowest else max)(rivals, key=measure, default=None)


def against(name, value, unit, other, at_least):
    """A row that asks for no less (or no more) than another's value; 0 has no ratio and is compared as it is."""
    if other == 0:
        return report.row(name, value, unit, None, 0, at_least)
    return report.row(name, value, unit, other, 1.0, at_least)


# What is compared. A summary that reads on better than the exact cache knows no more than that, so its NLL counts as the exact
# one's.
WHAT = (("needle", "answered", lambda s: s.needle, False), ("bAbI", "answered", lambda s: s.babi, False),
        ("NLL", "nats", lambda s: None if s.nll is None else s.nll - min(0.0, s.above), True))


CLOSER = (("divergence from exact", "nats", lambda s: s.kl, True), ("attention error", "relative", lambda s: s.error, True))


def judge_rate(rows, at, table, family, nominal):
    """Bars of one of our families at a rate, and the best baseline at the same bytes."""
    ours = find(table, family, nominal)
    if ours is None:
        return
    needle, babi, nll = BARS.get(nominal, (None, None, None))
    name = f"{at}, {ours.name}"
    for what, unit, value, bar, at_least in (("needle", "answered", ours.needle, needle, True),
                                             ("bAbI", "answered", ours.babi, babi, True),
                                             ("NLL above exact", "nats", ours.above, nll, False),
                                             ("rate", "x", ours.rate, nominal, True)):
        if value is not None:
            rows.append(report.row(f"{name}: {what}", value, unit, None, bar, at_least))
    for what, unit, measure, lowest in WHAT:
        rival = best(table, nominal, measure, lowest)
        if rival and measure(ours) is not None:
            rows.append(against(f"{name}: {what} against the best baseline, {rival.name}", measure(ours), unit, measure(rival),
                                not lowest))


def judge_folds(rows, at, table, nominal):
    """Cooled against flat at the same bytes; a flat fold against one piece."""
    flat, cooled = find(table, "fold", nominal), find(table, "cooled fold", nominal)
    if flat and cooled:
        name = f"{at}, {nominal}x, cooled against flat"
        for what, unit, measure, lowest in (*WHAT, *CLOSER):
            if measure(flat) is not None:
                rows.append(against(f"{name}: {what}", measure(cooled), unit, measure(flat), not lowest))
        rows.append(report.row(f"{name}: bytes", cooled.stored, "bytes", flat.stored, SAME_BYTES, at_least=False))
    piece = find(table, "balance in one piece", nominal)
    if flat and piece and flat.nll is not None:
        name = f"{at}, {nominal}x, fold of blocks against one piece"
        rows += [report.row(f"{name}: attention error", flat.error, "relative", piece.error, PIECE_ERROR, at_least=False),
                 report.row(f"{name}: NLL above it", flat.nll - piece.nll, "nats", None, PIECE_NLL, at_least=False)]


def judge(sums, rates):
    """Rows with bars."""
    rows = []
    shortest = min(window for _, window in sums)
    for (tokens, window), table in sums.items():
        at = f"{tokens:,} tokens, window {window}"
        for nominal in rates:
            if window == shortest:
                for family in JUDGED:
                    judge_rate(rows, at, table, family, nominal)
                judge_folds(rows, at, table, nominal)
            elif window == LONG_WINDOW and nominal in LONG_BARS:
                for ours in (find(table, family, nominal) for family in JUDGED):
                    if ours:
                        rows.append(report.row(f"{at}, {ours.name}: NLL above exact", ours.above, "nats", None,
                                               LONG_BARS[nominal], at_least=False))
    return rows


def measures(sums):
    """Every measure of every column, without bars."""
    rows = []
    for (tokens, window), table in sums.items():
        for s in table:
            values = [("rate", "x", s.rate), ("needle", "answered", s.needle), ("bAbI", "answered", s.babi),
                      ("NLL", "nats", s.nll), ("NLL above exact", "nats", s.above),
                      ("standard error of that", "nats", s.spread), ("divergence from exact", "nats", s.kl),
                      ("attention error", "relative", s.error),
                      *((f"attention error, layer {i}", "relative", value) for i, value in enumerate(s.layers))]
            rows += [report.row(f"{tokens:,} tokens, window {window}, all of {s.name}: {what}", value, unit)
                     for what, unit, value in values if value is not None]
    return rows


def cell(value, form):
    return "" if value is None else form.format(value)


def show(sums):
    for (tokens, window), table in sums.items():
        exact = table[0]
        print(f"\n{tokens:,} tokens, newest {window} exact: {len(exact.lists['needle'])} codes, "
              f"{len(exact.lists['babi'])} places, {len(exact.lists['nll'])} plain texts")
        lines = [[s.name, f"{s.rate:.2f}x", cell(s.needle, "{:.3f}"), cell(s.babi, "{:.3f}"), cell(s.nll, "{:.4f}"),
                  cell(s.above, "{:+.4f}"), cell(s.spread, "{:.4f}"), cell(s.kl, "{:.4f}"), cell(s.error, "{:.3f}"),
                  *(f"{layer:.2f}" for layer in s.layers)]
                 for s in sorted(table, key=lambda s: (s.nominal, not s.ours, s.above or 0))]
        report.table(["stored as", "vs bf16", "needle", "bAbI", "NLL", "above exact", "+-", "KL", "error",
                      *(f"L{i}" for i in range(len(exact.layers)))], lines)


def report_all(sums, rates):
    """Prints tables and bars, writes the JSON; whether every bar was met."""
    show(sums)
    print()
    bars = judge(sums, rates)
    marks = {None: "", True: "yes", False: "NO"}
    report.table(["bar", "value", "against", "ratio", "bar", "met"],
                 [[r["name"], f"{r['value']:,.4f}", r["against"] if r["against"] is None else f"{r['against']:,.4f}",
                   r["ratio"] if r["ratio"] is None else f"{r['ratio']:.4f}", r["bar"], marks[r["met"]]] for r in bars])
    met = sum(r["met"] is True for r in bars)
    print(f"\n{met} of {sum(r['met'] is not None for r in bars)} bars are met")
    return report.finish("quality", bars + measures(sums), show=False)
