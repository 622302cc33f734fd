"""Results summed over contexts, as tables and as rows with bars (build/bench/quality.json)."""
import math

from support import report

from .configurations import JUDGED

# By rate, with the short window: needles and places answered at least, nats above the exact cache at most.
BARS = {8: (0.99, 0.94, 0.015), 16: (0.98, 0.93, 0.04), 32: (0.97, 0.90, 0.08)}
LONG_WINDOW, LONG_BARS = 512, {16: 0.004, 32: 0.015}
SAME_BYTES = 1.01  # records of one budget differ by what alignment and whole tokens leave over
PIECE_ERROR, PIECE_NLL = 1.10, 0.02  # a fold against compressing in one piece


class Sum:
    """One way of storing contexts of one length, over all of them."""

    def __init__(self, tokens, row):
        self.tokens, self.family, self.bits, self.nominal = tokens, row["family"], row["bits"], row["nominal"]
        self.window, self.ours = row["window"], row["ours"]
        self.answers = {"needle": [], "babi": []}
        self.nll, self.above, self.kl, self.errors, self.stored, self.raw = [], [], [], [], 0, 0.0

    def add(self, row, base):
        for name, answers in self.answers.items():
            answers += row[name]
        self.nll.append(row["nll"])
        self.above.append(row["nll"] - base["nll"])
        self.kl.append(row["kl"])
        self.errors.append(row["error"])
        self.stored += row["bytes"]
        self.raw += row["bytes"] * row["rate"]

    @property
    def name(self):
        return self.family + (f" int{self.bits}" if self.bits and self.nominal else "") + \
            (f" {self.nominal}x" if self.nominal else "")

    def share(self, kind):
        return sum(self.answers[kind]) / max(1, len(self.answers[kind]))

    needle = property(lambda self: self.share("needle"))
    babi = property(lambda self: self.share("babi"))
    mean_nll = property(lambda self: sum(self.nll) / len(self.nll))
    divergence = property(lambda self: sum(self.kl) / len(self.kl))
    delta = property(lambda self: sum(self.above) / len(self.above))
    rate = property(lambda self: self.raw / self.stored if self.stored else 1.0)

    @property
    def spread(self):
        """Standard error of delta over contexts."""
        n = len(self.above)
        return math.sqrt(sum((x - self.delta) ** 2 for x in self.above) / (n - 1) / n) if n > 1 else 0.0

    @property
    def layers(self):
        return [sum(layer) / len(layer) for layer in zip(*self.errors)]

    @property
    def error(self):
        return sum(self.layers) / len(self.layers)


def sum_up(done):
    """{(tokens, window): [Sum]} with the exact cache first, from [(job, exact judgement, rows)]."""
    sums = {}
    for (tokens, _, _), base, rows in done:
        layers = len(rows[0]["error"])
        for window in sorted({row["window"] for row in rows}):
            exact = {**base, "family": "exact", "bits": 0, "nominal": 0, "window": window, "ours": False, "error": [0.0] * layers,
                     "kl": 0.0, "bytes": 0, "rate": 1.0}
            table = sums.setdefault((tokens, window), {})
            for row in [exact, *(row for row in rows if row["window"] == window)]:
                table.setdefault((row["family"], row["bits"], row["nominal"]), Sum(tokens, row)).add(row, base)
    return {key: list(table.values()) for key, table in sorted(sums.items())}


def find(table, family, nominal):
    return next((s for s in table if s.family == family and s.nominal == nominal), None)


def best(table, nominal, measure, lowest):
    """The best baseline at a rate: any of its widths; every token at few bits competes where it has not fewer bytes."""
    rivals = [s for s in table if not s.ours and s.family != "exact" and
              (s.nominal == nominal or (s.nominal == 0 and nominal / 2 < s.rate <= nominal))]
    return (min if lowest else max)(rivals, key=measure, default=None)


def against(name, value, unit, other, at_least):
    """A row that asks for no less (or no more) than another's value; 0 has no ratio and is compared as it is."""
    if other == 0:
        return report.row(name, value, unit, None, 0, at_least)
    return report.row(name, value, unit, other, 1.0, at_least)


