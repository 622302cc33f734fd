"""libbalancekv through ctypes: the real client, for the demo and the end-to-end test.

Only what these two need. Structures mirror client/balancekv.h, kernels/codec.h and kernels/summary.h field by field.
"""
import ctypes as c

import numpy as np

from . import built

RAW, DENSE8, DENSE4, BALANCE = 1, 2, 3, 4
FP16, FP32 = 2, 3


class Error(c.Structure):
    _fields_ = [("status", c.c_int), ("message", c.c_char * 256)]


class Options(c.Structure):
    _fields_ = [("endpoint", c.c_char_p), ("timeout_ms", c.c_uint32), ("tls_ca", c.c_char_p), ("tls_cert", c.c_char_p),
                ("tls_key", c.c_char_p), ("tls_name", c.c_char_p), ("transport", c.c_char_p),
                ("window_bytes", c.c_uint64), ("verbs_device", c.c_char_p), ("route", c.c_bool)]


class Spec(c.Structure):
    _fields_ = [("model", c.c_char_p), ("layers", c.c_uint32), ("kv_heads", c.c_uint32), ("key_dim", c.c_uint32),
                ("value_dim", c.c_uint32), ("dtype", c.c_int), ("block_tokens", c.c_uint32), ("tenant", c.c_char_p),
                ("tp_rank", c.c_uint32), ("tp_size", c.c_uint32), ("codec", c.c_int), ("rate", c.c_uint32),
                ("sink_tokens", c.c_uint32), ("no_sink", c.c_bool), ("seed", c.c_uint64), ("shares", c.c_char_p),
                ("share_count", c.c_size_t)]


Key, SpecId = c.c_uint8 * 32, c.c_uint8 * 16


class Put(c.Structure):
    _fields_ = [("key", Key), ("position", c.c_uint64), ("tokens", c.c_uint32), ("codec", c.c_int), ("rate", c.c_uint32),
                ("ttl_ms", c.c_uint64), ("payload", c.c_char_p), ("payload_bytes", c.c_size_t)]


class PutResult(c.Structure):
    _fields_ = [("stored_bytes", c.c_uint64), ("duplicate", c.c_bool), ("replicas", c.c_uint32)]


class RecordC(c.Structure):
    _fields_ = [("key", Key), ("status", c.c_int), ("data", c.c_void_p), ("length", c.c_size_t),
                ("owner", c.c_void_p)]


class Shape(c.Structure):
    _fields_ = [("layers", c.c_uint32), ("heads", c.c_uint32), ("tokens", c.c_uint32), ("key_dim", c.c_uint32),
                ("value_dim", c.c_uint32), ("dtype", c.c_int)]


class Params(c.Structure):
    _fields_ = [("codec", c.c_int), ("rate", c.c_uint32), ("sink", c.c_uint32), ("seed", c.c_uint64), ("shares", c.c_void_p)]


class RecordId(c.Structure):
    _fields_ = [("key", Key), ("spec_id", SpecId), ("tenant", c.c_uint64), ("position", c.c_uint64)]


class Stride(c.Structure):
    _fields_ = [("layer", c.c_int64), ("head", c.c_int64), ("token", c.c_int64)]


class Block(c.Structure):
    _fields_ = [("shape", Shape), ("keys", c.c_void_p), ("values", c.c_void_p), ("key_stride", Stride),
                ("value_stride", Stride)]


class PlaneLayout(c.Structure):
    _fields_ = [(name, c.c_uint64) for name in ("index_bytes", "weights", "key_params", "key_codes", "key_bytes", "value_codes",
                                                "value_bytes")]
    _fields_ += [(name, c.c_uint32) for name in ("key_groups", "key_group_tokens", "value_groups", "key_row", "value_row")]


class View(c.Structure):
    _fields_ = [("key_plane", c.c_void_p), ("value_plane", c.c_void_p), ("layout", PlaneLayout), ("tokens", c.c_uint32),
                ("source_tokens", c.c_uint32), ("key_dim", c.c_uint32), ("value_dim", c.c_uint32), ("key_bits", c.c_uint8),
                ("value_bits", c.c_uint8), ("index_kind", c.c_uint8), ("has_weights", c.c_bool), ("dtype", c.c_int)]


