"""Who may do what in a pool with TLS everywhere: daemons, tenants, a daemon without the cluster's name, strangers; etcd with
certificates, a user and a password."""
import os
import tempfile
import unittest

import grpc
import network
from ledger import KINDS, Block
from pool import Pool, eventually

from support import certificates, runner, wire
from support.wire import pb, peer_pb

Code = grpc.StatusCode
PEER_NAME = "balancekvd"
PASSWORD = "correct horse"
RED, GREEN = KINDS[0], KINDS[1]


def secure(authority, own, etcd=True, password="password"):
    """A daemon's options: its own certificate, and the authority's word for others."""
    options = {"tls_cert": authority.path(own + ".pem"), "tls_key": authority.path(own + ".key"),
               "tls_client_ca": authority.path("ca.pem"), "insecure": "no", "peer_name": PEER_NAME}
    if etcd:
        options.update(etcd_ca=authority.path("ca.pem"), etcd_cert=authority.path(own + ".pem"),
                       etcd_key=authority.path(own + ".key"), etcd_user="keeper", etcd_password_file=authority.path(password))
    return options


def protect(etcd):
    """Users and passwords: root by its certificate's name, and one who may do no more than daemons need."""
    etcd.control("user", "add", "root", "--no-password")
    etcd.control("user", "grant-role", "root", "root")
    etcd.control("user", "add", f"keeper:{PASSWORD}")
    etcd.control("role", "add", "members")
    etcd.control("role", "grant-permission", "members", "--prefix=true", "readwrite", "/balancekv/")
    etcd.control("user", "grant-role", "keeper", "members")
    etcd.control("auth", "enable")


