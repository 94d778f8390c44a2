"""A learner's code in a process of its own: `python -m peft_teach.course.child`.

Frames on standard input and output: length (8 bytes), then a kind (1 byte: Q request, R reply,
C a call from a stand-in, A its answer), then a message of codec.py. The first request is `load`.
The judge builds its sandbox around this; here is only the pipe.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
from typing import BinaryIO, Iterator

from peft_teach.course.codec import MAX_BYTES, CodecError
from peft_teach.course.subject import LIMIT_SECONDS, Channel, Host, OutOfTime, Subject, SubjectError


def write_frame(stream: BinaryIO, kind: bytes, message: bytes) -> None:
    stream.write(struct.pack("<Qc", len(message), kind) + message)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes]:
    """(kind, message); EOFError when the other side is gone."""
    head = stream.read(9)
    if len(head) < 9:
        raise EOFError("the process on the other side ended")
    length, kind = struct.unpack("<Qc", head)
    if length > MAX_BYTES:
        raise CodecError(f"a frame of {length} bytes is above the limit of {MAX_BYTES}")
    message = stream.read(length)
    if len(message) < length:
        raise EOFError("the process on the other side ended")
    return kind, message


@contextlib.contextmanager
def child_subject(source: str, name: str, key: str) -> Iterator[Subject]:
    """`name` as `source` defines it, as a Subject in a fresh child process, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_teach.course.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def transport(message: bytes) -> bytes:
        watch = threading.Timer(LIMIT_SECONDS, process.kill)
        watch.start()
        try:
            write_frame(process.stdin, b"Q", message)
            while True:
                kind, reply = read_frame(process.stdout)
                if kind == b"R":
                    return reply
                write_frame(process.stdin, b"A", channel.serve(reply))
        except (EOFError, OSError):
            process.wait()
            if watch.finished.is_set():  # it was we who ended it
                raise OutOfTime from None
            raise SubjectError("ProcessEnded", f"the process ended with status {process.returncode}") from None
        finally:
            watch.cancel()

    channel = Channel(transport)
    try:
        channel.request("load", source=source, name=name, key=key)
        yield Subject(channel)
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):  # what could not be sent any more
            process.stdin.close()
        process.stdout.close()


def main() -> None:
    # The pipe gets other numbers: what the code prints must not get into it, what it reads not out of it.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    host = Host()

    def ask(message: bytes) -> bytes:
        write_frame(replies, b"C", message)
        return read_frame(requests)[1]

    host.ask = ask
    while True:
        try:
            _, message = read_frame(requests)
        except EOFError:
            return
        write_frame(replies, b"R", host.handle(message))


if __name__ == "__main__":
    main()
