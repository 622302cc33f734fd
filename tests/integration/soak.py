#!/usr/bin/env python3
"""Mixed load for a while, thousands of connections opened and closed; afterwards all must be at its level again.

    soak.py [--seconds 60] [--connections 10000]

Workers put, get, look up, fold, attend, pin, drop, give up in the middle and send nonsense; every byte of every raw record
is checked. Then memory (RssAnon: the arena is not counted), descriptors, pins, staging, leases and open calls are compared
with what they were after a short warm-up. Prints a table, writes build/bench/soak.json, exits with 1 if anything grew.
"""
import argparse
import os
import random
import socket
import sys
import threading
import time

from harness import (Client, Code, Daemon, HEADS, KEY_DIM, LAYERS, SPEC, TOKENS, eventually, grpc, key, np, payload, pb, record,
                     wire)
from support import report

WORKERS, CHURNERS = 2, 2
SETTLE_S = 13  # the daemon gives free memory back after ten idle seconds
GROWTH = 16 << 20
CONTENT = {seed: payload(seed) for seed in range(8)}
LARGE = dict(layers=16, heads=8)
LARGE_CONTENT = payload(99, **LARGE)
SANITIZED = bool(os.environ.get("SANITIZER"))


def content(name):
    return CONTENT[name % len(CONTENT)]


class Load:
    """Everything that runs at the same time; counts by operation, and what went wrong."""

    def __init__(self, daemon):
        self.daemon, self.ending = daemon, threading.Event()
        self.counts, self.wrong, self.lock = {}, [], threading.Lock()

    def count(self, name):
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1

    def run(self, seconds, connections):
        """Load for so long, and until so many connections were made."""
        self.ending.clear()
        self.target, self.made = connections, 0
        threads = [threading.Thread(target=self.guard, args=(Worker(self, n).work,)) for n in range(WORKERS)]
        threads += [threading.Thread(target=self.guard, args=(self.churn, n)) for n in range(CHURNERS)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while time.monotonic() - started < seconds or (self.made < connections and time.monotonic() - started < 5 * seconds):
            if self.wrong or self.daemon.process.poll() is not None:
                break
            time.sleep(0.1)
            show_progress(time.monotonic() - started, seconds, self.made, connections)
        self.ending.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append("a worker hangs")
        return time.monotonic() - started

    def guard(self, work, *args):
        try:
            work(*args)
        except Exception as error:  # any at all is a finding
            self.wrong.append(f"{type(error).__name__}: {error}")

    def churn(self, number):
        """Connections that live for one call or none, some of them cut in the middle of it."""
        targets = [self.daemon.target, self.daemon.options["tcp"]]
        turn = 0
        while not self.ending.is_set() and self.made < self.target:
            turn += 1
            with Client(targets[turn % 2]) as client:
                if turn % 10 == 9:  # closed within a Put
                    spec_id = client.open(**SPEC).spec_id
                    block = pb.PutBlock(spec_id=spec_id, key=key(10 ** 7 + number), tokens=TOKENS,
                                        payload_bytes=len(content(0)))
                    forever = threading.Event()
                    call = client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString,
                                                       pb.PutResponse.FromString)
                    pending = call.future(hold(pb.PutRequest(block=block, data=b"1234"), forever), timeout=20)
                    time.sleep(0.002)
                    client.close()
                    forever.set()
                    del pending
                elif turn % 10 == 8:  # watched, and left
                    next(client.watch(""))
                else:
                    if client.health() != 1:
                        raise AssertionError("not serving")
            with self.lock:
                self.made += 1
            self.count("connection")


def hold(message, event):
    yield message
    event.wait(5)


def show_progress(elapsed, seconds, made, connections):
    if sys.stderr.isatty():
        print(f"\r{elapsed:6.0f} of {seconds} s, {made:6d} of {connections} connections", end="", file=sys.stderr, flush=True)


