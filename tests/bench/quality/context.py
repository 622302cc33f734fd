"""Contexts: stretches of books with facts hidden in them, the model's exact cache of them, and what is asked afterwards.

Every context has a seed of its own, from which come where in its book it begins, whose codes and moves are told, and where.
"""
import glob
import hashlib
import os
import random

import numpy as np

from .model import Batch, Summary

CONTINUE = 256  # tokens of the book that are read on
QUERIES = 64    # of these, the first ones whose attention is compared
RECENT = 600    # no fact is hidden in the newest tokens, so that a longer exact window does not answer for the summary
NEEDLE = "\nThe access code of {name} is {code}.\n"
CODE_QUESTION = "\nQuestion: what is the access code of {name}? Answer:"
MOVE = "\n{name} went to the {place}.\n"
PLACE_QUESTION = "\nQuestion: where is {name} now? Answer:"
MOVES = 2  # of each person; the last counts

# The names and places that the model was taught with.
CODE_FIRST = ["Olive", "Arthur", "Clara", "Edmund", "Flora", "George", "Helen", "Julian", "Martha", "Oscar", "Ruth", "Walter"]
CODE_LAST = ["Dalton", "Marsh", "Hollis", "Prescott", "Whitmore", "Barnes", "Coleman", "Fletcher", "Grayson", "Keller"]
PEOPLE = ["Bernard", "Adam", "Cora", "Tessa", "Samuel", "Laura", "Felix", "Quentin", "Edgar", "Oliver", "Grace", "Diana", "Karl",
          "Daniel", "Isaac", "Phoebe", "Jack", "Alice", "Sarah", "Thomas", "Peter", "Beatrice", "Rosa", "Ralph"]
PLACES = ["kitchen", "market", "stable", "garden", "bridge", "hallway", "bathroom", "tower", "office", "mill", "harbour",
          "bedroom", "attic", "library", "cellar", "chapel"]


