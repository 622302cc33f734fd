"""Our kernels through ctypes: blocks of a cache compressed, folded and read back. No daemon, no gRPC.

The library is build/lib/libbkvkernels.so (`make bench-quality` builds it), or libbalancekv.so where only that is built; the
structures are those of tests/support/native.py.
"""
import ctypes as c
import os

import numpy as np

from support import BUILD, built
from support.native import BALANCE, DENSE4, DENSE8, FP16, RAW, Block, Error, Params, RecordId, Shape, Stride, View

MAX_BANDS, FOLD_RECORDS = 8, 20


class FoldParams(c.Structure):
    _fields_ = [("budget", c.c_uint64), ("seed", c.c_uint64), ("shares", c.c_void_p)]


class Profile(c.Structure):
    class Band(c.Structure):
        _fields_ = [("age", c.c_uint32), ("rate", c.c_uint32)]
    _fields_ = [("count", c.c_uint32), ("bands", Band * MAX_BANDS)]


class CoolBlock(c.Structure):
    _fields_ = [("tokens", c.c_uint32), ("bytes", c.c_uint64)]


class CoolBand(c.Structure):
    _fields_ = [("first", c.c_uint32), ("count", c.c_uint32), ("tokens", c.c_uint64), ("budget", c.c_uint64)]


class CoolPart(c.Structure):
    _fields_ = [("first", c.c_uint32), ("count", c.c_uint32)]


CODECS = {"raw": RAW, "dense8": DENSE8, "dense4": DENSE4, "balance": BALANCE}
CPU_BACKENDS = ("amx", "avx512", "avx2", "ref")  # best first
ALIGN = 64


class KernelError(Exception):
    """What the kernels refused, in their words."""


def aligned(size):
    """`size` bytes at a multiple of 64, as records and workspaces want them."""
    space = np.empty(size + ALIGN, np.uint8)
    start = -space.ctypes.data % ALIGN
    return space[start:start + size]


def address(array):
    return c.c_void_p(array.ctypes.data)


def newest_library():
    """Either of the two that hold the kernels; after a change only the one that was made again is right."""
    paths = [os.path.join(BUILD, "lib", name) for name in ("libbkvkernels.so", "libbalancekv.so")]
    paths = [path for path in paths if os.path.exists(path)]
    return max(paths, key=os.path.getmtime) if paths else built("lib", "libbkvkernels.so")