class Worker:
    """One client that does everything a client can do, in an order drawn from its seed."""

    def __init__(self, load, number):
        self.load, self.rng = load, random.Random(number)
        self.client = Client(load.daemon.target)
        self.spec_id = self.client.open(**SPEC).spec_id
        self.large_id = self.client.open(**{**SPEC, "model": "large", "layers": 16, "kv_heads": 8,
                                            "codec": pb.CODEC_RAW}).spec_id
        self.first = self.next = number * 10 ** 6
        self.codec_of = {}

    def work(self):
        steps = [self.put] * 4 + [self.get] * 6 + [self.lookup] * 3
        steps += [self.put_large, self.get_large, self.fold, self.attend, self.pin, self.drop, self.abort, self.give_up,
                  self.nonsense]
        self.put()
        while not self.load.ending.is_set():
            step = self.rng.choice(steps)
            step()
            self.load.count(step.__name__)
        self.client.close()

    def some(self, count=1):
        """Names put lately; the arena is small, so they may be gone."""
        last = max(self.first + 1, self.next)
        return [self.rng.randrange(max(self.first, last - 200), last) for _ in range(count)]

    def expect(self, codes, call, *args, **kwargs):
        """The call's result, or None when it failed with one of the codes."""
        try:
            return call(*args, **kwargs)
        except grpc.RpcError as error:
            if error.code() not in codes:
                raise
            return None

    def put(self):
        name, self.next = self.next, self.next + 1
        codec = self.rng.choice([pb.CODEC_RAW, pb.CODEC_RAW, pb.CODEC_DENSE8, pb.CODEC_DENSE4, pb.CODEC_BALANCE])
        self.codec_of[name] = codec
        self.client.put(self.spec_id, key(name), content(name), TOKENS, codec=codec, position=TOKENS * (name - self.first),
                        ttl_ms=self.rng.choice([0, 0, 500, 60000]))
        self.codec_of.pop(name - 300, None)

    def check(self, name, data):
        got = record.Record(data)
        if got.key != key(name) or got.codec != self.codec_of.get(name, got.codec):
            raise AssertionError(f"another record than that of {name} was served")
        if got.codec == record.RAW and not data.endswith(content(name)):
            raise AssertionError(f"wrong bytes were served for {name}")

    def get(self):
        names = self.some(self.rng.choice([1, 1, 4]))
        records, codes, _, error = self.client.try_get(self.spec_id, [key(n) for n in names])
        if error is not None and error.code() != Code.NOT_FOUND:
            raise error
        for name, data, code in zip(names, records, codes):
            if code == 0:
                self.check(name, data)

    def put_large(self):
        """Mostly a duplicate. UNAVAILABLE: it was one when the Put began, and was evicted before the Put had ended."""
        name = key(self.first + self.rng.randrange(4))
        self.expect([Code.UNAVAILABLE], self.client.put, self.large_id, name, LARGE_CONTENT, TOKENS)

    def get_large(self):
        records = self.expect([Code.NOT_FOUND], self.client.get, self.large_id, [key(self.first + self.rng.randrange(4))])
        if records and not records[0].endswith(LARGE_CONTENT):
            raise AssertionError("wrong bytes were served for a large block")

    def lookup(self):
        self.client.lookup(self.spec_id, [key(n) for n in self.some(16)])

    def fold(self):
        last = self.next
        keys = [key(n) for n in range(max(self.first, last - 4), last)]
        data = self.expect([Code.NOT_FOUND], self.client.fold, self.spec_id, keys, 20000, ttl_ms=1000)
        if data is not None and (len(data) > 20000 or record.Record(data).tokens != TOKENS * len(keys)):
            raise AssertionError("a fold is not what was asked for")
        bands = self.expect([Code.NOT_FOUND], self.client.bands, self.spec_id, keys, [(TOKENS, 4), (0, 16)], rate=10, ttl_ms=1000)
        if bands is not None and sum(record.Record(band).tokens for band in bands) != TOKENS * len(keys):
            raise AssertionError("a fold by age does not cover its blocks")

    def attend(self):
        q = np.ones((LAYERS, HEADS, 2, KEY_DIM), np.float32)
        reply = self.expect([Code.NOT_FOUND], self.client.attend, self.spec_id, [key(self.some()[0])], q)
        if reply is not None and not np.isfinite(np.frombuffer(reply.output, "<f4")).all():
            raise AssertionError("attention is not finite")

    def pin(self):
        held = self.expect([Code.NOT_FOUND], self.client.pin, self.spec_id, [key(n) for n in set(self.some(3))],
                           self.rng.choice([100, 60000]))
        if held is not None:
            self.expect([Code.NOT_FOUND], self.client.unpin, held.lease)

    def drop(self):
        self.client.drop(self.spec_id, [key(self.some()[0])])

    def abort(self):
        block = pb.PutBlock(spec_id=self.spec_id, key=key(self.first + 10 ** 5), tokens=TOKENS, payload_bytes=len(content(0)),
                            codec=self.rng.choice([pb.CODEC_RAW, pb.CODEC_BALANCE]))
        forever = threading.Event()
        call = self.client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString,
                                                pb.PutResponse.FromString)
        pending = call.future(hold(pb.PutRequest(block=block, data=content(0)[:1000]), forever), timeout=20)
        time.sleep(self.rng.choice([0, 0.002]))
        pending.cancel()
        forever.set()

    def give_up(self):
        """A Get that is cancelled after its first chunk."""
        stream = self.client.records("Get", pb.GetRequest(spec_id=self.large_id, keys=[key(self.first)] * 20))
        self.expect([Code.NOT_FOUND], next, stream, None)
        stream.cancel()

    def nonsense(self):
        raw = self.rng.randbytes(self.rng.randrange(1, 200))
        if self.expect([Code.INVALID_ARGUMENT], self.client.unary, "Open", None, pb.OpenResponse, raw=raw) is not None:
            raise AssertionError("noise was taken for a spec")
        bad = pb.PutBlock(spec_id=self.spec_id, key=key(1), tokens=TOKENS, payload_bytes=12)
        self.expect([Code.INVALID_ARGUMENT], self.client.put_stream, [pb.PutRequest(block=bad, data=b"x" * 12)])


