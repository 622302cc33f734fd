"""A stock gRPC client: it knows nothing of balancekvd but proto/*.proto, compiled here by protoc at run time."""
import hashlib
import os
import subprocess
import sys
import tempfile

import grpc

from . import ROOT

_folder = tempfile.TemporaryDirectory(prefix="bkv-proto-")
subprocess.run(["protoc", "-I" + os.path.join(ROOT, "proto"), "--python_out=" + _folder.name, "balancekv.proto",
                "peer.proto", "health.proto"], check=True)
sys.path.insert(0, _folder.name)
import balancekv_pb2 as pb  # noqa: E402
import health_pb2 as health_pb  # noqa: E402
import peer_pb2 as peer_pb  # noqa: E402

SERVICE = "/balancekv.v1.BalanceKV/"
PEER = "/balancekv.cluster.v1.Peer/"
HEALTH = "/grpc.health.v1.Health/"
CHUNK = 1 << 20
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0),
           ("grpc.use_local_subchannel_pool", 1)]


def identity(message):
    return message


def key_next(spec_id, parent, tokens):
    """The key that proto/balancekv.proto prescribes."""
    ids = b"".join(int(t).to_bytes(4, "little") for t in tokens)
    return hashlib.sha256(spec_id + (parent or bytes(32)) + ids).digest()


def put_messages(block, data, chunk=CHUNK, first=True):
    """A block's PutRequests. first: whether the message with `block` carries data as well."""
    at = chunk if first else 0
    yield pb.PutRequest(block=block, data=data[:at])
    while at < len(data):
        yield pb.PutRequest(data=data[at:at + chunk])
        at += chunk