def judge_rate(rows, at, table, family, nominal):
    """Bars of one of our families at a rate, and the best baseline at the same bytes."""
    ours = find(table, family, nominal)
    if ours is None:
        return
    needle, babi, nll = BARS.get(nominal, (None, None, None))
    name = f"{at}, {ours.name}"
    rows += [report.row(f"{name}: needle", ours.needle, "answered", None, needle),
             report.row(f"{name}: bAbI", ours.babi, "answered", None, babi),
             report.row(f"{name}: NLL above exact", ours.delta, "nats", None, nll, at_least=False),
             report.row(f"{name}: rate", ours.rate, "x", None, nominal)]
    for what, unit, measure, lowest in (("needle", "answered", lambda s: s.needle, False),
                                        ("bAbI", "answered", lambda s: s.babi, False),
                                        ("NLL", "nats", lambda s: s.mean_nll, True)):
        rival = best(table, nominal, measure, lowest)
        if rival:
            rows.append(against(f"{name}: {what} against the best baseline, {rival.name}", measure(ours), unit, measure(rival),
                                not lowest))


def judge_folds(rows, at, table, nominal):
    """Cooled against flat at the same bytes; a flat fold against one piece."""
    flat, cooled = find(table, "fold", nominal), find(table, "cooled fold", nominal)
    if flat and cooled:
        name = f"{at}, {nominal}x, cooled against flat"
        rows += [against(f"{name}: needle", cooled.needle, "answered", flat.needle, True),
                 against(f"{name}: bAbI", cooled.babi, "answered", flat.babi, True),
                 against(f"{name}: NLL", cooled.mean_nll, "nats", flat.mean_nll, False),
                 against(f"{name}: attention error", cooled.error, "relative", flat.error, False),
                 report.row(f"{name}: bytes", cooled.stored, "bytes", flat.stored, SAME_BYTES, at_least=False)]
    piece = find(table, "balance in one piece", nominal)
    if flat and piece:
        name = f"{at}, {nominal}x, fold of blocks against one piece"
        rows += [report.row(f"{name}: attention error", flat.error, "relative", piece.error, PIECE_ERROR, at_least=False),
                 report.row(f"{name}: NLL above it", flat.mean_nll - piece.mean_nll, "nats", None, PIECE_NLL, at_least=False)]


def judge(sums, rates):
    """All rows: bars first, then every measure of every column."""
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
                        rows.append(report.row(f"{at}, {ours.name}: NLL above exact", ours.delta, "nats", None,
                                               LONG_BARS[nominal], at_least=False))
    return rows


def measures(sums):
    """Plain rows without bars."""
    rows = []
    for (tokens, window), table in sums.items():
        for s in table:
            name = f"{tokens:,} tokens, window {window}, all of {s.name}"
            rows += [report.row(f"{name}: rate", s.rate, "x"), report.row(f"{name}: needle", s.needle, "answered"),
                     report.row(f"{name}: bAbI", s.babi, "answered"), report.row(f"{name}: NLL", s.mean_nll, "nats"),
                     report.row(f"{name}: NLL above exact", s.delta, "nats"),
                     report.row(f"{name}: standard error of that", s.spread, "nats"),
                     report.row(f"{name}: divergence from exact", s.divergence, "nats"),
                     report.row(f"{name}: attention error", s.error, "relative")]
            rows += [report.row(f"{name}: attention error, layer {i}", value, "relative") for i, value in enumerate(s.layers)]
    return rows


def show(sums):
    for (tokens, window), table in sums.items():
        exact = table[0]
        print(f"\n{tokens:,} tokens, newest {window} exact, {len(exact.nll)} contexts, {len(exact.answers['needle'])} codes, "
              f"{len(exact.answers['babi'])} places")
        lines = []
        for s in sorted(table, key=lambda s: (s.nominal, not s.ours, s.delta)):
            lines.append([s.name, f"{s.rate:.2f}x", f"{s.needle:.3f}", f"{s.babi:.3f}", f"{s.mean_nll:.4f}", f"{s.delta:+.4f}",
                          f"{s.spread:.4f}", f"{s.divergence:.4f}", f"{s.error:.3f}", *(f"{layer:.2f}" for layer in s.layers)])
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
