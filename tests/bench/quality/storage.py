"""What the baselines store: tokens of a (layer, head) at a few bits, every byte counted.

The same layout as our records (kernels/summary.h): keys per channel over groups of 64 kept tokens, values per token over groups
of 64 channels, a float16 scale and zero for each group, and which tokens are kept as a bitmap or a list, whichever is smaller.
Only what each method needs on top (weights) differs; headers are not counted against them.
"""
import numpy as np

GROUP = 64
NATIVE = 16  # bits of an element that is stored as it is


def index_bytes(source, kept):
    """Which `kept` of `source` tokens there are."""
    return 0 if kept == source else min(4 * -(-source // 32), 4 * kept)


def section_bytes(source, kept, dim, bits, token_extra=0, head_extra=0):
    """One (layer, head) that keeps so many tokens. extra: a method's own bytes for each token, and for each head."""
    if bits == NATIVE:
        codes = scales = 0
        native = 2 * kept * dim * 2
    else:
        native = 0
        codes = 2 * kept * dim * bits // 8
        scales = 4 * dim * key_groups(kept) + 4 * kept * -(-dim // GROUP)
    return index_bytes(source, kept) + native + codes + scales + token_extra * kept + head_extra


def key_groups(kept):
    return max(1, (kept + GROUP // 2) // GROUP)


def most_tokens(source, dim, bits, budget, token_extra=0, head_extra=0):
    """The most tokens of a (layer, head) that `budget` bytes hold; bytes only grow with tokens, but for the dropped index."""
    low, high = 0, source
    if section_bytes(source, source, dim, bits, token_extra, head_extra) <= budget:
        return source
    while high - low > 1:
        middle = (low + high) // 2
        if section_bytes(source, middle, dim, bits, token_extra, head_extra) <= budget:
            low = middle
        else:
            high = middle
    return low


def half(array):
    """As float16 stores it; what is beyond its range saturates."""
    return np.clip(array, -65504, 65504).astype(np.float16).astype(np.float32)


def round_groups(groups, bits, axis):
    """Quantised and read back: code = round((x - zero) / scale), scale and zero as float16 keeps them."""
    low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
    zero = half(low)
    top = 2 ** bits - 1
    scale = half((high - zero) / top)
    codes = np.rint((groups - zero) / np.where(scale > 0, scale, 1))
    return zero + scale * np.clip(codes, 0, top)


def round_keys(k, bits):
    """k [sections, m, dim] as it is read back."""
    if bits == NATIVE:
        return half(k)
    kept, out = k.shape[1], np.empty_like(k)
    per = -(-kept // key_groups(kept))
    for first in range(0, kept, per):
        out[:, first:first + per] = round_groups(k[:, first:first + per], bits, 1)
    return out


def round_values(v, bits):
    """v [sections, m, dim] as it is read back."""
    if bits == NATIVE:
        return half(v)
    return np.concatenate([round_groups(v[..., first:first + GROUP], bits, -1) for first in range(0, v.shape[-1], GROUP)], -1)