MAX_BANDS, FOLD_RECORDS = 8, 20


class Band(c.Structure):
    _fields_ = [("age", c.c_uint32), ("rate", c.c_uint32)]


class Profile(c.Structure):
    _fields_ = [("count", c.c_uint32), ("bands", Band * MAX_BANDS)]


class FoldParams(c.Structure):
    _fields_ = [("budget_bytes", c.c_uint64), ("rate", c.c_uint32), ("profile", Profile), ("ttl_ms", c.c_uint64)]


_library = None


def library():
    global _library
    if _library is None:
        _library = c.CDLL(built("lib", "libbalancekv.so"))
        _library.bkv_status_name.restype = c.c_char_p
        _library.bkv_backend_get.restype = c.c_void_p
        for name in ("bkv_codec_bound", "bkv_compress_workspace", "bkv_fold_workspace"):
            getattr(_library, name).restype = c.c_uint64
    return _library


class Failure(Exception):
    pass


def check(status, error):
    if status != 0:
        raise Failure(f"{library().bkv_status_name(status).decode()}: {error.message.decode(errors='replace')}")


class Section:
    """One (layer, head) as attention sees it: k, v float32 [m, dim], logw [m], index [m]."""

    def __init__(self, view):
        m = view.tokens
        self.k = np.empty((m, view.key_dim), np.float32)
        self.v = np.empty((m, view.value_dim), np.float32)
        self.logw, self.index = np.empty(m, np.float32), np.empty(m, np.uint32)
        library().bkv_section_read(c.byref(view), *(c.c_void_p(a.ctypes.data) for a in (self.k, self.v, self.logw, self.index)))


def sections(data, length):
    """{(layer, head): Section} of a record at address data, which is validated first."""
    error, shape, view = Error(), Shape(), View()
    check(library().bkv_record_check(c.c_void_p(data), c.c_size_t(length), c.byref(error)), error)
    library().bkv_record_shape(c.c_void_p(data), c.byref(shape))
    result = {}
    for layer in range(shape.layers):
        for head in range(shape.heads):
            library().bkv_record_section(c.c_void_p(data), layer, head, c.byref(view))
            result[layer, head] = Section(view)
    return result


