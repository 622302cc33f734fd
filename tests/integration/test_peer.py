"""The Peer service of a real daemon, asked by something that is no daemon: who may, and what comes back; its etcd is real."""
import os
import tempfile

from harness import Case, Code, TOKENS, eventually, key, payload, run

import grpc

from support.certificates import Authority
from support.daemon import Daemon
from support.etcd import Etcd
from support.wire import PEER, Client, pb, peer_pb

PEER_NAME = "balancekvd"


def stored(name, record, ttl_ms=0, cut=1 << 20):
    """The messages that send a record."""
    yield peer_pb.StoreRequest(record=peer_pb.StoreRecord(name=name, record_bytes=len(record), ttl_ms=ttl_ms),
                               data=record[:cut])
    for at in range(cut, len(record), cut):
        yield peer_pb.StoreRequest(data=record[at:at + cut])


class Peer:
    """Peer's calls over a client's connection."""

    def __init__(self, client):
        self.client = client

    def have(self, names):
        return list(self.client.unary(PEER + "Have", peer_pb.HaveRequest(names=b"".join(names)), peer_pb.HaveResponse).bytes)

    def forget(self, names):
        return list(self.client.unary(PEER + "Forget", peer_pb.ForgetRequest(names=b"".join(names)),
                                      peer_pb.ForgetResponse).had)

    def fetch(self, names):
        """(records, None for each that is missing; codes; what is left of their time in ms)."""
        call = self.client.channel.unary_stream(PEER + "Fetch", peer_pb.FetchRequest.SerializeToString,
                                                pb.RecordChunk.FromString)
        chunks = list(call(peer_pb.FetchRequest(names=b"".join(names)), timeout=20))
        records, codes, _, error = self.client.collect(iter(chunks), len(names))
        assert error is None
        left = [next((c.ttl_ms for c in chunks if c.index == i and c.record_bytes), None) for i in range(len(names))]
        return records, codes, left

    def store(self, messages):
        call = self.client.channel.stream_unary(PEER + "Store", peer_pb.StoreRequest.SerializeToString,
                                                peer_pb.StoreResponse.FromString)
        return call(iter(messages), timeout=20)

    def drain(self, **fields):
        return self.client.unary(PEER + "Drain", peer_pb.PeerDrainRequest(**fields), peer_pb.PeerDrainResponse)


class Pooled(Case):
    """A daemon that is a member, the only one: plain TCP on loopback unless `secured` has more."""

    @classmethod
    def setUpClass(cls):
        cls.etcd = Etcd()
        cls.addClassCleanup(cls.etcd.close)
        cls.etcd.start()
        cls.daemon = Daemon(etcd=cls.etcd.endpoint, node="only", verbs="off", **cls.secured())
        cls.addClassCleanup(cls.daemon.close)
        cls.daemon.start()

    @classmethod
    def secured(cls):
        return {}

    def connect_tcp(self, credentials=None):
        client = Client(f"127.0.0.1:{self.daemon.port()}", credentials)
        self.addCleanup(client.close)
        return client


