#!/usr/bin/env python3
"""A pool of real daemons and a real etcd, each on a host of its own, under load while things go wrong: a schedule of faults that
follows from a seed, and a checker that knows every byte put.

    run.py [--seconds 60] [--nodes 5] [--seed 1] [--faults kill,pause,...] [--workers 4]

Prints what it does and a table, writes build/bench/test-cluster.json, exits with 1 if a bar was missed or an answer was not right,
missing or a typed error within its deadline. Needs root and network namespaces; says so where it cannot have them.
"""
import argparse
import sys
import time

import network
from faults import FAULTS, Faults, quiet_signals
from ledger import Ledger
from load import DEADLINE_S, Load
from pool import Pool
from referee import ALLOWANCE_S, Referee

from support import report

LIMIT_BYTES = 32 << 20
QUOTA = 16 << 20  # of etcd's disk


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--faults", help="these, once each and in this order, in the place of a schedule: " + ", ".join(FAULTS))
    return parser.parse_args()


def play(faults, chosen, seconds, began):
    """Fault after fault, until the time is over: how often each."""
    played = []
    for name in chosen.split(",") if chosen else faults.schedule():
        if not chosen and time.monotonic() - began > seconds and played:
            break
        faults.run(name)
        played.append(name)
        if faults.referee.wrong or faults.referee.odd:
            break
    return played


def capacity_sufficed(pool, problems):
    """Nothing was evicted: otherwise a miss would not mean a thing."""
    for node in pool.up():
        metrics = node.metrics()
        for name in ("evicted_capacity_total", "evicted_slab_total", "full_total", "corrupt_total"):
            if metrics[name]:
                problems.append(f"{node.name}: {name} is {metrics[name]:.0f}")
        if metrics["pinned"] or metrics["leases"]:
            problems.append(f"{node.name}: {metrics['pinned']:.0f} records pinned, {metrics['leases']:.0f} leases left")


def results(faults, referee, took):
    found = sum(row[1] for row in faults.after)
    total = sum(row[2] for row in faults.after)
    operations = sum(referee.counts.values())
    rows = [report.row("operations", operations, ""), report.row("operations/s", operations / took, "1/s"),
            report.row("wrong bytes", len(referee.wrong), "", bar=0, at_least=False),
            report.row(f"operations past deadline + {ALLOWANCE_S} s", len(referee.late), "", bar=0, at_least=False),
            report.row("of stopped daemons, past deadline", referee.totals["late excused"], ""),
            report.row("of streams that the client forgot", referee.totals["forgotten"], ""),
            report.row("misses of replicated blocks", len(referee.misses), "", bar=0, at_least=False),
            report.row("misses before a lease's end", referee.totals["misses excused"], ""),
            report.row("absent to Lookup in times of trouble", referee.totals["absences excused"], ""),
            report.row("hit rate", referee.hit_rate(), "", bar=1.0),
            report.row("hit rate after repair", found / total if total else 0, "", bar=1.0),
            report.row("failures beyond retries", len(referee.failures), "", bar=0, at_least=False),
            report.row("failures at daemons in trouble", referee.totals["failures excused"], ""),
            report.row("answers of no known kind", len(referee.odd), "", bar=0, at_least=False),
            report.row("blocks not with their owners", len(faults.problems), "", bar=0, at_least=False),
            report.row("this program stood still, at most", referee.metronome.longest_s(), "s"),
            report.row("retries at other daemons", referee.totals["retries"], ""),
            report.row("puts by two daemons", referee.totals["puts replicated"], ""),
            report.row("puts that were short", referee.totals["puts short of replicas"], "")]
    for name, moved, ideal, needed in faults.movements:
        rows.append(report.row(f"moved: {name}", moved / 1e6, "MB", ideal / 1e6, 1.3, at_least=False))
        rows.append(report.row(f"moved against needed: {name}", moved / 1e6, "MB", needed / 1e6, 1.3, at_least=False))
    worst = {}
    for name, seconds in faults.repairs:
        worst[name] = max(seconds, worst.get(name, 0))
    rows += [report.row(f"at rest after: {name}", seconds, "s") for name, seconds in worst.items()]
    for operation in ("get", "put", "lookup"):
        for share in (0.5, 0.99):
            rows.append(report.row(f"{operation} p{100 * share:.0f}", 1000 * (referee.percentile(operation, share) or 0), "ms"))
    return rows


def show(referee, faults, pool, good):
    print("operations: " + ", ".join(f"{n:,} {name}" for name, n in sorted(referee.counts.items())))
    print("errors: " + (", ".join(f"{n:,} {name} {code}" for (name, code), n in sorted(referee.errors.items())) or "none"))
    for what, texts in (("wrong bytes", referee.wrong), ("past its deadline", referee.late), ("missed", referee.misses),
                        ("failed", referee.failures), ("odd", referee.odd), ("not in its place", faults.problems)):
        for text in texts[:12]:
            print(f"test-cluster: {what}: {text}", file=sys.stderr)
        if len(texts) > 12:
            print(f"test-cluster: {what}: and {len(texts) - 12} more", file=sys.stderr)
    if not good:
        for node in pool.nodes.values():
            print(f"--- the log of {node.name} ends:\n" + "\n".join(calm_log(node)[-15:]), file=sys.stderr)


def calm_log(node):
    """Without the lines of single requests."""
    return [line for line in node.log_text().splitlines() if '"request"' not in line]


def main():
    wanted = options()
    quiet_signals()
    why = network.why_not()
    if why:
        print(f"test-cluster: SKIPPED, nothing of the cluster was tested: {why}")
        return 0
    print(f"{wanted.nodes} daemons, seed {wanted.seed}, deadline {DEADLINE_S} s")
    began = time.monotonic()
    with Pool(wanted.nodes, etcd_options={"quota": QUOTA}) as pool:
        if not pool.network.netem:
            print("this kernel has no netem: packets are lost and delayed by lossy.py instead")
        pool.start()
        referee = Referee(began)
        with Load(pool, Ledger(wanted.seed, LIMIT_BYTES), referee, wanted.workers) as load:
            faults = Faults(pool, load, wanted.seed, lambda text: print(f"{time.monotonic() - began:6.1f} {text}", flush=True))
            try:
                played = play(faults, wanted.faults, wanted.seconds, began)
            except AssertionError as error:  # the pool did not come to rest: all else is still worth knowing
                faults.problems.append(str(error))
                played = []
        if not faults.problems:
            capacity_sufficed(pool, faults.problems)
        rows = results(faults, referee, time.monotonic() - began)
        print(f"faults: {', '.join(played)}")
        good = report.finish("test-cluster", rows) and not referee.bad() and not faults.problems
        show(referee, faults, pool, good)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