class Client:
    """One client and one spec. endpoint: one, or several by commas. transport None: $BKV_TRANSPORT, else the best that both ends have."""

    def __init__(self, endpoint, timeout_ms=30000, transport=None, window_bytes=0, verbs_device=None, route=False,
                 **spec):
        self.handle, self.spec_id, self.error = c.c_void_p(), SpecId(), Error()
        options = Options(endpoint=endpoint.encode(), timeout_ms=timeout_ms, transport=transport and transport.encode(),
                          window_bytes=window_bytes, verbs_device=verbs_device and verbs_device.encode(),
                          route=route)
        check(library().bkv_client_create(c.byref(options), c.byref(self.handle), c.byref(self.error)), self.error)
        spec = Spec(**{name: value.encode() if isinstance(value, str) else value for name, value in spec.items()})
        check(library().bkv_open(self.handle, c.byref(spec), 0, c.byref(self.spec_id), None, c.byref(self.error)), self.error)

    def close(self):
        library().bkv_client_destroy(self.handle)
        self.handle = c.c_void_p()

    def key_next(self, parent, ids):
        key, tokens = Key(), np.ascontiguousarray(ids, np.uint32)
        library().bkv_key_next(c.byref(self.spec_id), c.byref(parent) if parent is not None else None,
                               c.c_void_p(tokens.ctypes.data), c.c_size_t(len(tokens)), c.byref(key))
        return key

    def put(self, blocks):
        """blocks: [(key, position, tokens, payload, codec, rate)] -> stored bytes of each."""
        return [result.stored_bytes for result in self.put_results(blocks)]

    def put_results(self, blocks):
        puts, results = (Put * len(blocks))(), (PutResult * len(blocks))()
        for put, (key, position, tokens, payload, codec, rate) in zip(puts, blocks):
            put.key, put.position, put.tokens, put.codec, put.rate = key, position, tokens, codec, rate
            put.payload, put.payload_bytes = payload, len(payload)
        check(library().bkv_put(self.handle, c.byref(self.spec_id), puts, c.c_size_t(len(blocks)), 0, results,
                                c.byref(self.error)), self.error)
        return results

    def lookup(self, keys):
        """Which of them are resident."""
        names, resident = (Key * len(keys))(*keys), (c.c_bool * len(keys))()
        check(library().bkv_lookup(self.handle, c.byref(self.spec_id), names, c.c_size_t(len(keys)), 0, resident, None,
                                   c.byref(self.error)), self.error)
        return list(resident)

    def _take(self, record):
        result = sections(record.data, record.length), record.length
        library().bkv_record_free(c.byref(record))
        return result

    def get_raw(self, keys):
        """The records as received; the caller frees them with free()."""
        records, names = (RecordC * len(keys))(), (Key * len(keys))(*keys)
        check(library().bkv_get(self.handle, c.byref(self.spec_id), names, c.c_size_t(len(keys)), None, 0, records,
                                c.byref(self.error)), self.error)
        return records

    def free(self, records):
        for record in records:
            library().bkv_record_free(c.byref(record))

    def get(self, keys):
        """[(sections, bytes)] of the records."""
        return [self._take(record) for record in self.get_raw(keys)]

    def fold_raw(self, keys, budget=0, rate=0, profile=""):
        """The fold's records as received, oldest first; the caller frees them with free(). profile: text, see kernels/cool.h."""
        records, names, count = (RecordC * FOLD_RECORDS)(), (Key * len(keys))(*keys), c.c_size_t()
        params = FoldParams(budget_bytes=budget, rate=rate)
        check(library().bkv_profile_parse(profile.encode(), c.byref(params.profile), c.byref(self.error)), self.error)
        check(library().bkv_fold_remote(self.handle, c.byref(self.spec_id), names, c.c_size_t(len(keys)), c.byref(params), 0,
                                        records, c.byref(count), c.byref(self.error)), self.error)
        return records[:count.value]

    def fold(self, keys, budget=0, rate=0, profile=""):
        """[(sections, bytes)] of the fold's records, oldest first."""
        return [self._take(record) for record in self.fold_raw(keys, budget, rate, profile)]

    def drop(self, keys):
        names, dropped = (Key * len(keys))(*keys), c.c_size_t()
        check(library().bkv_drop(self.handle, c.byref(self.spec_id), names, c.c_size_t(len(keys)), 0, c.byref(dropped),
                                 c.byref(self.error)), self.error)
        return dropped.value


def profile_for(rate):
    """The best known profile for a total rate, as text."""
    profile, text = Profile(), c.create_string_buffer(MAX_BANDS * 16)
    library().bkv_profile_for_rate(c.c_uint32(rate), c.byref(profile))
    library().bkv_profile_format(c.byref(profile), text)
    return text.value.decode()


def bound(shape, codec, rate=0):
    """Most bytes of a record; exact but for balance."""
    return library().bkv_codec_bound(c.byref(Shape(*shape)), c.byref(Params(codec, rate, 0, 0)))


def compress(shape, payload, codec, rate=0, sink=0, seed=0):
    """A payload compressed here, without a daemon: (sections, bytes). For baselines under the same quantiser."""
    lib, error, block, length = library(), Error(), Block(), c.c_size_t()
    shape = Shape(*shape)
    params, ident = Params(codec, rate, sink, seed), RecordId()
    backend = c.c_void_p(lib.bkv_backend_get(b"ref"))
    memory = c.create_string_buffer(payload, len(payload))
    lib.bkv_block_from_payload(c.byref(shape), memory, c.byref(block))
    room = lib.bkv_codec_bound(c.byref(shape), c.byref(params))
    scratch = lib.bkv_compress_workspace(backend, c.byref(shape), c.byref(params))
    space = np.empty(room + scratch + 192, np.uint8)
    record = (space.ctypes.data + 63) & ~63
    workspace = (record + room + 63) & ~63
    check(lib.bkv_compress(backend, c.byref(block), c.byref(params), c.byref(ident), c.c_void_p(record), c.c_size_t(room),
                           c.c_void_p(workspace), c.byref(length), c.byref(error)), error)
    return sections(record, length.value), length.value
