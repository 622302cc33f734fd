#!/usr/bin/env python3
"""What balancekvd does, on real input: `make demo`.

Starts a daemon on a private socket, puts the blocks of a real model's KV cache (tests/data/trace.safetensors) through the
client library, gets and folds them back, runs attention on what came back, and compares it with exact attention and with
uniform sampling at the same bytes. Exits with 1 if anything is not as it must be.
"""
import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from support import ROOT, native, report, safetensors
from support.daemon import Daemon

TRACE = os.path.join(ROOT, "tests", "data", "trace.safetensors")
BLOCK, SINK, REPEATS, DRAWS = 256, 32, 3, 3
CODECS = [("raw", native.RAW, 0), ("dense8", native.DENSE8, 0), ("dense4", native.DENSE4, 0), ("balance", native.BALANCE, 8),
          ("balance", native.BALANCE, 16), ("balance", native.BALANCE, 32)]
FOLDS = [8, 16, 32]


class Trace:
    """K, V [layers][heads][tokens][dim] float32 of the file, and the queries of its newest tokens."""

    def __init__(self, path):
        tensors, self.meta = safetensors.load(path)
        numbers = sorted(int(name[2:]) for name in tensors if name.startswith("k."))
        self.k16, self.v16, self.q16 = (np.stack([tensors[f"{kind}.{n}"] for n in numbers]) for kind in "kvq")
        self.k, self.v, self.q = (a.astype(np.float64) for a in (self.k16, self.v16, self.q16))
        self.layers, self.heads, self.tokens, self.dim = self.k.shape
        self.query_heads, self.queries = self.q.shape[1:3]
        self.ids, self.name = tensors["ids"], self.meta["book"].removesuffix(".txt")
        self.stored = (self.tokens - self.queries) // BLOCK * BLOCK  # the newest tokens stay with the worker
        self.starts = range(0, self.stored, BLOCK)

    def payload(self, start):
        return b"".join(part[layer, :, start:start + BLOCK].tobytes() for layer in range(self.layers)
                        for part in (self.k16, self.v16))

    def bf16_bytes(self, tokens):
        return self.layers * self.heads * tokens * self.dim * 2 * 2


def partial(q, k, v, logw, mask=None):
    """Softmax attention in float64: (out, log-sum-exp)."""
    score = q @ k.T / np.sqrt(q.shape[-1]) + logw
    if mask is not None:
        score = np.where(mask, score, -np.inf)
    top = score.max(-1, keepdims=True)
    weight = np.exp(score - top)
    total = weight.sum(-1, keepdims=True)
    return weight @ v / total, top + np.log(total)


def merge(a, b):
    """Attention over the union of two disjoint sets of tokens."""
    lse = np.logaddexp(a[1], b[1])
    return a[0] * np.exp(a[1] - lse) + b[0] * np.exp(b[1] - lse)


