"""The stored format, read independently of kernels/: written from the description at the head of kernels/summary.h.

Also attention over decoded records in float64, which the daemon's Attend is compared with.
"""
import ctypes
import struct

import numpy as np

HEADER = struct.Struct("<IHBBQQ32s16sQQIHHHHHHBB6sQQ")
FIELDS = ("magic version codec flags length checksum key spec_id tenant position tokens layers heads first_layer first_head "
          "key_dim value_dim dtype rate reserved0 seed reserved1").split()
SECTION = struct.Struct("<IIIBBBB")
MAGIC, VERSION, NATIVE, ALIGN = 0x53564B42, 2, 0xFF, 16
WEIGHTS, FOLD, SLICE = 1, 2, 4
BF16, FP16, FP32 = 1, 2, 3
RAW, DENSE8, DENSE4, BALANCE = 1, 2, 3, 4
ELEMENT = {BF16: 2, FP16: 2, FP32: 4}

_xxhash = None


def xxh3(data, seed=0):
    """XXH3-64, by the library that the daemon uses too; its algorithm is published and not ours to test."""
    global _xxhash
    if _xxhash is None:
        _xxhash = ctypes.CDLL("libxxhash.so.0").XXH3_64bits_withSeed
        _xxhash.restype, _xxhash.argtypes = ctypes.c_uint64, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
    return _xxhash(bytes(data), len(data), seed)


def to_float(raw, dtype):
    """Raw little-endian elements as float32."""
    if dtype == BF16:
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == FP16 else "<f4").astype(np.float32)


def from_float(values, dtype):
    """float32 array to raw elements; bf16 rounds to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == BF16:
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == FP16 else "<f4").tobytes()


def payload(keys, values, dtype):
    """K [layers][heads][tokens][key_dim] and V likewise as a Put's payload, [layer][K,V][head][token][dim]."""
    return b"".join(from_float(part, dtype) for k, v in zip(keys, values) for part in (k, v))


class Section:
    """One (layer, head): k [m, key_dim], v [m, value_dim], logw [m] float32, index [m] of source tokens."""

    def __init__(self, k, v, logw, index):
        self.k, self.v, self.logw, self.index = k, v, logw, index


class Record:
    """A whole record; raises ValueError for anything that its description does not allow."""

    def __init__(self, data):
        if len(data) < HEADER.size:
            raise ValueError(f"{len(data)} bytes are no record")
        for name, value in zip(FIELDS, HEADER.unpack_from(data)):
            setattr(self, name, value)
        if self.magic != MAGIC or self.version != VERSION:
            raise ValueError("magic or version")
        if self.length != len(data):
            raise ValueError(f"header says {self.length} bytes, there are {len(data)}")
        if xxh3(data[24:], int.from_bytes(data[:8], "little")) != self.checksum:
            raise ValueError("checksum")
        self.data = bytes(data)

    def section(self, layer, head):
        """Layer and head count from 0 within the record."""
        at = HEADER.size + SECTION.size * (layer * self.heads + head)
        key_at, value_at, m, key_bits, value_bits, kind, _ = SECTION.unpack_from(self.data, at)
        key_at, value_at = key_at * ALIGN, value_at * ALIGN
        index, at = self._index(key_at, m, kind)
        logw = np.zeros(m, np.float32)
        if self.flags & WEIGHTS:
            base, step = np.frombuffer(self.data, "<f2", 2, at).astype(np.float32)
            logw = base + step * np.frombuffer(self.data, np.uint8, m, at + 4).astype(np.float32)
            at += (4 + m + 3) // 4 * 4
        k = self._keys(at, m, key_bits)
        v = self._values(value_at, m, value_bits)
        return Section(k, v, logw, index)

    def _index(self, at, m, kind):
        if kind == 0:
            if m != self.tokens:
                raise ValueError("index all, but not every token is kept")
            return np.arange(m), at
        if kind == 1:
            words = (self.tokens + 31) // 32
            bits = np.unpackbits(np.frombuffer(self.data, np.uint8, 4 * words, at), bitorder="little")
            index = np.flatnonzero(bits)
            if len(index) != m or (m and index[-1] >= self.tokens):
                raise ValueError("bitmap")
            return index, at + 4 * words
        index = np.frombuffer(self.data, "<u4", m, at).astype(np.int64)
        if m and ((np.diff(index) <= 0).any() or index[-1] >= self.tokens):
            raise ValueError("index list")
        return index, at + 4 * m

    def _codes(self, at, m, dim, bits):
        row = dim * bits // 8
        raw = np.frombuffer(self.data, np.uint8, m * row, at).reshape(m, row)
        if bits == 3:
            return self._three(raw, dim)
        return self._bit_string(raw, dim, bits)

    @staticmethod
    def _bit_string(raw, dim, bits):
        m = len(raw)
        single = np.unpackbits(raw, axis=1, bitorder="little").reshape(m, dim, bits)
        return (single * (1 << np.arange(bits))).sum(-1).astype(np.float32)

    @classmethod
    def _three(cls, raw, dim):
        """Groups of 32 codes in six uint16: five codes each, and two more in the bits 15."""
        m, groups = len(raw), dim // 32
        half = np.ascontiguousarray(raw[:, :12 * groups]).view("<u2").reshape(m, groups, 6)
        codes = np.empty((m, groups, 32), np.float32)
        for p in range(5):
            codes[..., p:30:5] = half >> 3 * p & 7
        for spare in range(2):
            codes[..., 30 + spare] = sum((half[..., 2 * bit + spare] >> 15) << bit for bit in range(3))
        rest = cls._bit_string(raw[:, 12 * groups:], dim - 32 * groups, 3)
        return np.concatenate([codes.reshape(m, 32 * groups), rest], 1)

    def _native(self, at, m, dim):
        size = ELEMENT[self.dtype] * m * dim
        return to_float(self.data[at:at + size], self.dtype).reshape(m, dim)

    def _keys(self, at, m, bits):
        dim = self.key_dim
        if bits == NATIVE:
            return self._native(at, m, dim)
        groups = max(1, (m + 32) // 64)
        per = -(-m // groups)
        params = np.frombuffer(self.data, "<f2", groups * dim * 2, at).astype(np.float32).reshape(groups, dim, 2)
        codes = self._codes(at + groups * dim * 4, m, dim, bits)
        group = np.arange(m) // max(per, 1)
        return params[group, :, 1] + params[group, :, 0] * codes

    def _values(self, at, m, bits):
        dim = self.value_dim
        if bits == NATIVE:
            return self._native(at, m, dim)
        groups = -(-dim // 64)
        params = np.frombuffer(self.data, "<f2", m * groups * 2, at).astype(np.float32).reshape(m, groups, 2)
        codes = self._codes(at + m * groups * 4, m, dim, bits)
        group = np.arange(dim) // 64
        return params[:, group, 1] + params[:, group, 0] * codes


def attend(sections, q, scale=None):
    """Exact softmax attention of q [queries, key_dim] over the union of sections: (out [queries, value_dim], lse [queries])."""
    k = np.concatenate([s.k for s in sections]).astype(np.float64)
    v = np.concatenate([s.v for s in sections]).astype(np.float64)
    logw = np.concatenate([s.logw for s in sections]).astype(np.float64)
    scale = 1 / np.sqrt(k.shape[1]) if scale is None else scale
    score = scale * (q.astype(np.float64) @ k.T) + logw
    top = score.max(-1, keepdims=True)
    weight = np.exp(score - top)
    total = weight.sum(-1, keepdims=True)
    return weight @ v / total, (top + np.log(total))[:, 0]