def anonymous(pid):
    """RssAnon in bytes."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def descriptors(daemon):
    """The fewest of two seconds: the daemon closes its end of our own last connection a moment after we have closed ours."""
    least = daemon.fds()
    for _ in range(20):
        time.sleep(0.1)
        least = min(least, daemon.fds())
    return least


def level(daemon):
    """What must return: measured on the idle daemon."""
    time.sleep(SETTLE_S)
    with Client(daemon.target) as client:
        stats = client.stats()
    return {"memory": anonymous(daemon.process.pid), "descriptors": descriptors(daemon), "pins": stats["pinned"],
            "leases": stats["leases"], "staging": stats["staging_bytes"], "calls": stats["calls_open"], "stats": stats}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def soak(seconds, connections):
    daemon = Daemon(arena="48M", slab="8M", prefault="yes", staging="64M", max_specs=64, tcp=f"127.0.0.1:{free_port()}",
                    log_level="error")
    with daemon:
        load = Load(daemon)
        load.run(max(5, seconds // 10), connections // 10)
        with Client(daemon.target) as client:
            eventually(lambda: client.stats()["leases"] == 0, "leases of the warm-up end", 70)
        before = level(daemon)
        took = load.run(seconds, connections)
        after = level(daemon)
        if daemon.process.poll() is not None:
            load.wrong.append("the daemon has ended")
        for line in daemon.log_lines():
            load.wrong.append(f"log: {line}")
    return load, before, after, took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--connections", type=int, default=10000)
    options = parser.parse_args()
    load, before, after, took = soak(options.seconds, options.connections)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    stats = after["stats"]
    print(f"{took:.0f} s of load: " + ", ".join(f"{count:,} {name}" for name, count in sorted(load.counts.items())))
    rows = [report.row("connections", load.made, "", options.connections, 1)]
    limit = None if SANITIZED else before["memory"] + GROWTH  # a sanitizer keeps freed memory back; its own check counts there
    rows.append(report.row("anonymous memory", after["memory"] / 2 ** 20, "MiB", before["memory"] / 2 ** 20,
                           limit and limit / before["memory"], at_least=False))
    for name in ("descriptors", "pins", "leases", "staging", "calls"):
        rows.append(report.row(name, after[name] - before[name], "more than before", None, 0, at_least=False))
    rows.append(report.row("failures", len(load.wrong), "", None, 0, at_least=False))
    for name in ("evicted_capacity_total", "evicted_slab_total", "expired_total", "put_failed_total", "calls_cancelled_total",
                 "hits_total", "misses_total"):
        rows.append(report.row(name, stats[name], ""))
    good = report.finish("soak", rows)
    for text in load.wrong[:20]:
        print(f"soak: {text}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
