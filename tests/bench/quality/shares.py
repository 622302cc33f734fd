"""Which heads of a model need the bytes: measured once for a model, on texts that no bench context comes from.

Each (layer, head) is compressed by itself, all others left exact; what that moves the next-token distribution by (KL, nats a
token) is its loss, and its share of a record's bytes is in proportion to the root of it (kernels/plan.c). The measurement takes
a few contexts of plain text and one short pass for each head.
"""
import json
import os

import numpy as np

from . import configurations, context
from .kernels import Kernels
from .model import ABSENT

RATE = 24       # each head by itself is compressed to
TOKENS = 4096   # of a context
CONTEXTS = 3


def losses(model, kernels, story, window):
    """[layers, heads] of one context: the divergence from the exact model with one head compressed."""
    judge = context.Judge(model, story)
    start = story.k.shape[2] - window
    k, v = story.k[:, :, :start], story.v[:, :, :start]
    records = kernels.compress_blocks(k, v, configurations.BLOCK_TOKENS, "balance", rate=RATE, seed=story.seed)
    thin = configurations.summary_of(kernels, records)
    exact = model.caches(context.whole(k, v), story.k[:, :, start:], story.v[:, :, start:])
    found, kept = np.zeros(story.k.shape[:2]), thin.k.shape[2]
    for layer, cache in enumerate(exact):
        for head in range(len(cache.k)):
            whole = cache.k[head].copy(), cache.v[head].copy()
            cache.k[head, :start, -1] = ABSENT
            cache.k[head, :kept, :-1] = model.xp.asarray(thin.k[layer, head])
            cache.k[head, :kept, -1] = model.xp.asarray(thin.logw[layer, head])
            cache.v[head, :kept, :-1] = model.xp.asarray(thin.v[layer, head])
            cache.v[head, :kept, -1] = model.xp.asarray(thin.den[layer, head])
            table, _, _, _ = model.read(judge.passage, exact)
            found[layer, head] = float((model.xp.exp(judge.sure) * (judge.sure - table)).sum(-1).mean())
            cache.k[head], cache.v[head] = whole
    return found


def from_losses(found):
    """Shares in proportion to the root of the losses."""
    return scale(np.sqrt(np.maximum(found, 0)))


def scale(numbers):
    """1..255 in the proportion of numbers."""
    return np.clip(np.rint(255 * numbers / numbers.max()), 1, 255).astype(np.uint8)


def measure(model, folder, backend, window=64):
    """Shares [layers, heads] from texts of a folder."""
    kernels, texts = Kernels(backend), context.find_texts(folder, TOKENS)[:CONTEXTS]
    found = 0
    for i in range(CONTEXTS):
        story = context.Context(model.tokenizer, texts[i % len(texts)], TOKENS, 5000 + i, 0)
        story.read(model)
        found = found + losses(model, kernels, story, window)
    return from_losses(found)


def save(found, path):
    """A shares file, as client/bkv/shares.h has it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf8") as file:
        json.dump({"layers": found.shape[0], "heads": found.shape[1], "shares": found.ravel().tolist()}, file)
        file.write("\n")


def load(path):
    """[layers, heads] of a shares file, whose numbers may be of any size."""
    with open(path, encoding="utf8") as file:
        read = json.load(file)
    return scale(np.array(read["shares"], float).reshape(read["layers"], read["heads"]))


def of_model(model, folder, backend, path):
    """As measured before and kept in the file `path`, or measured now and kept there."""
    if not os.path.exists(path):
        save(measure(model, folder, backend), path)
    return load(path)
