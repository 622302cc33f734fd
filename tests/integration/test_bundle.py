"""The relocatable bundle: it runs from any folder of a host that has glibc and nothing else, with an empty environment.

That host is a folder with glibc's own libraries, entered by chroot (as root) or in a user namespace (as anybody).
"""
import glob
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import unittest

from harness import ROOT, built, run

VERSION = "9.8.7"  # the name follows it; what is built does not
GLIBC = ("ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libresolv.so.2")


def entering(root):
    """How to run a command with `root` as its root folder; skips aloud where that is not allowed."""
    for program, *words in (["chroot", root], ["unshare", "--user", "--map-root-user", "--root", root]):
        way = [shutil.which(program) or program, *words]
        probe = way + ["/lib64/" + GLIBC[0], "--version"]
        if os.path.isabs(way[0]) and subprocess.run(probe, capture_output=True).returncode == 0:
            return way
    raise unittest.SkipTest("neither chroot nor user namespaces may be used here")


class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if shutil.which("patchelf") is None:
            raise unittest.SkipTest("patchelf is missing: run make setup")
        if os.environ.get("SANITIZER"):
            raise unittest.SkipTest("sanitizer builds are not bundled")
        folder = tempfile.mkdtemp(prefix="bkv-bundle-")
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.root, cls.tarball = os.path.join(folder, "root"), os.path.join(folder, "bundle.tar.gz")
        cls.top = f"/opt/balancekv-{VERSION}-x86_64"
        cls.bundle(cls.tarball)
        cls.make_host()
        cls.enter = entering(cls.root)

    @staticmethod
    def bundle(output):
        build = os.path.dirname(os.path.dirname(built("bin", "balancekvd")))
        subprocess.run([os.path.join(ROOT, "deploy", "bundle.sh"), build, VERSION, output], check=True,
                       stdout=subprocess.DEVNULL)

    @classmethod
    def make_host(cls):
        """glibc, the bundle somewhere, a trace to put."""
        for name in ("lib", "lib64", "tmp", "opt"):
            os.makedirs(os.path.join(cls.root, name))
        for name in GLIBC:
            found = glob.glob("/lib/*-linux-gnu/" + name) or glob.glob("/lib64/" + name)
            shutil.copy(found[0], os.path.join(cls.root, "lib64" if name == GLIBC[0] else "lib"))
        with tarfile.open(cls.tarball) as tar:
            tar.extractall(os.path.join(cls.root, "opt"))
        shutil.copy(os.path.join(ROOT, "tests", "data", "trace.safetensors"), os.path.join(cls.root, "tmp"))
        # All of /proc that a program needs to be found by its loader: where it lies, that is which folder. Nothing is mounted.
        os.makedirs(os.path.join(cls.root, "proc", "self"))
        os.symlink(cls.top + "/bin/program", os.path.join(cls.root, "proc", "self", "exe"))

    def bkv(self, *words):
        done = subprocess.run(self.enter + [self.top + "/bin/bkv", "--endpoint", "unix:/tmp/d.sock", "--json", *words],
                              env={}, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def start_daemon(self):
        words = [self.top + "/bin/balancekvd", "--socket=/tmp/d.sock", "--tcp=", "--arena=64M"]
        daemon = subprocess.Popen(self.enter + words, env={}, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.addCleanup(daemon.stderr.close)
        self.addCleanup(daemon.wait, 30)
        self.addCleanup(daemon.terminate)
        deadline = time.monotonic() + 20
        while not os.path.exists(os.path.join(self.root, "tmp", "d.sock")):
            if daemon.poll() is not None or time.monotonic() > deadline:
                daemon.kill()
                self.fail("the daemon does not start:\n" + daemon.stderr.read().decode())
            time.sleep(0.02)
        return daemon

    def test_daemon_and_command_line(self):
        daemon = self.start_daemon()
        self.bkv("ping")
        put = self.bkv("put", "/tmp/trace.safetensors", "--model", "demo", "--rate", "16", "--keys", "/tmp/keys.json")
        self.bkv("get", "--keys", "/tmp/keys.json", "--out", "/tmp/summary.safetensors")
        self.assertGreater(os.path.getsize(os.path.join(self.root, "tmp", "summary.safetensors")), 100000, put)
        daemon.terminate()
        self.assertEqual(daemon.wait(30), 0, daemon.stderr.read().decode())

    def test_it_brings_no_part_of_glibc(self):
        with tarfile.open(self.tarball) as tar:
            names = [os.path.basename(name) for name in tar.getnames() if "/lib/" in name]
        self.assertIn("libbalancekv.so.0", names)
        self.assertFalse([name for name in names if name in GLIBC or name.startswith(("libcuda.", "libnvidia-"))])
        self.assertLess(os.path.getsize(self.tarball), 50 << 20)

    def test_it_is_the_same_each_time(self):
        again = self.tarball + ".again"
        self.bundle(again)
        with open(self.tarball, "rb") as one, open(again, "rb") as other:
            self.assertTrue(one.read() == other.read(), "the same inputs made other bytes")


if __name__ == "__main__":
    run()
