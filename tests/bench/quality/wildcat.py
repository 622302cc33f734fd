"""WildCat (arXiv 2602.10056): a coreset by randomly pivoted Cholesky, weighted so that it stands for all keys.

The kernel is exp(beta / tau^2 <k, k'>) of centred keys, beta = 1 / sqrt(dim). Pivots are drawn in proportion to the residual of
its diagonal; W = K_SS^-1 K_S: then gives stored values W V and, for the denominator, W 1. Outputs are clipped to the range of
the values. Pivots are drawn in blocks with rejection, which draws from the same distribution as one at a time (accelerated
RPCholesky, arXiv 2410.03969). They are nested: one run serves every budget.

tau smooths the kernel. 1 keeps rare tokens apart and so answers most questions; 2 reads on better (66 codes at 4,096 tokens and
16x: 66 found with 1, 46 with 2; NLL above exact in two texts 0.047 with 1, 0.030 with 2). Each kind of context gets the better
one, which is more than a user could choose.
"""
import numpy as np

from . import storage
from .baselines import SINK

TAU_FACTS, TAU_TEXT = 1.0, 2.0
BLOCK = 128
JITTER = 1e-6
NOTHING = 1e-5  # of the diagonal: a residual that is rounding alone


def draw(rng, gram, residual):
    """Which of a block of proposals are accepted: gram [b, b] is the residual kernel among them, residual [b] its diagonal."""
    gram, accepted = gram.astype(np.float64), []
    chance = rng.random(len(residual))
    for i in range(len(residual)):
        if gram[i, i] > chance[i] * residual[i] and gram[i, i] > 1e-5 * residual[i]:
            accepted.append(i)
            column = gram[:, i] / np.sqrt(gram[i, i])
            gram -= np.outer(column, column)
    return accepted


def pivots(xp, rng, k, most, scale):
    """Up to `most` pivots of the kernel exp(scale <k, k'>) over k [n, dim], in the order drawn."""
    n, host = len(k), np.asarray if xp is np else xp.asnumpy
    squares = (k * k).sum(-1)
    shift = scale * squares.max()
    diagonal = xp.exp(scale * squares - shift)
    residual, factor, chosen = diagonal.copy(), xp.empty((n, most), np.float32), []
    while len(chosen) < most:
        left = xp.where(residual > NOTHING * diagonal, residual, 0).astype(np.float64)
        total = float(left.sum())
        if total <= 0:
            break
        cumulated = xp.cumsum(left)
        at = xp.searchsorted(cumulated, xp.asarray(rng.random(BLOCK) * total))
        at = xp.clip(at, 0, n - 1)
        done = len(chosen)
        gram = xp.exp(scale * (k[at] @ k[at].T) - shift) - factor[at, :done] @ factor[at, :done].T
        accepted = draw(rng, host(gram), host(residual[at]))[:most - done]
        if not accepted:
            continue
        accepted = xp.asarray(accepted)
        new, gram = at[accepted], gram[accepted][:, accepted].astype(np.float64)
        lower = xp.linalg.cholesky(gram + JITTER * xp.diag(xp.diag(gram)))
        columns = xp.exp(scale * (k @ k[new].T) - shift) - factor[:, :done] @ factor[new, :done].T
        columns = xp.linalg.solve(lower, columns.T.astype(np.float64)).T.astype(np.float32)
        factor[:, done:done + len(new)] = columns
        residual = xp.maximum(residual - (columns * columns).sum(-1), 0)
        residual[new] = 0
        chosen += host(new).tolist()
    return chosen


def weights(xp, k, v, index, scale):
    """(W V [m, dim], W 1 [m]) for pivots index: the best stand-ins for all keys in the kernel's feature space.

    Solved on the Gaussian form exp(-scale |k - k'|^2 / 2) of the kernel, whose diagonal is 1."""
    squares = scale * (k * k).sum(-1) / 2
    pivot, heavy = k[index], xp.exp(squares - squares.max())

    def gauss(other, other_squares):
        return xp.exp(np.float32(scale) * (pivot @ other.T) - squares[index][:, None] - other_squares[None])

    right = xp.concatenate((v, xp.ones((len(v), 1), np.float32)), 1) * heavy[:, None]
    sums = sum(gauss(k[a:a + 2048], squares[a:a + 2048]) @ right[a:a + 2048] for a in range(0, len(k), 2048))
    gram = gauss(pivot, squares[index]).astype(np.float64)
    solved = solve(xp, (gram + gram.T) / 2 + JITTER * xp.eye(len(pivot)), sums.astype(np.float64))
    solved /= heavy[index][:, None]
    return solved[:, :-1], solved[:, -1]


def solve(xp, matrix, right):
    """matrix^-1 right of a positive definite matrix."""
    if xp is np:
        return np.linalg.solve(matrix, right)
    from cupyx.scipy.linalg import solve_triangular
    lower = xp.linalg.cholesky(matrix)
    return solve_triangular(lower, solve_triangular(lower, right, lower=True), trans=1, lower=True)


class WildCat:
    """Pivots of one context's source, drawn once for the largest budget that is asked for."""

    TOKEN_EXTRA = 2  # a float16 weight for the denominator

    def __init__(self, source, most, tau):
        xp = source.xp
        self.source, self.scale = source, float(source.dim ** -0.5 / tau ** 2)
        inner = source.k[:, SINK:]
        self.k = xp.asarray(inner - inner.mean(1, keepdims=True))
        self.v = xp.asarray(source.v[:, SINK:])
        self.order = [pivots(xp, source.rng, k, most - SINK, self.scale) for k in self.k]

    def __call__(self, bits, budget):
        source, xp = self.source, self.source.xp
        head_extra = 2 * source.dim * 2  # the range that outputs are clipped to
        m = storage.most_tokens(source.n, source.dim, bits, budget, self.TOKEN_EXTRA, head_extra)
        m = min(m, SINK + min(len(order) for order in self.order))
        shape = (source.sections, m, source.dim)
        k, v, den = np.empty(shape, np.float32), np.empty(shape, np.float32), np.ones(shape[:2], np.float32)
        k[:, :SINK], v[:, :SINK] = source.k[:, :SINK], source.v[:, :SINK]
        for s, order in enumerate(self.order):
            index = np.sort(order[:m - SINK])
            mixed, weight = weights(xp, self.k[s], self.v[s], xp.asarray(index), self.scale)
            k[s, SINK:] = source.k[s, SINK + index]
            v[s, SINK:], den[s, SINK:] = (mixed, weight) if xp is np else (xp.asnumpy(mixed), xp.asnumpy(weight))
        clip = storage.half(np.stack((source.v.min(1), source.v.max(1))))
        stored = storage.section_bytes(source.n, m, source.dim, bits, self.TOKEN_EXTRA, head_extra)
        return source.summary(k, v, bits, np.zeros(shape[:2], np.float32), storage.half(den), stored, clip)
