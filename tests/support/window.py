"""An shm session as any program could use it: Attach over gRPC, the window's descriptor from the fd socket, mmap. It knows
nothing but proto/balancekv.proto and proto/fd_socket.h."""
import array
import mmap
import os
import socket
import struct

from .wire import pb

MESSAGE = struct.Struct("=II16sIIQ88s")
MAGIC, TAKE, GIVE, HOLD = 0x46564B42, 1, 2, 3
ALIGN = 64


def request(op, session, index=0, magic=MAGIC, status=0):
    return MESSAGE.pack(magic, op, session, index, status, 0, b"")


class Answer:
    def __init__(self, raw, fds):
        self.magic, self.op, self.session, self.index, self.status, self.bytes, message = MESSAGE.unpack(raw)
        self.message, self.fds = message.rstrip(b"\0").decode(), fds


class Connection:
    """One connection to the fd socket of the daemon at socket_path."""

    def __init__(self, socket_path, timeout_s=5):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(socket_path + ".fd")  # waits while the backlog is full
        self.socket.settimeout(timeout_s)

    def send(self, raw, fds=()):
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([raw], control)

    def receive(self):
        """The next answer; None when the daemon has closed the connection."""
        try:
            raw, ancillary, _, _ = self.socket.recvmsg(MESSAGE.size + 1, socket.CMSG_SPACE(4 * 8))
        except ConnectionResetError:
            return None
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[:len(data) - len(data) % fds.itemsize])
        return Answer(raw, list(fds)) if raw else None

    def ask(self, op, session, index=0):
        self.send(request(op, session, index))
        return self.receive()

    def close(self):
        self.socket.close()


def attach(client, size, **fields):
    return client.unary("Attach", fields.pop("raw", None) or pb.AttachRequest(shm=pb.ShmWindow(bytes=size)), pb.AttachResponse,
                        **fields)


def detach(client, session):
    return client.unary("Detach", pb.DetachRequest(session=session), pb.DetachResponse)


class Window:
    """A session with its window mapped: Put and Get by place. Index it like the bytes it is."""

    def __init__(self, client, socket_path, size):
        self.client = client
        reply = attach(client, size)
        self.session, self.bytes, self.idle_ms = reply.session, reply.bytes, reply.idle_ms
        self.connection = Connection(socket_path)
        answer = self.connection.ask(TAKE, self.session)
        if answer is None or answer.status or len(answer.fds) != 1 or answer.bytes != self.bytes:
            raise AssertionError("the fd socket gave no window: " + (answer.message if answer else "closed"))
        self.fd = answer.fds[0]
        self.memory = mmap.mmap(self.fd, self.bytes)

    def place(self, offset=0, size=0):
        return pb.Place(session=self.session, offset=offset, bytes=size)

    def put(self, spec_id, key, data, tokens, offset=0, place=None, timeout=20, **fields):
        """Copies the payload into the window and puts it from there."""
        self.memory[offset:offset + len(data)] = data
        return self.put_there(spec_id, key, len(data), tokens, place or self.place(offset), timeout, **fields)

    def put_there(self, spec_id, key, size, tokens, place, timeout=20, **fields):
        block = pb.PutBlock(spec_id=spec_id, key=key, tokens=tokens, payload_bytes=size, place=place, **fields)
        return self.client.put_stream([pb.PutRequest(block=block)], timeout)

    def gather(self, method, request, timeout=20):
        """[(record, offset or None when it came as data)], in the order of the answer."""
        records, parts = [], b""
        for chunk in self.client.records(method, request, timeout):
            if chunk.code:
                records.append((None, None))
            elif chunk.placed:
                if chunk.data or chunk.place_offset % ALIGN or parts:
                    raise AssertionError(f"a placed record with data, or at {chunk.place_offset}")
                at = chunk.place_offset
                records.append((bytes(self.memory[at:at + chunk.record_bytes]), at))
            else:
                size = chunk.record_bytes or size
                parts += chunk.data
                if len(parts) == size:
                    records.append((parts, None))
                    parts = b""
        return records

    def get(self, spec_id, keys, offset=0, size=None, timeout=20, **fields):
        room = self.place(offset, self.bytes - offset if size is None else size)
        return self.gather("Get", pb.GetRequest(spec_id=spec_id, keys=keys, place=room, **fields), timeout)

    def fold(self, spec_id, keys, offset=0, timeout=20, **fields):
        room = self.place(offset, self.bytes - offset)
        return self.gather("Fold", pb.FoldRequest(spec_id=spec_id, keys=keys, place=room, **fields), timeout)

    def close(self):
        """Lets go of everything without a word, as a process that ends does."""
        if self.connection:
            self.connection.close()
            self.memory.close()
            os.close(self.fd)
            self.connection = None