class Judge:
    """Relative Frobenius error of the attention outputs, averaged over layers and query heads."""

    def __init__(self, trace):
        self.trace, n = trace, trace.stored
        position = np.arange(trace.queries) + trace.tokens - trace.queries
        mask = np.arange(n, trace.tokens)[None] <= position[:, None]
        self.stored, self.recent = {}, {}
        for layer, head, group in self.each():
            q, k, v = trace.q[layer, head], trace.k[layer, group], trace.v[layer, group]
            self.stored[layer, head] = partial(q, k[:n], v[:n], 0)
            self.recent[layer, head] = partial(q, k[n:], v[n:], 0, mask)

    def each(self):
        group = self.trace.query_heads // self.trace.heads
        return [(layer, head, head // group) for layer in range(self.trace.layers) for head in range(self.trace.query_heads)]

    def errors(self, parts):
        """(with the worker's own newest tokens, over the stored tokens alone) of records' sections."""
        whole, alone = [], []
        for layer, head, group in self.each():
            have = [part[layer, group] for part in parts]
            k, v = (np.concatenate([getattr(s, name) for s in have]).astype(np.float64) for name in "kv")
            got = partial(self.trace.q[layer, head], k, v, np.concatenate([s.logw for s in have]).astype(np.float64))
            want, recent = self.stored[layer, head], self.recent[layer, head]
            exact = merge(want, recent)
            whole.append(np.linalg.norm(merge(got, recent) - exact) / np.linalg.norm(exact))
            alone.append(np.linalg.norm(got[0] - want[0]) / np.linalg.norm(want[0]))
        return float(np.mean(whole)), float(np.mean(alone))


def uniform(trace, start, tokens, room, rng):
    """A uniform sample of tokens [start, start + tokens) for each layer and head, int4 as dense4, in at most `room` bytes.

    It keeps the same sink tokens that balance keeps, weighs the others by how many they stand for, and its draw is its own."""
    def shape(m):
        return trace.layers, trace.heads, m, trace.dim, trace.dim, native.FP16

    low, high = 1, tokens
    while low < high:  # the most tokens whose record fits
        m = (low + high + 1) // 2
        low, high = (m, high) if native.bound(shape(m), native.DENSE4) <= room else (low, m - 1)
    m = low
    sinks = min(SINK, m // 2) if start == 0 else 0
    index = np.empty((trace.layers, trace.heads, m), np.int64)
    for layer in range(trace.layers):
        for head in range(trace.heads):
            rest = rng.choice(np.arange(sinks, tokens), m - sinks, replace=False)
            index[layer, head] = start + np.concatenate([np.arange(sinks), np.sort(rest)])
    gather = lambda source: np.take_along_axis(source, index[..., None], 2)
    k, v = gather(trace.k16), gather(trace.v16)
    payload = b"".join(part[layer].tobytes() for layer in range(trace.layers) for part in (k, v))
    parts, size = native.compress(shape(m), payload, native.DENSE4)
    assert size <= room
    for section in parts.values():
        section.logw[sinks:] = np.log((tokens - sinks) / (m - sinks))
    return parts


def timed(call):
    started = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - started) * 1e3


def open_client(daemon, trace, codec, rate):
    return native.Client(daemon.target, model=trace.name, layers=trace.layers, kv_heads=trace.heads,
                         key_dim=trace.dim, dtype=native.FP16, block_tokens=BLOCK, codec=codec, rate=rate, sink_tokens=SINK,
                         seed=1)


def chain(client, trace):
    keys, parent = [], None
    for start in trace.starts:
        parent = client.key_next(parent, trace.ids[start:start + BLOCK])
        keys.append(parent)
    return keys


def run_codec(daemon, trace, codec, rate):
    """Puts all blocks and gets them back, REPEATS times: (parts, sizes of the records, put ms, get ms)."""
    client = open_client(daemon, trace, codec, rate)
    keys = chain(client, trace)
    blocks = [(key, start, BLOCK, trace.payload(start), 0, 0) for key, start in zip(keys, trace.starts)]
    put_ms, get_ms = [], []
    for turn in range(REPEATS):
        if turn:
            client.drop(keys)
        put_ms.append(timed(lambda: client.put(blocks))[1])
        records, ms = timed(lambda: client.get_raw(keys))
        get_ms.append(ms)
        parts = [native.sections(record.data, record.length) for record in records]
        sizes = [record.length for record in records]
        client.free(records)
    client.close()
    return parts, sizes, min(put_ms), min(get_ms)


def run_fold(daemon, trace, rate, profile=""):
    """The whole prefix as one summary, or one for each band of age: dense4 blocks folded into bytes / rate."""
    client = open_client(daemon, trace, native.DENSE4, 0)
    keys = chain(client, trace)
    client.put([(key, start, BLOCK, trace.payload(start), 0, 0) for key, start in zip(keys, trace.starts)])
    budget = trace.bf16_bytes(trace.stored) // rate
    first, first_ms = timed(lambda: client.fold_raw(keys, budget, profile=profile))
    again, again_ms = timed(lambda: client.fold_raw(keys, budget, profile=profile))
    parts, sizes = [native.sections(r.data, r.length) for r in again], [record.length for record in again]
    client.free(first)
    client.free(again)
    client.close()
    if sum(sizes) > budget:
        raise native.Failure(f"a fold of {sum(sizes)} bytes came for a budget of {budget}")
    return parts, sizes, first_ms, again_ms


def main():
    trace = Trace(TRACE)
    judge, bf16 = Judge(trace), trace.bf16_bytes(trace.stored)
    rng = np.random.default_rng(1)
    lines, rows = [], []
    with Daemon(arena="256M", log_target="text") as daemon:
        print(f"balancekvd runs on {daemon.target}\n"
              f"trace: {trace.name}, {trace.tokens} tokens, {trace.layers} layers, {trace.heads} KV heads, dim "
              f"{trace.dim}; {trace.stored} tokens go to the daemon in blocks of {BLOCK}, the newest {trace.queries} stay with "
              "the worker\n")
        jobs = [(name, rate, lambda c=codec, r=rate: run_codec(daemon, trace, c, r)) for name, codec, rate in CODECS]
        jobs += [("fold", rate, lambda r=rate: run_fold(daemon, trace, r)) for rate in FOLDS]
        jobs += [("cooling fold", rate, lambda r=rate: run_fold(daemon, trace, r, native.profile_for(r))) for rate in FOLDS]
        for name, rate, job in jobs:
            parts, sizes, put_ms, get_ms = job()
            whole, alone = judge.errors(parts)
            other = None
            if rate:
                whole_fold = [(0, trace.stored)] if "fold" in name else None
                spans = whole_fold or [(start, BLOCK) for start in trace.starts]
                room = [sum(sizes)] if whole_fold else sizes
                draws = [judge.errors([uniform(trace, start, tokens, size, rng) for (start, tokens), size in zip(spans, room)])
                         for _ in range(DRAWS)]
                other = np.mean(draws, 0).tolist()
            label = f"{name} {rate}x" if rate else name
            drawn = [f"{error:.4f}" for error in other] if rate else ["-", "-"]
            lines.append([label, f"{sum(sizes):,}", f"{bf16 / sum(sizes):.1f}x", f"{whole:.4f}", drawn[0], f"{alone:.4f}",
                          drawn[1], f"{put_ms:.1f}", f"{get_ms:.1f}"])
            limit = {"raw": 1e-3, "dense8": 0.02, "dense4": 0.1}.get(name)
            rows.append(report.row(f"{label} attention error", whole, "relative", other[0] if rate else None,
                                   1.0 if rate else limit, at_least=False))
            rows.append(report.row(f"{label} stored bytes", sum(sizes), "bytes"))
            rows.append(report.row(f"{label} put", put_ms, "ms"))
            rows.append(report.row(f"{label} get", get_ms, "ms"))
        address = daemon.target
    report.table(["codec", "bytes", "vs bf16", "error", "uniform", "stored error", "uniform", "put ms", "get ms"], lines)
    print(f"""
  error         of the newest {trace.queries} queries' attention outputs against exact attention: relative Frobenius norm, mean
                over layers and heads; what was stored merged with the worker's own newest tokens
  stored error  the same over the stored tokens alone
  cooling fold  a fold whose newest tokens get more of the bytes (`--profile auto`), a record for each band of
                age; it shows on longer prefixes than this one
  uniform       the error of uniformly drawn tokens, int4, the same sink tokens, in the same bytes (mean of {DRAWS} draws)
  put, get ms   all {len(trace.starts)} blocks through libbalancekv; fold: first request (computed), second (from the store)

balancekvd on {address} has ended""")
    good = report.finish("demo", rows, show=False)
    if not good:
        print("demo: FAILED: " + "; ".join(f"{r['name']} {r['value']:.4f}" for r in rows if r["met"] is False), file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (native.Failure, AssertionError) as failure:
        sys.exit(f"demo: FAILED: {failure}")
