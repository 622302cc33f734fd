"""End to end with a real model: codes are hidden in books, the cache goes through the daemon, the model answers from what came
back.

Needs BKV_MODEL_DIR, a folder with lm.py and its weights; books come from BKV_BOOKS_DIR (default: BKV_MODEL_DIR/../books). The
cache is compressed before any question is known. The newest 64 tokens stay with the worker, exact; all others come from the
daemon. Writes build/bench/e2e.json. BKV_E2E_SEED (default 7) chooses other codes and other pages.
"""
import glob
import os
import random
import sys
import time
import unittest

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support import native, report
from support.daemon import Daemon
from support.runner import run

MODEL = os.environ.get("BKV_MODEL_DIR")
BLOCK, BLOCKS, WINDOW, SINK, CONTINUE = 256, 11, 64, 32, 128
LENGTH = BLOCK * BLOCKS + WINDOW
SEED = int(os.environ.get("BKV_E2E_SEED", "7"))  # of the codes and of where in the books the texts begin
START = 20000 + SEED % 10 * 4000  # first character of a book that is read: past contents and preface
FIRST = ["Olive", "Arthur", "Clara", "Edmund", "Flora", "George", "Helen", "Julian", "Martha", "Oscar", "Ruth", "Walter"]
LAST = ["Dalton", "Marsh", "Hollis", "Prescott", "Whitmore", "Barnes", "Coleman", "Fletcher", "Grayson", "Keller"]
CODES = 4  # hidden in each book
SURE = 1.0  # nats; see leave_out_unsure
NEEDLE = "\nThe access code of {name} is {code}.\n"
QUESTION = "\nQuestion: what is the access code of {name}? Answer:"
FOLD, COOLING = "fold", "cooling fold"
# name, codec, rate, share of needles that must be answered (None: reported only)
RUNS = [("dense4", native.DENSE4, 0, 1.0), ("balance 8x", native.BALANCE, 8, 0.9), ("balance 16x", native.BALANCE, 16, None),
        ("balance 32x", native.BALANCE, 32, None), ("fold 16x", FOLD, 16, None),
        ("cooling fold 16x", COOLING, 16, None), ("cooling fold 32x", COOLING, 32, None)]


class Score:
    """What one way of storing the cache gave, summed over books."""

    def __init__(self):
        self.right = self.asked = self.tokens = 0
        self.nll, self.stored, self.bf16, self.put_s, self.get_s = 0.0, 0, 0, 0.0, 0.0


