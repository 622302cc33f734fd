"""The model over any cache: many questions in one pass, each behind the same stored tokens; on NumPy or on CuPy.

lm.py's own layers do the arithmetic. Only its attention is replaced: several prompts run side by side, none sees another, and a
cached token has a weight in the numerator and one in the denominator of the softmax, which not every baseline keeps equal.
"""
import sys

import numpy as np

ABSENT = -1e4  # log weight of no token: heads of unequal length are padded with it


class Summary:
    """A compressed cache: k, v [layers, heads, n, dim], on the device or not, logw and den [layers, heads, n].

    A token's exp(<q, k> / sqrt(dim) + logw) multiplies v in the numerator and den in the denominator. `bytes`: what is stored;
    `clip` [2, layers, heads, dim] bounds what comes out of attention, where a method prescribes that."""

    def __init__(self, k, v, logw, den, stored, clip=None):
        self.k, self.v, self.logw, self.den, self.bytes, self.clip = k, v, logw, den, stored, clip


class DeviceCache:
    """One layer on the device: k with the log weight and v with the denominator's weight as one dimension more."""

    def __init__(self, xp, summary, layer, window_k, window_v):
        heads, stored, dim = summary.k.shape[1:]
        self.k = xp.zeros((heads, stored + window_k.shape[1], dim + 1), np.float32)
        self.v = xp.ones((heads, stored + window_v.shape[1], dim + 1), np.float32)
        for whole, part, weight, window in ((self.k, summary.k, summary.logw, window_k),
                                            (self.v, summary.v, summary.den, window_v)):
            whole[:, :stored, :dim], whole[:, :stored, dim] = xp.asarray(part[layer]), xp.asarray(weight[layer])
            whole[:, stored:, :dim] = xp.asarray(window)
        self.clip = None if summary.clip is None else xp.asarray(summary.clip[:, layer])


class Batch:
    """Prompts that start at the same position behind the same cache. parts: [(ids, first row whose next token is judged)].

    targets [rows]: the token that should follow each judged row; spans: each prompt's slice of the judged rows."""

    def __init__(self, prompts, position):
        ids, place, segment, rows, targets, self.spans = [], [], [], [], [], []
        for number, (prompt, target) in enumerate(prompts):
            text = (prompt + target)[:-1]
            self.spans.append(slice(len(rows), len(rows) + len(target)))
            rows += range(len(ids) + len(prompt) - 1, len(ids) + len(text))
            targets += target
            ids += text
            place += range(position, position + len(text))
            segment += [number] * len(text)
        self.ids, self.place, self.segment = ids, np.array(place), np.array(segment)
        self.rows, self.targets = np.array(rows), np.array(targets)


class Model:
    """lm.py of a folder. device "cpu" or "cuda"."""

    def __init__(self, folder, device="cpu"):
        sys.path.insert(0, folder)
        import lm
        self.lm, self.xp = lm, np
        self.tokenizer = lm.Tokenizer()
        self.net = lm.LM.load()
        if device == "cuda":
            import cupy
            self.xp = lm.np = cupy
            self.net.w = {name: cupy.asarray(array) for name, array in self.net.w.items()}
        self.chunk = 512 if self.xp is np else 2048
        self.segment = None  # of the tokens that run now: which prompt each belongs to
        lm.attend = self.attend

    def host(self, array):
        return array if self.xp is np else self.xp.asnumpy(array)

    def attend(self, q, cache, k, v):
        """q [t, query heads, dim]; k, v [heads, t, dim] of the same new tokens; cache a DeviceCache or None."""
        xp, (tokens, query_heads, dim), heads = self.xp, q.shape, len(k)
        group = query_heads // heads
        out = xp.empty_like(q)
        for first in range(0, tokens, self.chunk):
            last = min(tokens, first + self.chunk)
            seen = self.segment[first:last, None] == self.segment[None, :last]
            seen &= xp.arange(first, last)[:, None] >= xp.arange(last)[None]
            for h in range(heads):
                rows = q[first:last, h * group:(h + 1) * group].transpose(1, 0, 2) * np.float32(dim ** -0.5)
                own = rows @ k[h, :last].T
                own = xp.where(seen, own, np.float32(2 * ABSENT))
                top = own.max(-1, keepdims=True)
                if cache is not None:
                    rows = xp.concatenate((rows, xp.ones((*rows.shape[:2], 1), np.float32)), -1)
                    past = rows @ cache.k[h].T
                    top = xp.maximum(top, past.max(-1, keepdims=True))
                    past -= top
                    past = xp.exp(past, out=past) @ cache.v[h]
                own -= top
                xp.exp(own, out=own)
                total, mean = own.sum(-1, keepdims=True), own @ v[h, :last]
                if cache is not None:
                    total, mean = total + past[..., dim:], mean + past[..., :dim]
                mean /= total
                if cache is not None and cache.clip is not None:
                    mean = xp.clip(mean, cache.clip[0, h], cache.clip[1, h])
                out[first:last, h * group:(h + 1) * group] = mean.transpose(1, 0, 2)
        return out

    def prefill(self, ids, keep):
        """(k, v float16 [layers, heads, n, dim], q float16 of the newest `keep` tokens [layers, keep, query heads, dim])."""
        self.segment = self.xp.zeros(len(ids), np.int32)
        k, v, q = [], [], []
        for _, layer_q, layer_k, layer_v, _ in self.net.layers(ids, self.xp.arange(len(ids)), None):
            k.append(self.host(layer_k.astype(np.float16)))
            v.append(self.host(layer_v.astype(np.float16)))
            q.append(self.host(layer_q[-keep:].astype(np.float16)))
        return np.stack(k), np.stack(v), np.stack(q)

    def caches(self, summary, window_k, window_v):
        """A summary with the window's exact tokens [layers, heads, n, dim] behind it, on the device."""
        return [DeviceCache(self.xp, summary, layer, window_k[layer], window_v[layer]) for layer in range(len(summary.k))]

    def read(self, batch, caches, keep=0):
        """(log-probabilities [rows, vocabulary] on the device, for each target its own and whether it is the first choice,
        [(q, k, v)] of the batch's first `keep` tokens)."""
        xp = self.xp
        self.segment = xp.asarray(batch.segment)
        kept = []
        for _, q, k, v, x in self.net.layers(batch.ids, xp.asarray(batch.place), caches):
            if keep:
                kept.append((q[:keep].copy(), k[:, :keep].copy(), v[:, :keep].copy()))
        w, targets = self.net.w, xp.asarray(batch.targets)
        logits = self.lm.rms(x[xp.asarray(batch.rows)], w["nf"]) @ w["head"].T
        logits -= logits.max(-1, keepdims=True)
        logits -= xp.log(xp.exp(logits).sum(-1, keepdims=True))
        own = logits[xp.arange(len(targets)), targets]
        return logits, self.host(own), self.host(logits.argmax(-1) == targets), kept

    def attention(self, queries, caches):
        """Attention outputs [t, query heads, dim] of kept (q, k, v) over caches, layer by layer."""
        self.segment = self.xp.zeros(len(queries[0][0]), np.int32)
        return [self.attend(q, cache, k, v) for (q, k, v), cache in zip(queries, caches)]
