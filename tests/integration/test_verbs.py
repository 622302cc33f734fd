"""RDMA where there is none, as on most machines; where there is, tests/rdma/ tests it."""
import os
import unittest

from harness import Code, CommandLineCase, Daemon, pb, run


# As a client's of another host would be.
OFFER = pb.AttachRequest(verbs=pb.VerbsWindow(queue_pair=17, packet=1, mtu=1024, reads=16, key=1, address=1 << 20, bytes=1 << 20,
                                              gid=bytes(10) + b"\xff\xff" + bytes((10, 77, 0, 2))))


def spoken(daemon):
    """Log lines about RDMA at info and above."""
    return [line for line in daemon.log_lines() if "verbs" in str(line) or "RDMA" in str(line)]


class Named(unittest.TestCase):
    def test_device_that_is_not_there(self):
        """Asked for by name: the daemon does not start, and says why."""
        daemon = Daemon(verbs="rxe9")
        self.addCleanup(daemon.close)
        daemon.spawn()
        self.assertNotEqual(daemon.process.wait(30), 0)
        self.assertIn("verbs", daemon.log_text())
        self.assertIn("no RDMA device is to be had", daemon.log_text())
        daemon.process = None


@unittest.skipIf(os.path.isdir("/sys/class/infiniband") and os.listdir("/sys/class/infiniband"), "there is an RDMA device here")
class Auto(CommandLineCase):
    reason = "no RDMA device"

    def test_starts_without_ado(self):
        self.assertLessEqual(len(spoken(self.daemon)), 1)
        self.assertEqual([line for line in spoken(self.daemon) if line.get("level") in ("warn", "error")], [])

    def test_is_not_offered(self):
        self.assertNotIn("verbs", self.client.open(model="m", layers=1, kv_heads=1, key_dim=64, dtype=pb.DTYPE_BF16).transports)

    def test_attach_says_why(self):
        self.assert_error(Code.UNIMPLEMENTED, self.reason, self.client.unary, "Attach", OFFER, pb.AttachResponse)


    def test_client_that_insists_is_told_why(self):
        put = ("put", self.trace, "--model", "m", "--keys", self.path("keys.json"), "--transport")
        error = self.bkv(*put, "verbs", code=1)["error"]
        self.assertEqual(error["status"], "UNIMPLEMENTED")
        self.assertIn("verbs", error["message"])
        self.bkv(*put, "auto")


class Off(Auto):
    options, reason = {"verbs": "off"}, "turned off"


if __name__ == "__main__":
    run()
