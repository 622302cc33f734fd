"""Contexts: stretches of books, the model's exact cache of them, and what is asked afterwards.

In some, facts are hidden, and questions follow; others are the book alone, and the book goes on. The two are apart because
facts that have nothing to do with the book disturb its reading, and a cache that forgets them would read on better than the
exact one. Every context has a seed of its own: where in its book it begins, whose codes and moves are told, and where.
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
MOVES = (2, 1)  # of one person and the next, and so on; the last counts

# The names and places that the model was taught with.
FIRST = ["Adam", "Alice", "Arthur", "Beatrice", "Bernard", "Cora", "Daniel", "Diana", "Edgar", "Felix", "Flora", "George",
         "Grace", "Harold", "Irene", "Isaac", "Jack", "Karl", "Laura", "Leo", "Mary", "Olive", "Oliver", "Peter", "Phoebe",
         "Quentin", "Ralph", "Rosa", "Samuel", "Sarah", "Tessa", "Thomas", "Vera", "Victor", "Walter"]
LAST = ["Barker", "Carver", "Dalton", "Graves", "Harlow", "Irving", "Keller", "Lambert", "Norton", "Osborne", "Sawyer",
        "Vaughn"]
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


def code_facts(rng, names):
    """[(sentence, question, answer)] of a code for each name."""
    facts = []
    for name, last in zip(names, rng.sample(LAST, len(names))):
        code = f"{rng.randrange(10 ** 6):06d}"
        full = f"{name} {last}"
        facts.append((NEEDLE.format(name=full, code=code), CODE_QUESTION.format(name=full), " " + code))
    return facts


def move_facts(rng, names):
    """(sentences in the order of telling, [(question, answer)])."""
    told = [name for i, name in enumerate(names) for _ in range(MOVES[i % len(MOVES)])]
    rng.shuffle(told)
    where, sentences = {}, []
    for name in told:
        where[name] = rng.choice([place for place in PLACES if place != where.get(name)])
        sentences.append(MOVE.format(name=name, place=where[name]))
    return sentences, [(PLACE_QUESTION.format(name=name), " the " + place) for name, place in where.items()]


class Context:
    """ids [tokens], then either questions (needles, babi) or, without any, the text that follows (rest [CONTINUE + 1]).

    k, v, q: once read() ran."""

    def __init__(self, tokenizer, path, tokens, seed, questions):
        rng = random.Random(f"{seed}/{os.path.basename(path)}/{tokens}")
        self.path, self.tokens, self.seed = path, tokens, seed
        with open(path, encoding="utf8", errors="replace") as file:
            text = file.read()
        start = rng.randrange(len(text) // 50, max(len(text) // 50 + 1, len(text) - characters(tokens)))
        text = tokenizer.encode(text[start:start + characters(tokens)])
        names = rng.sample(FIRST, 2 * questions)
        codes = code_facts(rng, names[:questions])
        moves, places = move_facts(rng, names[questions:])
        self.ids, rest = self.hide(rng, tokenizer, text, [code[0] for code in codes], moves)
        self.rest = [] if questions else rest
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
        """What is read in one pass: the continuation, or the questions."""
        return Batch([(self.rest[:1], self.rest[1:])] if self.rest else self.needles + self.babi, self.tokens)

    def exact(self):
        """The whole cache as a summary of itself."""
        return whole(self.k, self.v)


def whole(k, v):
    """Exact tokens as a summary, at two bytes an element."""
    ones = np.ones(k.shape[:3], np.float32)
    return Summary(k, v, 0 * ones, ones, k.nbytes + v.nbytes)


class Judge:
    """What the exact model says of a context, and how far a summary is from it."""

    def __init__(self, model, context):
        self.model, self.context, self.passage = model, context, context.batch()
        empty = context.k[:, :, :0], context.v[:, :, :0]
        caches = model.caches(context.exact(), *empty)
        self.sure, own, chosen, self.queries = model.read(self.passage, caches, QUERIES)
        self.base = self.answers(own, chosen)
        if context.rest:
            self.base.update(kl=0.0, error=[0.0] * len(caches))
            self.outputs = model.attention(self.queries, caches)

    def answers(self, own, chosen):
        """Which questions are answered, or the NLL of the continuation."""
        if self.context.rest:
            return {"nll": float(-own.astype(np.float64).mean())}
        right = [bool(chosen[span].all()) for span in self.passage.spans]
        codes = len(self.context.needles)
        return {"needle": right[:codes], "babi": right[codes:]}

    def judge(self, summary, window):
        """Of a summary of all but the newest `window` tokens: answers; or NLL, divergence from the exact model and attention
        error by layer. And the bytes stored, and bytes as bf16 over them."""
        k, v = self.context.k, self.context.v
        start = k.shape[2] - window
        caches = self.model.caches(summary, k[:, :, start:], v[:, :, start:])
        table, own, chosen, _ = self.model.read(self.passage, caches)
        result = {**self.answers(own, chosen), "bytes": int(summary.bytes),
                  "rate": (k[:, :, :start].size + v[:, :, :start].size) * 2 / summary.bytes}
        if self.context.rest:
            result["kl"] = float((self.model.xp.exp(self.sure) * (self.sure - table)).sum(-1).mean())
            result["error"] = [float(((((near - exact) ** 2).sum((0, 2)) / (exact ** 2).sum((0, 2))) ** 0.5).mean())
                               for exact, near in zip(self.outputs, self.model.attention(self.queries, caches))]
        return result
