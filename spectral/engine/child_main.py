"""A process that does a stranger's work within limits: run as a file by `child_process.py`, it imports one job's file.

Chat templates and grammars come with models and requests. Here no loop, power, repetition or product of patterns takes
more memory or time than the operating system gives it, and the process that waits can end it. It has no secrets.

A job is a file beside this one with `MEMORY_BYTES`, the address space beyond what the process has when it begins, and
`prepare(read)`, which imports what it needs, reads what it has to know, and returns what answers a message.

Messages on standard input and output: JSON behind a 4-byte big-endian length; an empty one says that it has begun.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

LENGTH = struct.Struct(">I")
CPU_SECONDS = 10
"""Processor time for one message, should nobody be there any more to end it sooner."""
OPEN_FILES = 8


def serve(job: Any, source: BinaryIO, target: BinaryIO) -> None:
    """Say that it has begun, then answer until the other side closes its end."""
    answer = job.prepare(lambda: json.loads(_read(source) or sys.exit()))
    _limit(job.MEMORY_BYTES)
    target.write(LENGTH.pack(0))
    target.flush()
    while body := _read(source):
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds if hard < 0 else min(seconds, hard), hard))
        data = json.dumps(answer(json.loads(body)), ensure_ascii=True).encode("ascii")
        target.write(LENGTH.pack(len(data)) + data)
        target.flush()


def _read(source: BinaryIO) -> bytes:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _limit(memory: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    wanted = {resource.RLIMIT_AS: size + memory, resource.RLIMIT_NOFILE: OPEN_FILES}
    for limit, most in {**wanted, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}.items():
        hard = resource.getrlimit(limit)[1]  # one that is lower already stays
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def _load(name: str) -> Any:
    # By its place: the folder's other files must not stand in for the standard library's (types.py is one of them).
    spec = importlib.util.spec_from_file_location("job", Path(__file__).with_name(name))
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job


if __name__ == "__main__":
    sys.path.extend(sys.argv[2:])  # where its libraries lie, should that not be among an isolated interpreter's own
    serve(_load(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
