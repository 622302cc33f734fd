#!/usr/bin/env python3
"""One-sided reads between daemons of a cluster: two of them, with a real etcd, in one guest, each with an end of the cable as its
device. Blocks are put at their owner and got at the other one, which READs them; when RDMA fails, they come by gRPC.

The members speak gRPC through lo, so that the cable may be pulled out without them losing each other.
"""
import subprocess
import sys
import threading
import time
import unittest

import grpc
import guest
from guest import BLOCK, LAYERS, SETTLE_S, SPEC, TOKENS, content, eventually, pb
from harness import Daemon, wire
from support.etcd import Etcd, free_port

BLOCKS = 8
DEADLINE_S = 8  # of a call
GRACE_S = 3  # of an emulated machine


def key(name):
    return (b"rdma-%d-" % name).ljust(32, b".")


class Node:
    def __init__(self, name, device, etcd):
        port = free_port()
        self.daemon = Daemon(node=name, verbs=device, etcd=etcd.endpoint, tcp=f"127.0.0.1:{port}", lease="5s", replicas=1,
                             repair_delay="10m", hot_copies=0, peer_timeout="2s", arena="64M", slab="2M", staging="16M")
        self.client = wire.Client(f"127.0.0.1:{port}")

    def start(self):
        self.daemon.start()
        return self

    def members(self):
        reply = self.client.unary("Cluster", pb.ClusterRequest(), pb.ClusterResponse)
        return sorted((member.id, member.epoch) for member in reply.members)

    def stat(self, name):
        return int(self.client.stats()[name])

    def reads(self):
        return self.stat("cluster_peer_read_total")

    def close(self):
        self.client.close()
        self.daemon.close()


