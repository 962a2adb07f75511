"""Processes that live no longer than ours: servers with all their children. As a script it is their guard.

The guard stands between us and the server: its standard input is a pipe from us, and when that ends, however
we end, it ends the server, and removes its temporary files: vLLM leaves its sockets otherwise. Unlike the
kernel's parent-death signal it does not depend on the thread that started it. It is a plain script that needs
the standard library only, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_TRACKER = b"multiprocessing.resource_tracker"
GRACE_S = 5.0  # between SIGTERM and SIGKILL, and for what removes shared memory after it
# For processes that compute on a CPU: asking the kernel anew for memory that was given back costs more than a
# copy into it. No block is given back, and huge pages are used where the machine lends them.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
}
# What a rank of a job is told. A server is none, and would wait for the job's store.
_OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    "CUDA_DEVICE_MAX_CONNECTIONS",
)


class OwnedProcess:
    """One server; its output goes to the end of `log`, which only we may read: servers print their keys."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", __file__, *command],  # -P: our modules are no libraries to it
                env=_without_rank(os.environ) | dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(output)

    def ended(self) -> str:
        """Empty while the server runs; else how it ended."""
        code = self._guard.poll()
        if code is None:
            return ""
        return f"ended with exit code {code}" if code < 128 else f"was ended by signal {code - 128}"

    def close(self) -> None:
        """End the server and its children; takes up to 3 * GRACE_S. Further calls do nothing."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(3 * GRACE_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        _kill_session(self._guard.pid)  # what a guard that was killed has left


def _without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(_OF_A_RANK)}


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent's thread dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port that was free a moment ago on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PortClaim:
    """A TCP port that nobody else who claims his own is given, until release().

    vLLM's servers share a port (SO_REUSEPORT): two of one user that are told the same both start, and the
    kernel deals connections out to them. The claim is a name in the port's network namespace, as an abstract
    Unix socket, and ends with this process at the latest.
    """

    def __init__(self, address: str, port: int) -> None:
        """Raises OSError where another has claimed the port or listens there, OverflowError beyond 65535."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(f"\0hpt_mega port {port}")
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after an earlier server of ours
                probe.bind((address, port))
        except Exception:
            self._socket.close()
            raise

    def release(self) -> None:
        self._socket.close()


def tail(log: Path, lines: int, secret: str = "") -> str:
    """The log's last lines, of its last 64 KiB, with *** for the secret, where there is one."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        text = file.read().decode(errors="replace")
    text = text.replace(secret, "***") if secret else text
    return "\n".join(text.splitlines()[-lines:])


def _kill_session(leader: int) -> None:
    """Kill what runs in the session that `leader` began, but for this process.

    Python's trackers of shared memory come last: they end by themselves once nobody uses it, and have removed
    then what the killed ones left in /dev/shm. One that does not within GRACE_S is killed too.
    """
    patience_ends = time.monotonic() + GRACE_S
    while pids := [pid for pid in _session(leader) if pid != os.getpid()]:
        impatient = time.monotonic() > patience_ends
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if impatient or _TRACKER not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        if impatient:
            return
        time.sleep(0.02)


def _session(leader: int) -> list[int]:
    """The processes of the session that `leader` began (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            about = stat.read_text().rpartition(")")[2].split()
            if int(about[3]) == leader and about[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def _guard(command: Sequence[str]) -> int:
    """Run the command until it ends or our standard input does; its exit code, 128 + n for signal n.

    The whole session, which we lead, ends with it: no child is left behind, and no temporary file.
    """
    with tempfile.TemporaryDirectory(prefix="hpt_", ignore_cleanup_errors=True) as own_files:
        code = _run(command, os.environ | {"TMPDIR": own_files})
        _kill_session(os.getpid())
    return code if code >= 0 else 128 - code


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    server = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=die_with_parent,
    )

    def end() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S)
            server.kill()

    threading.Thread(target=end, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return server.wait()


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
