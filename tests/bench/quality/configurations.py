"""The columns of the bench: every way to store a cache that is compared. One line adds one."""
import numpy as np

from . import storage
from .baselines import BASELINES, Source, integers
from .kernels import Kernels
from .model import ABSENT, Summary
from .wildcat import TAU_FACTS, TAU_TEXT, WildCat

BLOCK_TOKENS = 256
RATES = (8, 16, 32)


class Ours:
    """A configuration of ours. `store` is called with (kernels, k, v, budget in bytes, seed) and returns records; the kernels
    know the model's shares (shares.py), unless `equal`."""

    def __init__(self, family, rate, store, equal=False):
        self.family, self.rate, self.store, self.equal = family, rate, store, equal

    def __call__(self, kernels, k, v, seed):
        return summary_of(kernels, self.store(kernels, k, v, (k.size + v.size) * 2 // (self.rate or 1), seed))


def blocks(codec, rate=0):
    """Each block of BLOCK_TOKENS compressed by itself, as a Put does it."""
    return lambda kernels, k, v, budget, seed: kernels.compress_blocks(k, v, BLOCK_TOKENS, codec, rate=rate, seed=seed)


def one_piece(rate):
    """The whole prefix as one block."""
    return lambda kernels, k, v, budget, seed: [kernels.compress(k, v, "balance", rate=rate, seed=seed)]


def fold(profile=None):
    """dense8 blocks, as int4 ones have lost some places already, folded under a budget: to one record, or to several by a
    profile of ages ("auto:RATE": our own)."""
    def store(kernels, k, v, budget, seed):
        records = kernels.compress_blocks(k, v, BLOCK_TOKENS, "dense8", seed=seed)
        return kernels.fold_prefix(records, budget, profile, seed)
    return store


OURS = [Ours("raw", 0, blocks("raw")), Ours("dense8", 0, blocks("dense8")), Ours("dense4", 0, blocks("dense4")),
        *(Ours("balance", rate, blocks("balance", rate)) for rate in RATES),
        *(Ours("balance (equal shares)", rate, blocks("balance", rate), equal=True) for rate in RATES),
        Ours("balance in one piece", 16, one_piece(16)),
        *(Ours("fold", rate, fold()) for rate in RATES),
        *(Ours("cooled fold", rate, fold(f"auto:{rate}")) for rate in RATES)]
JUDGED = ("balance", "cooled fold")  # families that must keep the bars


def summary_of(kernels, records):
    """What the records hold, heads of unequal length padded."""
    parts = [kernels.sections(record) for record in records]
    layers, heads = len(parts[0]), len(parts[0][0])
    lengths = [[sum(len(part[layer][head][2]) for part in parts) for head in range(heads)] for layer in range(layers)]
    dims = [parts[0][0][0][i].shape[1] for i in range(2)]
    n = max(max(row) for row in lengths)
    k, v = (np.zeros((layers, heads, n, dim), np.float32) for dim in dims)
    logw, den = np.full((layers, heads, n), ABSENT, np.float32), np.zeros((layers, heads, n), np.float32)
    for layer in range(layers):
        for head in range(heads):
            at = 0
            for part in parts:
                section_k, section_v, section_w = part[layer][head]
                end = at + len(section_w)
                k[layer, head, at:end], v[layer, head, at:end] = section_k, section_v
                logw[layer, head, at:end], den[layer, head, at:end] = section_w, 1
                at = end
    return Summary(k, v, logw, den, sum(len(record) for record in records))


class Others:
    """The baselines of one context, at equal bytes."""

    def __init__(self, source, rates, bits, tau):
        self.source, self.rates, self.bits, self.tau = source, rates, bits, tau

    def __iter__(self):
        """(family, bits, rate or 0, summary)."""
        source = self.source
        for bits in (4, 2):
            yield f"int{bits} alone", bits, 0, integers(source, bits)
        raw = 2 * source.n * source.dim * 2  # of a section
        for rate in self.rates:
            for bits in self.bits:
                for family, method in BASELINES.items():
                    yield family, bits, rate, method(source, bits, raw // rate)
        most = storage.most_tokens(source.n, source.dim, min(self.bits), raw // min(self.rates))
        wildcat = WildCat(source, most, self.tau)
        for rate in self.rates:
            for bits in self.bits:
                yield "WildCat", bits, rate, wildcat(bits, raw // rate)


def columns(context, judge, windows, options, shares):
    """Every column of a context: [{family, bits, nominal rate, window, ours, ...judgement}]."""
    with_shares, equal, rows = Kernels(options.backend, shares), Kernels(options.backend), []

    def add(family, bits, rate, window, ours, summary):
        rows.append({"family": family, "bits": bits, "nominal": rate, "window": window, "ours": ours,
                     **judge.judge(summary, window)})

    for window in windows:
        k, v = (array[:, :, :array.shape[2] - window] for array in (context.k, context.v))
        for config in OURS:
            if config.rate in (0, *options.rates) and (options.only is None or config.family in options.only):
                summary = config(equal if config.equal else with_shares, k, v, context.seed)
                add(config.family, 0, config.rate, window, True, summary)
    if options.only is None or "baselines" in options.only:
        source = Source(context.k, context.v, context.q, windows[0], context.seed, judge.model.xp)
        for family, bits, rate, summary in Others(source, options.rates, options.bits, TAU_TEXT if context.rest else TAU_FACTS):
            add(family, bits, rate, windows[0], False, summary)
    return rows
