"""What others keep of a KV cache, each written from its paper, over one quantiser and with every byte counted (storage.py).

All take the whole stored part of a context at once, keys and values [sections, n, dim] of every (layer, head), and a number of
bytes for each section; the first SINK tokens are kept by all, as ours are. None sees a question.

    uniform       a random sample; each sampled token stands for n / m tokens, in numerator and denominator alike
    StreamingLLM  arXiv 2309.17453: the first tokens and the newest ones. Keys keep their positions: all lie within the
                  model's context, so nothing needs to be moved
    BalanceKV     arXiv 2502.07861 as its authors' code does it: see balance_halve
    KeyDiff       arXiv 2504.15364: tokens whose keys are least like the mean key, by cosine
    SnapKV        arXiv 2404.14469: tokens that the newest queries of the context attend to, votes pooled over neighbours
                  (32 queries, max over 7 tokens, the published LongBench settings). Without the question, which the paper has
                  at the end of its prompt
    WildCat       arXiv 2602.10056: randomly pivoted Cholesky chooses keys, Nystroem weights make them stand for all keys
    integers      every token at so many bits
"""
import numpy as np

from . import storage
from .model import Summary

SINK = 32
OBSERVED = 32  # newest queries that SnapKV watches


class Source:
    """What is to be stored of a context: all but its newest `window` tokens.

    k, v [layers, heads, tokens, dim] and q [layers, newest queries, query heads, dim] are the whole context's. Kept as k, v
    float32 [sections, n, dim] and votes [sections, n]: how much the newest queries attend to each token."""

    def __init__(self, k, v, q, window, seed, xp=np):
        self.layers, self.heads, tokens, self.dim = k.shape
        self.sections, self.n, self.xp = self.layers * self.heads, tokens - window, xp
        self.votes = observe(k, q[:, -OBSERVED:])[:, :self.n]
        self.k = k[:, :, :self.n].reshape(self.sections, self.n, self.dim).astype(np.float32)
        self.v = v[:, :, :self.n].reshape(self.sections, self.n, self.dim).astype(np.float32)
        self.rng = np.random.default_rng(seed)

    def summary(self, k, v, bits, logw, den, section_bytes, clip=None):
        """Tokens [sections, m, ...] as they are read back from so many bits, as a Summary of all layers and heads."""
        shape = (self.layers, self.heads)
        k, v = storage.round_keys(self.xp.asarray(k), bits), storage.round_values(self.xp.asarray(v), bits)
        clip = None if clip is None else clip.reshape(2, *shape, self.dim).astype(np.float32)
        return Summary(k.reshape(*shape, *k.shape[1:]), v.reshape(*shape, *v.shape[1:]), logw.reshape(*shape, -1),
                       den.reshape(*shape, -1), section_bytes * self.sections, clip)


def observe(k, q):
    """Attention of the context's newest queries q [layers, t, query heads, dim] to its tokens, summed over the queries of each
    KV head: [sections, tokens]."""
    layers, heads, tokens, dim = k.shape
    queries = q.shape[1]
    q = q.astype(np.float32).transpose(0, 2, 1, 3).reshape(layers, heads, -1, queries, dim)
    score = q @ k.astype(np.float32)[:, :, None].swapaxes(-1, -2) / np.sqrt(dim, dtype=np.float32)
    score[..., tokens - queries:] += np.triu(np.full((queries, queries), -np.inf, np.float32), 1)
    score = np.exp(score - score.max(-1, keepdims=True))
    return (score / score.sum(-1, keepdims=True)).sum((2, 3)).reshape(layers * heads, tokens)


def take(array, index):
    """Rows index [sections, m] of array [sections, n, ...]."""
    return np.take_along_axis(array, index[..., None], 1)


def keep_best(source, score, bits, budget, head_extra=0):
    """The sinks and the tokens with the highest scores [sections, n]: (index [sections, m] ascending, bytes of a section)."""
    m = storage.most_tokens(source.n, source.dim, bits, budget, 0, head_extra)
    score = score.copy()
    score[:, :SINK] = np.inf
    index = np.sort(np.argpartition(-score, m - 1, 1)[:, :m], 1)
    return index, storage.section_bytes(source.n, m, source.dim, bits, 0, head_extra)


def selected(source, score, bits, budget):
    """Tokens by score, each standing for itself."""
    index, stored = keep_best(source, score, bits, budget)
    ones = np.ones(index.shape, np.float32)
    return source.summary(take(source.k, index), take(source.v, index), bits, 0 * ones, ones, stored)


def uniform(source, bits, budget):
    index, stored = keep_best(source, source.rng.random((source.sections, source.n)), bits, budget, head_extra=2)
    m = index.shape[1]
    logw = np.where(index < SINK, 0, storage.half(np.log((source.n - SINK) / max(1, m - SINK)))).astype(np.float32)
    return source.summary(take(source.k, index), take(source.v, index), bits, logw, np.ones_like(logw), stored)


def streaming(source, bits, budget):
    return selected(source, np.broadcast_to(np.arange(source.n, dtype=np.float64), (source.sections, source.n)), bits, budget)


def keydiff(source, bits, budget):
    unit = source.k / np.linalg.norm(source.k, axis=-1, keepdims=True)
    mean = unit.mean(1, keepdims=True)
    return selected(source, -(unit * mean).sum(-1), bits, budget)