class Kernels:
    """One backend ("auto": the best one for this CPU). Records are NumPy arrays of bytes; keys and values are float16
    [layers, heads, tokens, dim].

    shares [layers, heads] of 1..255: in which proportion the heads share a balance record's bytes; None: equally."""

    def __init__(self, backend="auto", shares=None):
        self.shares = None if shares is None else np.ascontiguousarray(shares, np.uint8)
        self.library = c.CDLL(newest_library())
        self.library.bkv_backend_get.restype = c.c_void_p
        for name in ("bkv_codec_bound", "bkv_compress_workspace", "bkv_fold_workspace", "bkv_cool_node_bytes"):
            getattr(self.library, name).restype = c.c_size_t
        names = CPU_BACKENDS if backend == "auto" else (backend,)
        found = filter(None, (self.library.bkv_backend_get(name.encode()) for name in names))
        self.backend = c.c_void_p(next(found, None))
        if not self.backend:
            raise KernelError(f"there is no backend {backend} here")

    def check(self, status, error):
        if status != 0:
            raise KernelError(error.message.decode(errors="replace"))

    def shares_address(self):
        return None if self.shares is None else self.shares.ctypes.data

    def compress(self, k, v, codec, rate=0, sink=32, seed=0, position=0):
        """One block's record."""
        layers, heads, tokens, dim = k.shape
        shape = Shape(layers, heads, tokens, dim, v.shape[3], FP16)
        params = Params(CODECS[codec], rate, sink, seed, self.shares_address())
        ident, error, length = RecordId(position=position), Error(), c.c_size_t()
        block = Block(shape, k.ctypes.data, v.ctypes.data, Stride(*k.strides[:3]), Stride(*v.strides[:3]))
        room = self.library.bkv_codec_bound(c.byref(shape), c.byref(params))
        record = aligned(room)
        workspace = aligned(self.library.bkv_compress_workspace(self.backend, c.byref(shape), c.byref(params)))
        self.check(self.library.bkv_compress(self.backend, c.byref(block), c.byref(params), c.byref(ident), address(record),
                                             c.c_size_t(room), address(workspace), c.byref(length), c.byref(error)), error)
        return record[:length.value]

    def compress_blocks(self, k, v, block_tokens, codec, **params):
        """Records of consecutive blocks; a last block of fewer than half the tokens joins the one before it."""
        tokens = k.shape[2]
        starts = list(range(0, max(1, tokens - block_tokens // 2), block_tokens))
        ends = starts[1:] + [tokens]
        return [self.compress(k[:, :, a:b], v[:, :, a:b], codec, position=a, **params) for a, b in zip(starts, ends)]

    def fold(self, records, budget, seed=0):
        """One record of at most `budget` bytes for consecutive ones."""
        pointers = (c.c_void_p * len(records))(*[record.ctypes.data for record in records])
        ident, error, length = RecordId(), Error(), c.c_size_t()
        params, count = FoldParams(budget, seed, self.shares_address()), c.c_uint32(len(records))
        workspace = aligned(self.library.bkv_fold_workspace(self.backend, pointers, count, c.c_uint64(budget)))
        record = aligned(budget)
        self.check(self.library.bkv_fold(self.backend, pointers, count, c.byref(ident), c.byref(params), address(record),
                                         address(workspace), c.byref(length), c.byref(error)), error)
        return record[:length.value]

    def fold_tree(self, records, budget, seed):
        """One record of all, merged as kernels/cool.h says: by nodes of bounded size."""
        before = np.concatenate(([0], np.cumsum([len(record) for record in records]))).astype(np.uint64)
        node_bytes = self.library.bkv_cool_node_bytes(c.c_uint64(budget))

        def part(first, count, budget):
            parts = (CoolPart * count)()
            used = self.library.bkv_cool_parts(address(before), c.c_uint32(first), c.c_uint32(count), c.c_uint64(node_bytes),
                                               parts)
            return self.fold([records[p.first] if p.count == 1 else part(p.first, p.count, node_bytes) for p in parts[:used]],
                             budget, seed)
        return part(0, len(records), budget)

    def fold_prefix(self, records, budget, profile, seed):
        """[records] of a fold: one without a profile; with one ("512:4,2048:8,:16", or "auto:RATE") several, by age."""
        if not profile:
            return [self.fold_tree(records, budget, seed)]
        ages, error, count, bands = Profile(), Error(), c.c_uint32(), (CoolBand * FOLD_RECORDS)()
        kind, _, rate = profile.partition(":")
        if kind == "auto":
            self.library.bkv_profile_for_rate(c.c_uint32(int(rate)), c.byref(ages))
        else:
            self.check(self.library.bkv_profile_parse(profile.encode(), c.byref(ages), c.byref(error)), error)
        shape = Shape()
        self.library.bkv_record_shape(address(records[0]), c.byref(shape))
        blocks = (CoolBlock * len(records))(*[(self.tokens(record), len(record)) for record in records])
        self.check(self.library.bkv_cool_plan(c.byref(shape), blocks, c.c_uint32(len(records)), c.byref(ages),
                                              c.c_uint64(budget), bands, c.byref(count), c.byref(error)), error)
        return [self.fold_tree(records[band.first:band.first + band.count], band.budget, seed) for band in bands[:count.value]]

    def tokens(self, record):
        """Source tokens of a record."""
        shape = Shape()
        self.library.bkv_record_shape(address(record), c.byref(shape))
        return shape.tokens

    def sections(self, record):
        """[layer][head] of (k [m, dim], v [m, dim], logw [m]) float32, validated first."""
        error, shape, view = Error(), Shape(), View()
        self.check(self.library.bkv_record_check(address(record), c.c_size_t(len(record)), c.byref(error)), error)
        self.library.bkv_record_shape(address(record), c.byref(shape))
        result = []
        for layer in range(shape.layers):
            heads = []
            for head in range(shape.heads):
                self.library.bkv_record_section(address(record), layer, head, c.byref(view))
                parts = (np.empty((view.tokens, view.key_dim), np.float32), np.empty((view.tokens, view.value_dim), np.float32),
                         np.empty(view.tokens, np.float32))
                self.library.bkv_section_read(c.byref(view), *(address(part) for part in parts), None)
                heads.append(parts)
            result.append(heads)
        return result
