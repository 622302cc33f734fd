"""A real etcd of a test's own, on free ports and in a folder that goes with it; to be killed, stopped, wiped, started again."""
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

START_S = 30
SERVING = "ready to serve client requests"


def free_port(host="127.0.0.1"):
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class Etcd:
    """One etcd process after another in one folder: start(), kill(), start() again.

    host: where it listens. port, peer_port: free ones of this host unless given. prefix: words before each command, such as those
    that enter a network namespace. certificates: a folder with ca.pem, server.pem and server.key; clients must then show a
    certificate of that CA. quota: bytes of its database, which is how to have its disk full.
    parent: where its folder is made."""

    def __init__(self, host="127.0.0.1", port=None, peer_port=None, prefix=(), certificates=None, quota=None,
                 parent=None):
        self.host, self.prefix, self.certificates, self.quota = host, list(prefix), certificates, quota
        self.port, self.peer_port = port or free_port(), peer_port or free_port()
        self.endpoint = f"{host}:{self.port}"
        self.folder = tempfile.mkdtemp(prefix="bkv-etcd-", dir=parent)
        self.log_path = os.path.join(self.folder, "log")
        self.process = None

    def command(self):
        client = f"{'https' if self.certificates else 'http'}://{self.endpoint}"
        peer = f"http://{self.host}:{self.peer_port}"
        # Short elections, so that a single etcd is there at once and leases of one second are possible.
        words = ["etcd", "--name", "test", "--data-dir", os.path.join(self.folder, "data"), "--listen-client-urls", client,
                 "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                 "--initial-cluster", f"test={peer}", "--heartbeat-interval=20", "--election-timeout=200"]
        if self.quota:
            words.append(f"--quota-backend-bytes={self.quota}")
        if self.certificates:
            words += [f"--trusted-ca-file={self.certificates}/ca.pem", f"--cert-file={self.certificates}/server.pem",
                      f"--key-file={self.certificates}/server.key", "--client-cert-auth"]
        return self.prefix + words

    def spawn(self):
        """Starts it and does not wait until it serves."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def start(self):
        begin = os.path.getsize(self.log_path) if os.path.exists(self.log_path) else 0
        self.spawn()
        deadline = time.monotonic() + START_S
        while SERVING not in self.log_text(begin):
            if self.process.poll() is not None:
                raise AssertionError(f"etcd ended with {self.process.returncode} at start:\n{self.log_text(begin)}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"etcd did not serve after {START_S} s:\n{self.log_text(begin)}")
            time.sleep(0.02)
        return self

    def kill(self):
        """kill -9, as a power cut."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self):
        """SIGSTOP: its sockets stay open, and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def wipe(self):
        """While it is not running: its data are gone."""
        if self.process is not None:
            raise AssertionError("wiped while it runs")
        shutil.rmtree(os.path.join(self.folder, "data"), ignore_errors=True)

    def control(self, *words, timeout_s=20):
        """etcdctl's output; tried again until it succeeds, as etcd may just be starting."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.control_once(*words, timeout_s=timeout_s)
            except subprocess.SubprocessError as error:
                if time.monotonic() > deadline:
                    said = getattr(error, "stderr", None)
                    raise AssertionError(f"etcdctl {' '.join(map(str, words))}: {said}\n{self.log_text()[-2000:]}") from None
            time.sleep(0.1)

    def control_once(self, *words, timeout_s=20, stdin=subprocess.DEVNULL):
        """etcdctl's output; subprocess.SubprocessError when it fails."""
        command = self.prefix + ["etcdctl", "--endpoints", self.endpoint, *map(str, words)]
        if self.certificates:
            command += [f"--cacert={self.certificates}/ca.pem", f"--cert={self.certificates}/server.pem",
                        f"--key={self.certificates}/server.key"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s, stdin=stdin,
                              env={**os.environ, "ETCDCTL_API": "3"}).stdout

    def log_text(self, begin=0):
        if not os.path.exists(self.log_path):
            return ""
        with open(self.log_path, "rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace")

    def close(self):
        """Kills it if it runs and removes the folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self if self.process else self.start()

    def __exit__(self, *_):
        self.close()
