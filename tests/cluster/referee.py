"""What the workers saw, judged: every answer is right, a miss or a typed error, and comes within its deadline; a miss of what two
daemons have acknowledged is none, once the lease of a dead one has expired.

Faults say when what is excused (Excuse). A miss is excused until the lease of a daemon that died has run out. An error is
excused while the daemon that was asked is itself stopped, cut off or behind a bad cable. Lookup has no errors: it calls absent
what it could not ask for, which is excused then and while a daemon is on its way out or in. Wrong bytes and answers past the
deadline never are excused; but for the latter a daemon that is asked must run: a stock gRPC client cannot take back a message that
it has begun to write to one that is stopped.
"""
import collections
import contextlib
import datetime
import socket
import tempfile
import threading
import time

import grpc
from pool import wire

ALLOWANCE_S = 0.5  # of an answer past its deadline, besides the time in which this program itself did not get to run
SPACE_S = 0.3      # around an excuse: an answer may be under way when a fault ends


class Excuse:
    """Of misses (nodes None), or of errors and absences at these nodes, for as long as it is open. absences: of nothing else."""

    def __init__(self, nodes=None, absences=False):
        self.nodes, self.absences, self.start, self.end = nodes, absences, time.monotonic(), None

    def close(self, after_s=0.0):
        self.end = time.monotonic() + after_s

    def covers(self, begin, end):
        return self.start - SPACE_S <= end and (self.end is None or begin <= self.end + SPACE_S)


class Metronome(threading.Thread):
    """Notices when this program does not get to run, or its gRPC comes late: it shares two cores with a whole cluster, and maybe
    with others. Each beat is a call, with a deadline, of a server that never says a word."""

    BEAT_S = 0.05

    def __init__(self):
        super().__init__(daemon=True)
        self.beats, self.last, self.ending = collections.deque(maxlen=20000), time.monotonic(), threading.Event()
        self.folder = tempfile.TemporaryDirectory(prefix="bkv-silent-")
        self.silent = socket.socket(socket.AF_UNIX)
        self.silent.bind(self.folder.name + "/s")
        self.silent.listen(4)
        self.client = wire.Client(f"unix:{self.folder.name}/s")

    def run(self):
        while not self.ending.is_set():
            with contextlib.suppress(grpc.RpcError):
                self.client.health(timeout=self.BEAT_S)
            now = time.monotonic()
            if now - self.last < self.BEAT_S / 2:  # the channel has given up for a while
                time.sleep(self.BEAT_S / 2)
            if now - self.last > 2 * self.BEAT_S:
                self.beats.append((self.last, now))
            self.last = now

    def lost_s(self, begin, end):
        """Of the time between: how much was lost to everybody in this program."""
        gaps = list(self.beats) + [(self.last, time.monotonic())]
        return sum(max(0.0, min(end, to) - max(begin, since) - self.BEAT_S) for since, to in gaps)

    def longest_s(self):
        return max((to - since for since, to in list(self.beats)), default=0.0)


class Referee:
    def __init__(self, began=None):
        """began: from when on its notes count seconds."""
        self.lock, self.excuses, self.began = threading.Lock(), [], began or time.monotonic()
        self.counts = collections.Counter()   # of operations, by name
        self.errors = collections.Counter()   # of their ends, by (name, code)
        self.totals = collections.Counter()   # hits, misses, excused, retries, short, ...
        self.times = collections.defaultdict(list)
        self.metronome = Metronome()
        self.metronome.start()
        self.wrong, self.late, self.misses, self.failures, self.odd = [], [], [], [], []

    def excuse(self, *nodes, absences=False):
        found = Excuse(set(nodes) if nodes else None, absences)
        with self.lock:
            self.excuses.append(found)
        return found

    def excused(self, begin, end, nodes=None, absence=False):
        """nodes: those that were asked; None: of a miss."""
        with self.lock:
            return any(e.covers(begin, end) for e in self.excuses if (absence or not e.absences) and
                       (e.nodes is None) == (nodes is None) and (nodes is None or e.nodes & set(nodes)))

    # ---- what the workers say ----

    def ended(self, operation, begin, deadline_s, nodes, code=None, text=""):
        """An operation is over, after so many attempts at these nodes; code: of its error."""
        now = time.monotonic()
        with self.lock:
            self.counts[operation] += 1
            self.totals["retries"] += len(nodes) - 1
            self.times[operation].append(now - begin)
            if code is not None:
                self.errors[operation, code.name] += 1
        if now - begin <= deadline_s + ALLOWANCE_S or now - begin - self.metronome.lost_s(begin, now) <= deadline_s + ALLOWANCE_S:
            return
        if self.excused(begin, now, nodes[-1:]):
            self.add("late excused", 1)
        else:
            self.say(self.late, f"{operation} through {nodes}: {now - begin:.3f} s of {deadline_s} s")

    def failed(self, operation, begin, nodes, code, text):
        """It should have succeeded: what it asks for is there, and there was time enough."""
        now = time.monotonic()
        if self.excused(begin, now, nodes) or self.metronome.lost_s(begin, now) > ALLOWANCE_S:
            self.add("failures excused", 1)
        else:
            self.say(self.failures, f"{operation} through {nodes}: {code.name} {text}")

    def hit(self, count=1):
        self.add("hits", count)

    def missed(self, operation, begin, block, node, maybe=False):
        """A block that two daemons have acknowledged was said not to be there. maybe: by an answer that cannot say more."""
        now = time.monotonic()
        if block.dropped:
            return
        if self.excused(begin, now):
            self.add("misses excused", 1)
        elif maybe and self.excused(begin, now, [node], absence=True):
            self.add("absences excused", 1)
        else:
            self.say(self.misses, f"{operation} through {node}: {block.kind.name} {block.number}, put "
                                  f"{begin - block.acknowledged:.1f} s before with {block.replicas} replicas")

    def add(self, name, count):
        with self.lock:
            self.totals[name] += count

    def say(self, where, text):
        with self.lock:
            clock = datetime.datetime.utcnow().strftime("%H:%M:%S.%f")[:-3]  # as in the daemons' logs
            where.append(f"{time.monotonic() - self.began:.1f} ({clock}) {text}")

    # ---- results ----

    def hit_rate(self):
        judged = self.totals["hits"] + len(self.misses)
        return self.totals["hits"] / judged if judged else 0.0

    def bad(self):
        return self.wrong + self.late + self.misses + self.failures + self.odd

    def percentile(self, operation, share):
        times = sorted(self.times[operation])
        return times[min(len(times) - 1, int(share * len(times)))] if times else None