class Client:
    """One connection. Every call takes and returns protobuf messages and raises grpc.RpcError."""

    def __init__(self, target, credentials=None, options=()):
        options = OPTIONS + list(options)
        if credentials:
            self.channel = grpc.secure_channel(target, credentials, options)
        else:
            self.channel = grpc.insecure_channel(target, options)

    def close(self):
        self.channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def unary(self, method, request, reply, timeout=20, raw=None):
        """raw: bytes to send in place of the request."""
        path = method if method.startswith("/") else SERVICE + method
        call = self.channel.unary_unary(path, identity if raw is not None else type(request).SerializeToString,
                                        reply.FromString)
        return call(raw if raw is not None else request, timeout=timeout)

    def records(self, method, request, timeout=20):
        """The stream of RecordChunks of Get or Fold."""
        call = self.channel.unary_stream(SERVICE + method, type(request).SerializeToString, pb.RecordChunk.FromString)
        return call(request, timeout=timeout)

    def open(self, timeout=20, **spec):
        return self.unary("Open", pb.OpenRequest(spec=pb.Spec(**spec)), pb.OpenResponse, timeout)

    def lookup(self, spec_id, keys, timeout=20):
        return self.unary("Lookup", pb.LookupRequest(spec_id=spec_id, keys=keys), pb.LookupResponse, timeout)

    def put_stream(self, messages, timeout=20, raw=False):
        call = self.channel.stream_unary(SERVICE + "Put", identity if raw else pb.PutRequest.SerializeToString,
                                         pb.PutResponse.FromString)
        return call(iter(messages), timeout=timeout)

    def put(self, spec_id, key, data, tokens, timeout=20, chunk=CHUNK, first=True, **fields):
        block = pb.PutBlock(spec_id=spec_id, key=key, tokens=tokens, payload_bytes=len(data), **fields)
        return self.put_stream(put_messages(block, data, chunk, first), timeout)

    def collect(self, stream, count):
        """Chunks gathered into (records: list of bytes or None, codes, messages)."""
        parts, codes, messages, sizes = [[] for _ in range(count)], [0] * count, [""] * count, [None] * count
        error = None
        try:
            for chunk in stream:
                if chunk.code:
                    codes[chunk.index], messages[chunk.index] = chunk.code, chunk.message
                    continue
                if not parts[chunk.index]:
                    sizes[chunk.index] = chunk.record_bytes
                parts[chunk.index].append(chunk.data)
        except grpc.RpcError as caught:
            error = caught
        records = [b"".join(p) if p else None for p in parts]
        for record, size in zip(records, sizes):
            if record is not None and error is None and len(record) != size:
                raise AssertionError(f"record_bytes says {size}, {len(record)} came")
        return records, codes, messages, error

    def get(self, spec_id, keys, timeout=20, **fields):
        """All records; raises the call's error."""
        request = pb.GetRequest(spec_id=spec_id, keys=keys, **fields)
        records, _, _, error = self.collect(self.records("Get", request, timeout), len(keys))
        if error is not None:
            raise error
        return records

    def try_get(self, spec_id, keys, timeout=20, **fields):
        """(records, codes, messages, error or None)."""
        request = pb.GetRequest(spec_id=spec_id, keys=keys, **fields)
        return self.collect(self.records("Get", request, timeout), len(keys))

    def fold(self, spec_id, keys, budget, timeout=20, **fields):
        request = pb.FoldRequest(spec_id=spec_id, keys=keys, budget_bytes=budget, **fields)
        records, _, _, error = self.collect(self.records("Fold", request, timeout), 1)
        if error is not None:
            raise error
        return records[0]

    def bands(self, spec_id, keys, profile, timeout=20, **fields):
        """The records of a Fold by age, oldest first; profile: [(age, rate)], newest first."""
        bands = [pb.Band(age=age, rate=rate) for age, rate in profile]
        request = pb.FoldRequest(spec_id=spec_id, keys=keys, profile=bands, **fields)
        records, _, _, error = self.collect(self.records("Fold", request, timeout), 20)
        if error is not None:
            raise error
        return [record for record in records if record is not None]

    def attend(self, spec_id, keys, q, layers=0, first_layer=0, scale=0.0, timeout=20):
        """q float32 [layers][query_heads][queries][key_dim] as a NumPy array."""
        request = pb.AttendRequest(spec_id=spec_id, keys=keys, first_layer=first_layer, layers=layers, query_heads=q.shape[1],
                                   queries=q.shape[2], scale=scale, q=q.astype("<f4").tobytes())
        return self.unary("Attend", request, pb.AttendResponse, timeout)

    def warm(self, spec_id, keys, timeout=20):
        return self.unary("Warm", pb.WarmRequest(spec_id=spec_id, keys=keys), pb.WarmResponse, timeout)

    def pin(self, spec_id, keys, ttl_ms, timeout=20):
        return self.unary("Pin", pb.PinRequest(spec_id=spec_id, keys=keys, ttl_ms=ttl_ms), pb.PinResponse, timeout)

    def unpin(self, lease, timeout=20):
        return self.unary("Unpin", pb.UnpinRequest(lease=lease), pb.UnpinResponse, timeout)

    def drop(self, spec_id, keys, timeout=20):
        return self.unary("Drop", pb.DropRequest(spec_id=spec_id, keys=keys), pb.DropResponse, timeout).dropped

    def stats(self, timeout=20):
        """{metric name without its prefix: value}; the whole reply under ""."""
        reply = self.unary("Stats", pb.StatsRequest(), pb.StatsResponse, timeout)
        values = {metric.name[len("balancekv_"):]: metric.value for metric in reply.metrics}
        values[""] = reply
        return values

    def health(self, service="", timeout=20):
        request = health_pb.HealthCheckRequest(service=service)
        return self.unary(HEALTH + "Check", request, health_pb.HealthCheckResponse, timeout).status

    def watch(self, service="", timeout=20):
        call = self.channel.unary_stream(HEALTH + "Watch", health_pb.HealthCheckRequest.SerializeToString,
                                         health_pb.HealthCheckResponse.FromString)
        return call(health_pb.HealthCheckRequest(service=service), timeout=timeout)
