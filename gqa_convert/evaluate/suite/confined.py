"""Run code that a model wrote, confined, in a process of its own. Run by path: nothing here imports the package.

Reads `{"code", "tests", "word"}` as JSON from standard input and prints the word if the tests pass. Before the code
runs, the process gives up, for good (seccomp): sockets, other processes, signals, and every way to write, make, rename
or remove a file; and is limited in time, memory and what it prints. It can still read what its user can read, and has
nowhere to take it. Linux on x86-64 or arm64.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys

SECONDS, MEMORY, PRINTED = 5, 1 << 30, 1 << 20
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COMMON = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 435, 437, 438, 442, 449, 452)  # from 424 on: alike
_DENIED = {
    "x86_64": (
        *(41, 42, 43, 44, 46, 49, 50, 53, 56, 57, 58, 59, 62, 76, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 101),
        *(129, 132, 133, 155, 160, 161, 165, 166, 188, 189, 190, 197, 198, 199, 200, 206, 234, 235, 258, 259, 260, 261),
        *(263, 264, 265, 266, 268, 272, 280, 288, 297, 298, 302, 304, 307, 308, 310, 311, 316, 321, 322, *_COMMON),
    ),
    "aarch64": (
        *(
            0,
            5,
            6,
            7,
            14,
            15,
            16,
            33,
            34,
            35,
            36,
            37,
            38,
            39,
            40,
            41,
            45,
            51,
            52,
            53,
            54,
            55,
            88,
            97,
            117,
            129,
            130,
            131,
        ),
        *(138, 164, 198, 199, 200, 201, 202, 203, 206, 211, 220, 221, 240, 242, 261, 265, 268, 269, 270, 271, 276, 280),
        *(281, *_COMMON),
    ),
}
"""Numbers of system calls: sockets, clone, fork, exec, signals, ptrace, what changes files, mounts, limits."""
_OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # open and openat: their number, where their flags stand
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ERRNO with EPERM
_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def confine() -> None:
    """Give up what the module's text says.

    Raises:
        OSError: if the system cannot.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        raise OSError("needs Linux on x86-64 or arm64")
    for limit, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, PRINTED),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _MACHINES[machine]), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    program += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE)]  # x86-64's other numbering
    for number in _DENIED[machine]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for number, place in _OPEN[machine]:
        flags = 16 + 8 * place
        program += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, flags), (_BITS, 0, 1, _WRITING), (_RETURN, 0, 0, _REFUSE)]
        program += [(_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Confine, run, and say the word."""
    given = json.loads(sys.stdin.read())
    confine()
    space: dict[str, object] = {"__name__": "solution"}
    exec(compile(given["code"], "solution", "exec"), space)
    exec(compile(given["tests"], "tests", "exec"), space)
    sys.stdout.flush()
    os.write(1, given["word"].encode())


if __name__ == "__main__":
    main()