class Plain(Pooled):
    """Where there is no TLS, whoever reaches the port is a peer; workers by the unix socket never are."""

    def setUp(self):
        super().setUp()
        self.peer = Peer(self.connect_tcp())

    def put(self, *numbers, **fields):
        spec_id = self.open()
        for n in numbers:
            self.client.put(spec_id, key(n), payload(n), TOKENS, **fields)
        return spec_id

    def test_the_socket_is_not_for_peers(self):
        worker = Peer(self.client)
        name = bytes(48)
        for call in (lambda: worker.have([name]), lambda: worker.fetch([name]), lambda: worker.forget([name]),
                     lambda: worker.store([]), lambda: worker.drain(ask=True)):
            self.assert_error(Code.PERMISSION_DENIED, "peer: ", call)

    def test_records_go_out_and_come_back(self):
        spec_id = self.put(1, 2)
        names = [spec_id + key(n) for n in (2, 99, 1)]
        records, codes, left = self.peer.fetch(names)
        self.assertEqual(codes, [0, Code.NOT_FOUND.value[0], 0])
        self.assertEqual(left, [0, None, 0])
        self.assertEqual([records[2], records[0]], self.client.get(spec_id, [key(1), key(2)]))
        self.assertEqual(self.peer.have(names), [len(records[0]), 0, len(records[2])])
        self.assertEqual(self.peer.forget(names), [True, False, True])
        self.assertEqual(self.peer.have(names), [0, 0, 0])
        reply = self.peer.store([*stored(names[0], records[0], 60000, 1000), *stored(names[2], records[2])])
        self.assertEqual((list(reply.codes), reply.message), ([0, 0], ""))
        again, _, left = self.peer.fetch(names)
        self.assertEqual(again, records)
        self.assertTrue(30000 < left[0] <= 60000 and left[2] == 0, left)
        self.assertEqual(self.client.get(spec_id, [key(2), key(1)]), [records[0], records[2]])
        self.assertEqual(list(self.peer.store(stored(names[0], records[0])).codes), [Code.ALREADY_EXISTS.value[0]])

    def test_a_get_says_what_is_left_of_the_time_too(self):
        spec_id = self.put(20, ttl_ms=60000)
        request = pb.GetRequest(spec_id=spec_id, keys=[key(20)])
        whole = next(iter(self.client.records("Get", request)))
        self.assertTrue(30000 < whole.ttl_ms <= 60000, whole.ttl_ms)
        request.layers = 1
        part = next(iter(self.client.records("Get", request)))
        self.assertTrue(part.record_bytes < whole.record_bytes and 30000 < part.ttl_ms <= 60000, part.ttl_ms)

    def test_nothing_damaged_is_taken(self):
        spec_id = self.put(30)
        name = spec_id + key(30)
        record = self.peer.fetch([name])[0][0]
        self.peer.forget([name])
        for at in (0, 8, 16, 24, 60, 80, 128, 140, len(record) // 2, len(record) - 1):
            bad = bytearray(record)
            bad[at] ^= 1
            with self.subTest(at):
                reply = self.peer.store(stored(name, bytes(bad)))
                self.assertIn(reply.codes[0], (Code.DATA_LOSS.value[0], Code.INVALID_ARGUMENT.value[0]))
                self.assertIn("record[0]: ", reply.message)
                self.assertEqual(self.peer.have([name]), [0])
        self.assertEqual(list(self.peer.store(stored(name, record)).codes), [0])

    def test_counters(self):
        spec_id = self.put(40)
        name = spec_id + key(40)
        record = self.peer.fetch([name])[0][0]
        before = self.client.stats()
        self.peer.forget([name])
        self.peer.store(stored(name, record))
        after = self.client.stats()
        self.assertEqual(after["adopted_total"] - before["adopted_total"], 1)
        self.assertEqual(after["published_total"], before["published_total"])
        self.assertEqual(after["copies"], 0)

    def test_without_rdma_there_are_no_one_sided_reads(self):
        client = self.connect_tcp()
        window = pb.VerbsWindow(queue_pair=17, packet=1, gid=bytes(15) + b"1", mtu=1024, reads=1)
        self.assert_error(Code.UNIMPLEMENTED, "transport.verbs: ", client.unary, PEER + "Link",
                          peer_pb.LinkRequest(verbs=window, member="other"), peer_pb.LinkResponse)
        self.assert_error(Code.UNIMPLEMENTED, "transport.verbs: ", client.unary, PEER + "Locate",
                          peer_pb.LocateRequest(link=bytes(16)), peer_pb.LocateResponse)

    def test_drain_from_a_peer_and_from_an_operator(self):
        self.assertFalse(self.peer.drain(ask=True).draining)
        self.assertTrue(self.peer.drain().draining)
        eventually(lambda: self.peer.drain(ask=True).draining, "etcd says so too")
        operator = self.client.unary("Drain", pb.DrainRequest(undo=True), pb.DrainResponse)
        self.assertFalse(operator.draining)
        eventually(lambda: not self.peer.drain(ask=True).draining, "etcd says so too")


class Tls(Pooled):
    """With TLS a peer is who has the cluster's name in a certificate of listen.tls_client_ca's, and nobody else."""

    @classmethod
    def secured(cls):
        folder = tempfile.TemporaryDirectory(prefix="bkv-peer-")
        cls.addClassCleanup(folder.cleanup)
        cls.authority = Authority(folder.name)
        cls.strangers = Authority(folder.name, "other")
        cls.authority.sign("daemon", f"DNS:{PEER_NAME}", "IP:127.0.0.1")
        cls.authority.sign("peer", "DNS:rack-7.example", "DNS:BalanceKVd")  # one of several names, and case does not matter
        cls.authority.sign("worker", "DNS:worker.example", "IP:127.0.0.1")
        cls.authority.sign("common", common=PEER_NAME)  # a common name is no DNS name
        cls.authority.sign("sly", f"URI:spiffe://{PEER_NAME}", f"email:{PEER_NAME}@example", f"DNS:{PEER_NAME}.example",
                           f"DNS:*.{PEER_NAME}", "DNS:*", common=PEER_NAME)
        cls.strangers.sign("stranger", f"DNS:{PEER_NAME}")
        return {"tls_cert": cls.authority.path("daemon.pem"), "tls_key": cls.authority.path("daemon.key"),
                "tls_client_ca": cls.authority.path("ca.pem"), "peer_name": PEER_NAME}

    def secure(self, own):
        read = self.authority.read
        return self.connect_tcp(grpc.ssl_channel_credentials(read("ca.pem"), read(own + ".key"), read(own + ".pem")))

    def test_a_peer_is_served(self):
        self.assertEqual(Peer(self.secure("peer")).have([bytes(48)]), [0])
        self.assertEqual(list(Peer(self.secure("daemon")).store([]).codes), [])

    def test_nobody_else_is(self):
        for own in ("worker", "common", "sly"):
            client = self.secure(own)
            peer = Peer(client)
            self.assertEqual(client.health(), 1)  # a client as any other
            for call in (lambda: peer.have([bytes(48)]), lambda: peer.fetch([bytes(48)]), lambda: peer.forget([bytes(48)]),
                         lambda: peer.store([]), lambda: peer.drain(ask=True)):
                with self.subTest(own):
                    self.assert_error(Code.PERMISSION_DENIED, "certificate: ", call)
        self.assert_error(Code.UNAVAILABLE, "", lambda: Peer(self.secure("stranger")).have([bytes(48)]))
        self.assert_error(Code.PERMISSION_DENIED, "peer: ", lambda: Peer(self.client).have([bytes(48)]))

    def test_operators_come_by_the_socket_or_with_a_peers_certificate(self):
        ask = pb.DrainRequest(ask=True)
        for client in (self.client, self.secure("peer")):
            self.assertFalse(client.unary("Drain", ask, pb.DrainResponse).draining)
        self.assert_error(Code.PERMISSION_DENIED, "certificate: ", self.secure("worker").unary, "Drain", ask, pb.DrainResponse)


class Alone(Case):
    """A daemon without a cluster has no peers."""

    def test_there_are_no_peers(self):
        with Client(f"127.0.0.1:{self.daemon.port()}") as client:
            peer = Peer(client)
            for call in (lambda: peer.have([bytes(48)]), lambda: peer.store([]), lambda: peer.drain(ask=True)):
                self.assert_error(Code.FAILED_PRECONDITION, "runs alone", call)


if __name__ == "__main__":
    run()