def find_texts(folder, tokens):
    """The .txt files that are long enough for a context of so many tokens."""
    paths = sorted(glob.glob(os.path.join(folder, "*.txt")))
    long = [path for path in paths if os.path.getsize(path) > characters(tokens) * 3 // 2]
    if not long:
        raise SystemExit(f"{folder} has no .txt file that is long enough for {tokens} tokens "
                         f"({characters(tokens) * 3 // 2} characters)")
    return long


def characters(tokens):
    """More than any prose needs for so many tokens."""
    return 7 * (tokens + CONTINUE + 64)


def code_facts(rng, count):
    """[(sentence, question, answer)] of codes."""
    names = rng.sample([f"{first} {last}" for first in CODE_FIRST for last in CODE_LAST], count)
    codes = [f"{rng.randrange(10 ** 6):06d}" for _ in names]
    return [(NEEDLE.format(name=name, code=code), CODE_QUESTION.format(name=name), " " + code)
            for name, code in zip(names, codes)]


def move_facts(rng, count):
    """(sentences in the order of telling, [(question, answer)])."""
    told = [name for name in rng.sample(PEOPLE, count) for _ in range(MOVES)]
    rng.shuffle(told)
    where, sentences = {}, []
    for name in told:
        where[name] = rng.choice([place for place in PLACES if place != where.get(name)])
        sentences.append(MOVE.format(name=name, place=where[name]))
    return sentences, [(PLACE_QUESTION.format(name=name), " the " + place) for name, place in where.items()]


class Context:
    """ids [tokens], rest [CONTINUE + 1] and what is asked; k, v, q once read() ran."""

    def __init__(self, tokenizer, path, tokens, seed, questions):
        rng = random.Random(f"{seed}/{os.path.basename(path)}/{tokens}")
        self.path, self.tokens, self.seed = path, tokens, seed
        with open(path, encoding="utf8", errors="replace") as file:
            text = file.read()
        start = rng.randrange(len(text) // 50, max(len(text) // 50 + 1, len(text) - characters(tokens)))
        text = tokenizer.encode(text[start:start + characters(tokens)])
        codes = code_facts(rng, questions)
        moves, places = move_facts(rng, questions)
        self.ids, self.rest = self.hide(rng, tokenizer, text, [code[0] for code in codes], moves)
        self.needles = [self.pair(tokenizer, question, answer) for _, question, answer in codes]
        self.babi = [self.pair(tokenizer, question, answer) for question, answer in places]

    def hide(self, rng, tokenizer, text, codes, moves):
        """The facts spread over the text, moves in their order; (context, what follows)."""
        facts = [True] * len(moves) + [False] * len(codes)
        rng.shuffle(facts)
        moves, codes = iter(moves), iter(codes)
        facts = [tokenizer.encode(next(moves if move else codes)) for move in facts]
        prose = self.tokens - sum(len(fact) for fact in facts)
        recent = min(RECENT, self.tokens // 4)
        if prose < 2 * recent or len(text) < prose + CONTINUE + 1:
            raise SystemExit(f"{self.path}: {self.tokens} tokens do not hold {len(facts)} facts, or the text is too short")
        places = sorted(rng.randrange(64, prose - recent) for _ in facts)
        ids, at = [], 0
        for place, fact in zip(places, facts):
            ids += text[at:place] + fact
            at = place
        return ids + text[at:prose], text[prose:prose + CONTINUE + 1]

    @staticmethod
    def pair(tokenizer, question, answer):
        """(prompt, target): an answer's tokens as they are behind the question."""
        prompt = tokenizer.encode(question)
        return prompt, tokenizer.encode(question + answer)[len(prompt):]

    def read(self, model, cache=None):
        """Keys, values and newest queries of the exact model, kept in the folder `cache` between runs."""
        name = hashlib.sha256(repr((self.ids, os.path.getsize(model.lm.__file__))).encode()).hexdigest()[:24]
        path = cache and os.path.join(cache, name + ".npz")
        if path and os.path.exists(path):
            with np.load(path) as file:
                self.k, self.v, self.q = file["k"], file["v"], file["q"]
            return
        self.k, self.v, self.q = model.prefill(self.ids, QUERIES)
        if path:
            os.makedirs(cache, exist_ok=True)
            np.savez(path + f".{os.getpid()}.npz", k=self.k, v=self.v, q=self.q)
            os.replace(path + f".{os.getpid()}.npz", path)

    def batch(self):
        """The continuation, then the codes, then the places, in one pass."""
        return Batch([(self.rest[:1], self.rest[1:]), *self.needles, *self.babi], self.tokens)

    def exact(self):
        """The whole cache as a summary of itself."""
        return whole(self.k, self.v)


def whole(k, v):
    """Exact tokens as a summary, at two bytes an element."""
    ones = np.ones(k.shape[:3], np.float32)
    return Summary(k.astype(np.float32), v.astype(np.float32), 0 * ones, ones, k.nbytes + v.nbytes)


class Judge:
    """What the exact model says of a context, and how far a summary is from it."""

    def __init__(self, model, context):
        self.model, self.context, self.passage = model, context, context.batch()
        empty = context.k[:, :, :0], context.v[:, :, :0]
        caches = model.caches(context.exact(), *empty)
        self.base, self.sure, self.queries = self.judge_caches(caches, QUERIES)
        self.outputs = model.attention(self.queries, caches)

    def judge_caches(self, caches, keep=0):
        """(answers and NLL, log-probabilities [CONTINUE, vocabulary] of what follows, kept queries)."""
        table, own, chosen, kept = self.model.read(self.passage, caches, keep)
        spans, first = self.passage.spans, 1 + len(self.context.needles)
        answers = [bool(chosen[span].all()) for span in spans]
        return ({"needle": answers[1:first], "babi": answers[first:], "nll": float(-own[spans[0]].astype(np.float64).mean())},
                table[spans[0]], kept)

    def judge(self, summary, window):
        """Answers, NLL, divergence from the exact model and attention error by layer of a summary of all but the newest
        `window` tokens."""
        k, v = self.context.k, self.context.v
        start = k.shape[2] - window
        caches = self.model.caches(summary, k[:, :, start:], v[:, :, start:])
        result, table, _ = self.judge_caches(caches)
        xp = self.model.xp
        result["kl"] = float((xp.exp(self.sure) * (self.sure - table)).sum(-1).mean())
        result["error"] = []
        for exact, near in zip(self.outputs, self.model.attention(self.queries, caches)):
            far = ((near - exact) ** 2).sum((0, 2)) / (exact ** 2).sum((0, 2))
            result["error"].append(float((far ** 0.5).mean()))
        result["bytes"] = int(summary.bytes)
        result["rate"] = (k[:, :, :start].size + v[:, :, :start].size) * 2 / summary.bytes
        return result