class Story:
    """A book's text with codes hidden in it, and the model's exact cache of it."""

    def __init__(self, lm, model, tokenizer, path, number):
        self.lm, self.model, self.tokenizer = lm, model, tokenizer
        with open(path, encoding="utf8") as file:
            text = tokenizer.encode(file.read()[START:START + 8 * LENGTH])
        rng = random.Random(SEED * 100 + number)
        names = [f"{first} {last}" for first, last in zip(rng.sample(FIRST, CODES), rng.sample(LAST, CODES))]
        self.codes = {name: f"{rng.randrange(10 ** 6):06d}" for name in names}
        gap = (LENGTH - 350) // len(self.codes)
        self.ids, at = text[:gap // 2], gap // 2
        for name, code in self.codes.items():
            self.ids += tokenizer.encode(NEEDLE.format(name=name, code=code)) + text[at:at + gap]
            at += gap
        missing = LENGTH - len(self.ids)
        self.ids = self.ids[:LENGTH] + text[at:at + max(0, missing)]
        at += missing
        self.rest = text[at:at + CONTINUE]
        assert len(self.ids) == LENGTH and len(self.rest) == CONTINUE, f"{path} is too short"
        self.exact, _ = model.prefill(self.ids)
        self.k = np.stack([cache.K for cache in self.exact]).astype(np.float16)
        self.v = np.stack([cache.V for cache in self.exact]).astype(np.float16)

    def logprobs(self, prompt, target, caches):
        """Log-probabilities of all tokens before each of target's, [len(target), vocabulary]."""
        ids = prompt + target
        logits = self.model.decode(ids[:-1], caches, LENGTH)[len(prompt) - 1:].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def margin(self, name, caches):
        """By how many nats the model prefers the right code's digits to any other, at the least sure digit."""
        prompt = self.tokenizer.encode(QUESTION.format(name=name))
        target = self.tokenizer.encode(QUESTION.format(name=name) + " " + self.codes[name])[len(prompt):]
        table, rows = self.logprobs(prompt, target, caches), np.arange(len(target))
        right = table[rows, target].copy()
        table[rows, target] = -np.inf
        return float((right - table.max(-1)).min())

    def leave_out_unsure(self):
        """Codes that the model hardly knows from its own exact cache say nothing about ours. Returns how many."""
        sure = {name: code for name, code in self.codes.items() if self.margin(name, self.exact) >= SURE}
        left_out = len(self.codes) - len(sure)
        self.codes = sure
        return left_out

    def judge(self, score, caches):
        """Asks for every code (right: each digit is the model's first choice) and reads on in the book."""
        for name in self.codes:
            score.right += self.margin(name, caches) > 0
            score.asked += 1
        table = self.logprobs(self.rest[:1], self.rest[1:], caches)
        score.nll -= table[np.arange(len(table)), self.rest[1:]].sum()
        score.tokens += len(table)

    def payload(self, start):
        return b"".join(part[layer, :, start:start + BLOCK].tobytes() for layer in range(len(self.k))
                        for part in (self.k, self.v))

    def restore(self, parts):
        """Caches of what came from the daemon, with the worker's own newest tokens behind it."""
        caches = []
        for layer, exact in enumerate(self.exact):
            heads = []
            for head in range(self.k.shape[1]):
                sections = [part[layer, head] for part in parts]
                heads.append([np.concatenate([getattr(s, name) for s in sections]) for name in ("k", "v", "logw")])
            longest = max(len(logw) for _, _, logw in heads)
            k, v = (np.zeros((len(heads), longest + WINDOW, self.k.shape[-1]), np.float32) for _ in range(2))
            logw = np.full((len(heads), longest + WINDOW), -np.inf, np.float32)  # heads of unequal length are padded
            for head, (hk, hv, hw) in enumerate(heads):
                k[head, :len(hw)], v[head, :len(hw)], logw[head, :len(hw)] = hk, hv, hw
            k[:, longest:], v[:, longest:], logw[:, longest:] = exact.K[:, -WINDOW:], exact.V[:, -WINDOW:], 0
            caches.append(self.lm.Cache(k, v, logw))
        return caches


def through_daemon(daemon, story, name, codec, rate, score):
    """The story's cache put and got back; for a fold, a summary of all of it under raw bytes / rate."""
    layers, heads, _, dim = story.k.shape
    stored_as = dict(codec=native.DENSE4) if codec in (FOLD, COOLING) else dict(codec=codec, rate=rate)
    client = native.Client(daemon.target, model=name, layers=layers, kv_heads=heads, key_dim=dim, dtype=native.FP16,
                           block_tokens=BLOCK, sink_tokens=SINK, seed=1, **stored_as)
    keys, blocks, parent = [], [], None
    for start in range(0, BLOCK * BLOCKS, BLOCK):
        parent = client.key_next(parent, story.ids[start:start + BLOCK])
        keys.append(parent)
        blocks.append((parent, start, BLOCK, story.payload(start), 0, 0))
    bf16 = layers * heads * BLOCK * BLOCKS * dim * 2 * 2
    started = time.monotonic()
    client.put(blocks)
    put = time.monotonic()
    if codec in (FOLD, COOLING):
        records = client.fold(keys, bf16 // rate, profile=native.profile_for(rate) if codec == COOLING else "")
    else:
        records = client.get(keys)
    score.put_s, score.get_s = score.put_s + put - started, score.get_s + time.monotonic() - put
    client.close()
    score.stored, score.bf16 = score.stored + sum(size for _, size in records), score.bf16 + bf16
    return [part for part, _ in records]


@unittest.skipUnless(MODEL, "BKV_MODEL_DIR is not set: it must name a folder with lm.py and its weights")
class Needles(unittest.TestCase):
    def test_the_model_answers_from_what_came_back(self):
        sys.path.insert(0, MODEL)
        import lm
        folder = os.environ.get("BKV_BOOKS_DIR") or os.path.join(MODEL, "..", "books")
        books = sorted(glob.glob(os.path.join(folder, "*.txt")))
        self.assertTrue(books, f"no books in {folder}")
        model, tokenizer = lm.LM.load(), lm.Tokenizer()
        scores = {name: Score() for name in ["exact", *(name for name, *_ in RUNS)]}
        left_out = 0
        with Daemon(arena="1G") as daemon:
            for number, path in enumerate(books):
                started = time.monotonic()
                story = Story(lm, model, tokenizer, path, number)
                left_out += story.leave_out_unsure()
                story.judge(scores["exact"], story.exact)
                for name, codec, rate, _ in RUNS:
                    parts = through_daemon(daemon, story, name, codec, rate, scores[name])
                    story.judge(scores[name], story.restore(parts))
                print(f"  {os.path.basename(path)}: {time.monotonic() - started:.0f} s", flush=True)
        print(f"  {left_out} of {CODES * len(books)} codes are left out: the model is unsure of them even with its exact cache")
        self.assertLessEqual(left_out, CODES * len(books) // 8)
        self.finish(scores)

    def finish(self, scores):
        exact = scores["exact"]
        base, lines, rows = exact.nll / exact.tokens, [], []
        for name, need in [("exact", 1.0), *((name, need) for name, _, _, need in RUNS)]:
            score = scores[name]
            nll = score.nll / score.tokens
            lines.append([name, f"{score.bf16 / score.stored:.1f}x" if score.stored else "-", f"{score.right}/{score.asked}",
                          f"{nll:.4f}", f"{nll - base:+.4f}", f"{score.put_s:.1f}", f"{score.get_s:.1f}"])
            rows.append(report.row(f"{name} needles", score.right, "answered", score.asked, need))
            rows.append(report.row(f"{name} text NLL", nll, "nats", base if name != "exact" else None))
            if score.stored:
                rows.append(report.row(f"{name} rate", score.bf16 / score.stored, "x"))
        report.table(["stored as", "vs bf16", "needles", "NLL", "above exact", "put s", "get s"], lines)
        report.finish("e2e", rows, show=False)
        self.assertGreaterEqual(exact.asked, 24)
        self.assertEqual([row["name"] for row in rows if row["met"] is False], [])


if __name__ == "__main__":
    run()