def snapkv(source, bits, budget, pool=7):
    reach = pool // 2
    padded = np.pad(source.votes, ((0, 0), (reach, reach)))
    score = np.max([padded[:, i:i + source.n] for i in range(pool)], 0)
    return selected(source, score, bits, budget)


def integers(source, bits, budget=None):
    """Every token. The budget is what the bits say."""
    ones = np.ones((source.sections, source.n), np.float32)
    stored = storage.section_bytes(source.n, source.n, source.dim, bits)
    return source.summary(source.k, source.v, bits, 0 * ones, ones, stored)


BLOCK, GAMMA = 128, 4.0


def balance_halve(rng, k, v):
    """One halving of blocks k, v [blocks, n, dim]: (index [blocks, n / 2], weight [blocks, n / 2] of 1 or 2).

    Keys are centred; the kernel is exp(<k, k'> / sqrt(dim)) (<v, v'> + 0.025); token j gets the sign +1 with probability
    1/2 - gamma * sum over i < j of sign_i kernel_ij, not clamped. Exactly half survive: up to the first token at which one sign
    has n / 2, those of the other sign with weight 2; all that follow with weight 1."""
    blocks, n, dim = k.shape
    centred = k - k.mean(1, keepdims=True)
    gram = np.exp(centred @ centred.transpose(0, 2, 1) / np.sqrt(dim, dtype=np.float32))
    gram *= v @ v.transpose(0, 2, 1) + np.float32(0.025)
    signs, chance = np.zeros((blocks, n), np.float32), rng.random((blocks, n))
    for j in range(n):
        pull = np.einsum("bi,bi->b", signs[:, :j], gram[:, j, :j])
        signs[:, j] = np.where(chance[:, j] < 0.5 - GAMMA * pull, 1, -1)
    plus = np.cumsum(signs > 0, 1)
    minus = np.cumsum(signs < 0, 1)
    cut = np.argmax((plus == n // 2) | (minus == n // 2), 1)
    rows = np.arange(blocks)
    minority = np.where(plus[rows, cut] == n // 2, -1, 1)
    early = np.arange(n) <= cut[:, None]
    kept = np.where(early, signs == minority[:, None], True)
    index = np.nonzero(kept)[1].reshape(blocks, n // 2)
    return index, np.where(np.take_along_axis(early, index, 1), 2, 1).astype(np.float32)


def balance_rounds(source, bits, budget):
    """How often each block is halved so that the bytes are just kept: the oldest once more than the newest.

    (rounds [blocks], bytes of a section). What is left behind the last whole block is kept, as the sinks are."""
    blocks = (source.n - SINK) // BLOCK
    over = source.n - blocks * BLOCK
    m = storage.most_tokens(source.n, source.dim, bits, budget, 0, 2 * blocks)
    rounds = np.zeros(blocks, int)
    while over + (BLOCK >> rounds).sum() > m:
        rounds[np.argmin(rounds)] += 1
    kept = int(over + (BLOCK >> rounds).sum())
    return rounds, storage.section_bytes(source.n, kept, source.dim, bits, 0, 2 * blocks)


def authors_balance(source, bits, budget):
    """Blocks of 128, each halved a few times. A token that stands for w tokens after r rounds is decoded with its value times
    w / 2^r and a log weight of log 2^r, so that numerator and denominator differ, as the published code does it."""
    rounds, stored = balance_rounds(source, bits, budget)
    blocks, sections = len(rounds), source.sections
    inside = slice(SINK, SINK + blocks * BLOCK)
    split = (sections, blocks, BLOCK, source.dim)
    k, v = source.k[:, inside].reshape(split), source.v[:, inside].reshape(split)
    parts = [(source.k[:, :SINK], source.v[:, :SINK], np.zeros((sections, SINK), np.float32))]
    for first, last in runs(rounds):
        part_k, part_v = k[:, first:last].reshape(-1, BLOCK, source.dim), v[:, first:last].reshape(-1, BLOCK, source.dim)
        for _ in range(rounds[first]):
            index, weight = balance_halve(source.rng, part_k, part_v)
            part_k, part_v = take(part_k, index), take(part_v, index) * weight[..., None]
        scale = np.float32(2.0 ** rounds[first])
        shape = (sections, -1, source.dim)
        part_k, part_v = part_k.reshape(shape), part_v.reshape(shape) / scale
        parts.append((part_k, part_v, np.full(part_k.shape[:2], np.log(scale), np.float32)))
    rest = slice(SINK + blocks * BLOCK, None)
    parts.append((source.k[:, rest], source.v[:, rest], np.zeros((sections, source.n - rest.start), np.float32)))
    k, v, logw = (np.concatenate([part[i] for part in parts], 1) for i in range(3))
    return source.summary(k, v, bits, logw, np.ones_like(logw), stored)


def runs(values):
    """[(first, last)] of equal neighbours."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values)]
    return list(zip(edges[:-1], edges[1:]))


BASELINES = {"uniform": uniform, "StreamingLLM": streaming, "BalanceKV (authors)": authors_balance, "KeyDiff": keydiff,
             "SnapKV": snapkv}