class Security(unittest.TestCase):
    """One pool for all tests: n1, n2 and n3 are as they should be; odd is not, and starts where a test wants it."""

    @classmethod
    def setUpClass(cls):
        why = network.why_not()
        if why:
            raise unittest.SkipTest(why)
        network.move_in()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.authority = authority = certificates.Authority(folder.name)
        certificates.Authority(folder.name, "strangers").sign("stranger", f"DNS:{PEER_NAME}")
        authority.sign("server", "DNS:etcd", *(f"IP:{network.PREFIX}{n}" for n in range(1, 8)), common="root")
        authority.sign("daemon", f"DNS:{PEER_NAME}")
        authority.sign("worker", "DNS:worker.example")
        for name, text in (("password", PASSWORD), ("wrong-password", "incorrect horse")):
            with open(authority.path(name), "w", encoding="ascii") as file:
                file.write(text + "\n")
        cls.pool = Pool(3, etcd_options={"certificates": authority.folder}, **secure(authority, "daemon"))
        cls.addClassCleanup(cls.pool.close)
        protect(cls.pool.etcd)
        cls.pool.start()

    def tcp(self, node, own, authority="ca"):
        """A client from another host, with this certificate."""
        read = self.authority.read
        credentials = grpc.ssl_channel_credentials(read(authority + ".pem"), own and read(own + ".key"),
                                                   own and read(own + ".pem"))
        client = wire.Client(f"{node.host.address}:7420", credentials, [("grpc.ssl_target_name_override", PEER_NAME)])
        self.addCleanup(client.close)
        return client

    def refused(self, code, call, *args, **kwargs):
        with self.assertRaises(grpc.RpcError) as caught:
            call(*args, **kwargs)
        self.assertEqual(caught.exception.code(), code, caught.exception.details())
        return caught.exception.details()

    @staticmethod
    def put(client, block):
        block.spec_id = client.open(**block.kind.spec).spec_id
        return client.put(block.spec_id, block.key, block.payload(), block.kind.tokens).results[0]

    def get(self, client, block):
        """Its record, by a client that has to open its spec first; checked by whoever wants to."""
        return client.get(client.open(**block.kind.spec).spec_id, [block.key])[0]

    @staticmethod
    def have(client, block):
        return client.unary(wire.PEER + "Have", peer_pb.HaveRequest(names=block.spec_id + block.key), peer_pb.HaveResponse, 5)

    @staticmethod
    def peer_fetch(client, block):
        call = client.channel.unary_stream(wire.PEER + "Fetch", peer_pb.FetchRequest.SerializeToString,
                                           pb.RecordChunk.FromString)
        return list(call(peer_pb.FetchRequest(names=block.spec_id + block.key), timeout=5))

    def test_daemons_with_the_clusters_certificate_are_one_pool(self):
        block = Block(RED, 1, 1)
        result = self.put(self.pool.nodes["n1"].client, block)
        self.assertEqual(result.replicas, 2)
        for node in self.pool.nodes.values():
            if node.running():
                self.assertTrue(self.get(node.client, block).endswith(block.payload()), node.name)
        # Both owners, and n1 may have kept a copy.
        holders = [node for node in self.pool.up() if self.have(self.tcp(node, "daemon"), block).bytes[0] > 0]
        self.assertGreaterEqual(len(holders), 2)

    def test_a_tenants_certificate_is_for_its_blocks_alone(self):
        node, block = self.pool.nodes["n2"], Block(RED, 2, 1)
        worker = self.tcp(node, "worker")
        self.put(worker, block)
        self.assertTrue(self.get(worker, block).endswith(block.payload()))
        self.assertIn(PEER_NAME, self.refused(Code.PERMISSION_DENIED, self.have, worker, block))
        self.refused(Code.PERMISSION_DENIED, self.peer_fetch, worker, block)
        self.refused(Code.PERMISSION_DENIED, worker.unary, wire.PEER + "Drain", peer_pb.PeerDrainRequest(),
                     peer_pb.PeerDrainResponse)
        self.refused(Code.PERMISSION_DENIED, worker.unary, "Drain", pb.DrainRequest(member="n1"), pb.DrainResponse)
        self.assertFalse(any(member.draining for member in node.report().members))

    def test_operators_come_by_the_unix_socket_or_with_the_clusters_certificate(self):
        node = self.pool.nodes["n3"]
        for client in (node.client, self.tcp(node, "daemon")):
            reply = client.unary("Drain", pb.DrainRequest(member="n1", ask=True), pb.DrainResponse)
            self.assertFalse(reply.draining)

    def test_peers_do_not_come_by_the_unix_socket(self):
        block = Block(RED, 3, 1)
        client = self.pool.nodes["n1"].client
        self.put(client, block)
        self.refused(Code.PERMISSION_DENIED, self.have, client, block)

    def test_strangers_are_not_heard(self):
        node = self.pool.nodes["n1"]
        for what, own, authority in (("another authority's", "stranger", "ca"), ("none", None, "ca"),
                                     ("a daemon that the client does not know", "daemon", "strangers")):
            with self.subTest(what):
                self.refused(Code.UNAVAILABLE, self.tcp(node, own, authority).health, timeout=3)
        with self.subTest("plain text"):
            plain = wire.Client(f"{node.host.address}:7420")
            self.addCleanup(plain.close)
            self.refused(Code.UNAVAILABLE, plain.health, timeout=3)

    def test_tenants_never_meet(self):
        red, green = Block(RED, 4, 1), Block(GREEN, 4, 1)
        self.assertEqual(red.key, green.key)
        self.put(self.pool.nodes["n1"].client, red)
        for node in self.pool.nodes.values():
            if node.running():
                self.refused(Code.NOT_FOUND, self.get, node.client, green)
        self.put(self.pool.nodes["n2"].client, green)
        for block in (red, green):
            self.assertTrue(self.get(self.pool.nodes["n3"].client, block).endswith(block.payload()))

    def odd(self, **options):
        """One more daemon, for this test only."""
        node = self.pool.add(f"odd{len(self.pool.network.hosts)}", **options)
        self.addCleanup(self.forget, node)
        node.start()
        return node

    def forget(self, node):
        node.kill()
        node.close()
        del self.pool.nodes[node.name]
        eventually(lambda: self.pool.unsettled(moved=False) == "", lambda: self.pool.unsettled(moved=False), 20)

    def test_a_daemon_without_the_clusters_name_gets_nothing(self):
        """Whoever may write to etcd can make itself a member; the others' records are not for it all the same."""
        blocks = [Block(RED, number, 1) for number in range(10, 30)]
        for block in blocks:
            self.assertEqual(self.put(self.pool.nodes["n1"].client, block).replicas, 2)
        odd = self.odd(**secure(self.authority, "worker"))
        eventually(lambda: len(self.pool.nodes["n1"].report().members) == 4, "it has joined", 10)
        spec_id = odd.client.open(**RED.spec).spec_id
        records, codes, _, _ = odd.client.try_get(spec_id, [block.key for block in blocks], timeout=10)
        self.assertEqual([record for record in records if record], [])
        self.assertTrue(all(codes), codes)
        mine = Block(RED, 31, 1)
        self.put(odd.client, mine)
        for node in self.pool.nodes.values():
            if node is not odd:
                with self.subTest(node.name):
                    self.assertEqual(self.have(self.tcp(node, "daemon"), mine).bytes[0], 0)
        for block in blocks:  # and the others find all of theirs
            self.assertTrue(self.get(self.pool.nodes["n2"].client, block).endswith(block.payload()))

    def test_a_wrong_password_is_said(self):
        odd = self.odd(**secure(self.authority, "daemon", password="wrong-password"))
        trouble = eventually(lambda: odd.report().trouble, "what is wrong", 10)
        self.assertRegex(trouble, "authentication|password|log in")
        self.assertEqual(odd.report().state, "joining")
        block = Block(RED, 40, 1)
        self.put(odd.client, block)  # it serves its own host
        self.assertTrue(self.get(odd.client, block).endswith(block.payload()))
        self.assertNotIn(PASSWORD, odd.log_text())

    def test_etcd_without_a_certificate(self):
        options = secure(self.authority, "daemon")
        odd = self.odd(**{**options, "etcd_cert": "", "etcd_key": ""})
        eventually(lambda: odd.report().trouble, "what is wrong", 10)
        self.assertNotIn(odd.name, [member.id for member in self.pool.nodes["n1"].report().members])
        self.assertTrue(os.path.exists(odd.socket))


if __name__ == "__main__":
    runner.run()