class Reads(unittest.TestCase):
    """Here gets what there owns: `keys`."""

    @classmethod
    def setUpClass(cls):
        cls.etcd = Etcd().start()
        cls.addClassCleanup(cls.etcd.close)
        cls.here, cls.there = Node("here", "rxe0", cls.etcd), Node("there", "rxe1", cls.etcd)
        for node in (cls.here, cls.there):
            cls.addClassCleanup(node.close)
            node.start()
        cls.wait_for_members()
        cls.spec_id = cls.here.client.open(**SPEC).spec_id
        asked = pb.WhereRequest(spec_id=cls.spec_id, keys=[key(name) for name in range(8 * BLOCKS)])
        reply = cls.here.client.unary("Where", asked, pb.WhereResponse)
        cls.names = [name for name, where in enumerate(reply.keys) if list(where.owners) == ["there"]][:BLOCKS]

    def setUp(self):
        self.assertEqual(len(self.names), BLOCKS)
        self.put()

    @classmethod
    def wait_for_members(cls, before=()):
        """Until both know both, as they are now: what a killed member has left in etcd stands there until it registers anew."""
        def known():
            members = cls.here.members()
            return len(members) == 2 and members == cls.there.members() and members != before
        eventually(known, "both are members", 20)

    def put(self):
        self.there.client.open(**SPEC)
        for name in self.names:
            self.there.client.put(self.spec_id, key(name), content(name), TOKENS, position=TOKENS * name)

    def get(self, names):
        """Gets records here and checks their bytes; AssertionError when one is wrong or missing."""
        records = self.here.client.get(self.spec_id, [key(name) for name in names], timeout=DEADLINE_S)
        for name, record in zip(names, records):
            self.assertIsNotNone(record, f"key {name} is missing")
            self.assertTrue(record.endswith(content(name)), f"wrong bytes came for key {name}")

    def get_until_read(self):
        def reads():
            before = self.here.reads()
            self.get(self.names)
            return self.here.reads() == before + BLOCKS
        eventually(reads, "all records come by READ", 20)

    def test_records_are_read(self):
        self.get_until_read()
        before = self.here.reads()
        for name in self.names:
            self.get([name])
        self.get(self.names)
        self.assertEqual(self.here.reads(), before + 2 * BLOCKS)
        self.assertGreaterEqual(self.here.stat("cluster_remote_hits_total"), 2 * BLOCKS)
        self.assertEqual(self.there.reads(), 0)
        eventually(lambda: self.there.stat("pinned") == 0 and self.here.stat("pinned") == 0, "nothing is held", SETTLE_S)

    def test_a_missing_record_is_missing(self):
        self.get_until_read()
        gone = self.names[3]
        self.there.client.unary("Drop", pb.DropRequest(spec_id=self.spec_id, keys=[key(gone)]), pb.DropResponse)
        before = self.here.reads()
        records, codes, _, error = self.here.client.try_get(self.spec_id, [key(name) for name in self.names])
        self.assertEqual(error.code(), grpc.StatusCode.NOT_FOUND)
        for name, record, code in zip(self.names, records, codes):
            if name == gone:
                self.assertEqual((record, code), (None, grpc.StatusCode.NOT_FOUND.value[0]))
            else:
                self.assertTrue(record.endswith(content(name)))
        self.assertEqual(self.here.reads(), before + BLOCKS - 1)

    def test_nonsense_is_refused(self):
        """Link and Locate as no daemon would ask; who does as it should is read to none the less."""
        def refused(code, field, method, request, reply):
            with self.assertRaises(grpc.RpcError) as caught:
                self.there.client.unary(wire.PEER + method, request, reply)
            self.assertEqual((caught.exception.code(), caught.exception.details().split(":")[0]), (code, field))
        link, locate = wire.peer_pb.LinkRequest, wire.peer_pb.LocateRequest
        good = dict(queue_pair=99, packet=1, gid=bytes(10) + b"\xff\xff\x0a\x4d\x00\x01", mtu=1024, reads=1)
        for field, member, verbs in (("verbs", "m", None), ("member", "m" * 64, good), ("member", "", good),
                                     ("verbs.gid", "m", {**good, "gid": b"short"}), ("verbs.mtu", "m", {**good, "mtu": 1000}),
                                     ("verbs.queue_pair", "m", {**good, "queue_pair": 1})):
            refused(grpc.StatusCode.INVALID_ARGUMENT, field, "Link",
                    link(verbs=pb.VerbsWindow(**verbs) if verbs else None, member=member), wire.peer_pb.LinkResponse)
        for code, field, fields in (("INVALID_ARGUMENT", "link", dict(link=b"short")),
                                    ("INVALID_ARGUMENT", "names", dict(link=bytes(16), names=bytes(49))),
                                    ("INVALID_ARGUMENT", "release", dict(link=bytes(16), release=range(65))),
                                    ("FAILED_PRECONDITION", "link", dict(link=bytes(16), names=bytes(48))),
                                    ("FAILED_PRECONDITION", "link", dict(link=b"\xff" * 16, release=[1]))):
            refused(grpc.StatusCode[code], field, "Locate", locate(**fields), wire.peer_pb.LocateResponse)
        self.get_until_read()

    def test_the_cable_is_pulled_out(self):
        """While records are read: nothing is wrong, missing or late, as gRPC goes on; later they are read again."""
        self.get_until_read()
        stop, failures, rounds = threading.Event(), [], []

        def load():
            while not stop.is_set():
                begin = time.monotonic()
                try:
                    self.get(self.names)
                except (AssertionError, grpc.RpcError) as error:
                    failures.append(error)
                rounds.append(time.monotonic() - begin)
        thread = threading.Thread(target=load)
        thread.start()
        try:
            time.sleep(0.5)
            subprocess.run(["ip", "link", "set", "veth1", "down"], check=True)
            done, log = len(rounds), self.here.daemon.log_text
            eventually(lambda: "RDMA link has failed" in log(), "a READ fails", DEADLINE_S)
            eventually(lambda: len(rounds) >= done + 4, "some rounds without the cable", 4 * DEADLINE_S)
        finally:
            stop.set()
            thread.join()
            subprocess.run(["ip", "link", "set", "veth1", "up"], check=True)
        self.assertEqual(failures, [])
        self.assertLess(max(rounds), DEADLINE_S + GRACE_S)
        before = self.here.reads()
        self.get(self.names)
        self.assertLess(self.here.reads(), before + BLOCKS, "read through a cable that was just pulled out?")
        self.get_until_read()

    def test_the_owner_is_killed_and_comes_back(self):
        """Every call ends in time, with the right bytes or an error; a restarted owner, whose keys are others, is read from."""
        self.get_until_read()
        stop, wrong, errors = threading.Event(), [], []

        def load():
            while not stop.is_set():
                begin = time.monotonic()
                records, codes, _, error = self.here.client.try_get(self.spec_id, [key(name) for name in self.names],
                                                                    timeout=DEADLINE_S)
                if error is not None:
                    errors.append(error.code())
                wrong.extend(name for name, record, code in zip(self.names, records, codes)
                             if error is None and code == 0 and not (record or b"").endswith(content(name)))
                if time.monotonic() - begin > DEADLINE_S + GRACE_S:
                    wrong.append("late")
        thread = threading.Thread(target=load)
        thread.start()
        try:
            time.sleep(0.5)
            before = self.here.members()
            self.there.daemon.kill()
            time.sleep(2)
            self.there.start()
            self.wait_for_members(before)
        finally:
            stop.set()
            thread.join()
        self.assertEqual(wrong, [])
        allowed = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED}
        self.assertLessEqual(set(errors), allowed)
        self.put()
        self.get_until_read()


if __name__ == "__main__":
    guest.run()
