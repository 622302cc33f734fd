"""A real balancekvd in a folder of its own: started as systemd would (readiness by NOTIFY_SOCKET), stopped by signals."""
import array
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

from . import built

START_S = 30
SANITIZER = re.compile(r"AddressSanitizer|LeakSanitizer|ThreadSanitizer|runtime error:|Assertion .* failed")


def memory_folder():
    """A tmpfs for arenas, as in production; None (the usual place) where it is too small, as it often is in containers."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return None
    return "/dev/shm" if room.f_bavail * room.f_frsize > 4 << 30 else None


class Notify:
    """The other end of NOTIFY_SOCKET: messages and the descriptors that came with FDSTORE=1, as systemd would keep them."""

    def __init__(self, path):
        self.path, self.messages, self.stored = path, [], {}
        self.changed = threading.Condition()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self):
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(16 * 4))
            except OSError:
                return
            if data == b"close":
                return
            fds = array.array("i")
            for level, kind, raw in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(raw[:len(raw) - len(raw) % fds.itemsize])
            lines = data.decode().split("\n")
            with self.changed:
                self._keep(lines, list(fds))
                self.messages += lines
                self.changed.notify_all()

    def _keep(self, lines, fds):
        name = next((line[len("FDNAME="):] for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTORE=1" in lines and fds:
            for old in self.stored.get(name, []):
                os.close(old)
            self.stored[name] = fds
        else:
            for fd in fds:
                os.close(fd)

    def wait(self, line, timeout_s):
        with self.changed:
            return self.changed.wait_for(lambda: line in self.messages, timeout_s)

    def close(self):
        wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            wake.sendto(b"close", self.path)
        except OSError:
            pass
        wake.close()
        self.thread.join(5)
        self.socket.close()
        os.unlink(self.path)


class Daemon:
    """One daemon process after another in one folder: start(), stop(), start() again.

    Options are the daemon's own, by name: Daemon(arena="64M", op_timeout="2s"). parent: where its folder is made. prefix: words
    before its command, such as those that enter a network namespace. The log is JSON, one line per event."""

    def __init__(self, config=None, environment=None, parent=None, prefix=(), **options):
        self.folder = tempfile.mkdtemp(prefix="bkv-", dir=parent or memory_folder())
        self.prefix = list(prefix)
        self.socket = os.path.join(self.folder, "d.sock")
        self.target = "unix:" + self.socket
        self.options = {"socket": self.socket, "tcp": "127.0.0.1:0", "arena": "256M", "staging": "128M", "threads": "2",
                        "log_target": "json"}
        self.options.update(options)
        self.config, self.environment = config, environment or {}
        self.process, self.notify, self.log_path, self.log_start, self.starts = None, None, None, 0, 0
        self.pass_fds = []

    def command(self, **extra):
        merged = {**self.options, **extra}
        names = {"log_target": "target", "log_level": "level"}
        words = self.prefix + [built("bin", "balancekvd")]
        if self.config is not None:
            words += ["--config", self.config]
        for name, value in merged.items():
            if value is not None:
                words.append("--" + names.get(name, name).replace("_", "-") + "=" + str(value))
        return words

    def spawn(self, **extra):
        """Starts it and does not wait for readiness."""
        self.starts += 1
        self.log_path = os.path.join(self.folder, f"log.{self.starts}")
        self.notify = self.notify or Notify(os.path.join(self.folder, "notify"))
        self.notify.messages.clear()
        env = {**os.environ, "NOTIFY_SOCKET": self.notify.path, **self.environment}
        for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "JOURNAL_STREAM"):
            env.pop(name, None)
        command = self.command(**extra)
        if self.pass_fds:
            command, env = self._with_fds(command, env)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                            pass_fds=[fd for _, fd in self.pass_fds])
        return self

    def _with_fds(self, command, env):
        """Descriptors move to 3, 4, ... and LISTEN_PID is the process's own: a shell does both, then execs the daemon."""
        moves = [f"exec {fd}<&{old} {old}<&-" if fd != old else ":" for fd, (_, old) in enumerate(self.pass_fds, 3)]
        env = {**env, "LISTEN_FDS": str(len(self.pass_fds)), "LISTEN_FDNAMES": ":".join(name for name, _ in self.pass_fds)}
        script = "; ".join(moves) + '; export LISTEN_PID=$$; exec "$@"'
        return ["/bin/bash", "-c", script, "bash"] + command, env

    def start(self, **extra):
        self.spawn(**extra)
        deadline = time.monotonic() + START_S
        while not self.notify.wait("READY=1", 0.1):
            if self.process.poll() is not None:
                raise AssertionError(f"the daemon ended with {self.process.returncode} at start:\n{self.log_text()}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"the daemon was not ready after {START_S} s:\n{self.log_text()}")
        return self

    def signal(self, number):
        self.process.send_signal(number)

    def freeze(self, timeout_s=10):
        """SIGSTOP; returns when every thread stands still, which takes a moment."""
        self.signal(signal.SIGSTOP)
        deadline = time.monotonic() + timeout_s
        while self._thread_states() != {"T"}:
            if time.monotonic() > deadline:
                raise AssertionError(f"not all threads stand still after {timeout_s} s")
            time.sleep(0.005)

    def thaw(self):
        self.signal(signal.SIGCONT)

    def _thread_states(self):
        states, folder = set(), f"/proc/{self.process.pid}/task"
        for thread in os.listdir(folder):
            try:
                with open(f"{folder}/{thread}/stat", encoding="ascii") as file:
                    states.add(file.read().rsplit(")", 1)[1].split()[0])
            except OSError:
                pass  # it has ended meanwhile
        return states

    def wait(self, timeout_s=30):
        """The exit status; AssertionError when it does not end or a sanitizer spoke."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not end within {timeout_s} s:\n{self.log_text()[-4000:]}") from None
        found = SANITIZER.search(self.log_text())
        if found:
            raise AssertionError(f"{found.group(0)} in the daemon's log:\n{self.log_text()[-8000:]}")
        return status

    def stop(self, timeout_s=30):
        """SIGTERM; the exit status must be 0."""
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGTERM)
        status = self.wait(timeout_s)
        if status != 0:
            raise AssertionError(f"the daemon ended with {status}:\n{self.log_text()[-4000:]}")

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def close(self):
        """Stops it if it runs and removes the folder, whatever happened before."""
        try:
            self.stop()
        finally:
            self.kill()
            if self.notify:
                for fds in self.notify.stored.values():
                    for fd in fds:
                        os.close(fd)
                self.notify.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self if self.process else self.start()

    def __exit__(self, *_):
        self.close()

    def log_text(self):
        with open(self.log_path, encoding="utf8", errors="replace") as file:
            return file.read()

    def log_lines(self):
        """The log's lines as dicts; a line that is not JSON becomes {"raw": line}."""
        lines = []
        for line in self.log_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({"raw": line})
        return lines

    def port(self):
        """The TCP port, from the log."""
        found = re.search(r"127\.0\.0\.1:(\d{2,5})", self.log_text())
        if not found:
            raise AssertionError(f"no TCP address in the log:\n{self.log_text()}")
        return int(found.group(1))

    def rss(self):
        """Resident bytes."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))
