"""Server processes end with us, however we end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpt_mega.process import OwnedProcess, PortClaim, free_port, tail

pytestmark = pytest.mark.timeout(60)
# A server with a child of its own; both write their pids, and the server may ignore SIGTERM.
SERVER = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(100)
"""


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold within 20 s."""
    until = time.monotonic() + 20.0
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pids(log: Path) -> list[int]:
    assert eventually(lambda: log.is_file() and log.read_text().endswith("\n"))
    return [int(word) for word in log.read_text().split()]


@pytest.mark.parametrize("manner", ["polite", "stubborn"])
def test_close_ends_a_server_and_its_children(manner: str, tmp_path: Path) -> None:
    server = OwnedProcess([sys.executable, "-c", SERVER, manner], {}, tmp_path / "log")
    found = pids(tmp_path / "log")
    assert server.ended() == "" and all(runs(pid) for pid in found)
    server.close()
    assert server.ended() != ""
    assert eventually(lambda: not any(runs(pid) for pid in found))


def test_a_server_is_told_nothing_of_the_rank_that_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    command = [sys.executable, "-c", "import os; print(*sorted(os.environ), flush=True)"]
    server = OwnedProcess(command, {"KEY": "value"}, tmp_path / "log")
    assert eventually(lambda: server.ended() != "")
    names = (tmp_path / "log").read_text().split()
    assert "KEY" in names and "PATH" in names
    assert not [name for name in names if "RANK" in name or name.startswith(("MASTER", "TORCHEL", "WORLD"))]


def test_a_server_ends_when_we_are_killed(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    ours = (
        "import sys, time, pathlib; from hpt_mega.process import OwnedProcess;"
        f"OwnedProcess([sys.executable, '-c', {SERVER!r}, 'polite'], {{}}, pathlib.Path({log!r}));"
        "time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", ours], cwd=Path(__file__).parents[1])
    found = pids(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert eventually(lambda: not any(runs(pid) for pid in found))


def test_close_ends_what_a_killed_guard_has_left(tmp_path: Path) -> None:
    server = OwnedProcess([sys.executable, "-c", SERVER, "polite"], {}, tmp_path / "log")
    found = pids(tmp_path / "log")
    server._guard.kill()
    assert eventually(lambda: not runs(found[0]))  # the kernel ends the server with its guard, not its child
    assert runs(found[1])
    server.close()
    server.close()
    assert eventually(lambda: not runs(found[1]))


def test_a_server_that_is_stopped_is_ended(tmp_path: Path) -> None:
    server = OwnedProcess([sys.executable, "-c", SERVER, "polite"], {}, tmp_path / "log")
    found = pids(tmp_path / "log")
    os.kill(found[0], signal.SIGSTOP)
    server.close()
    assert eventually(lambda: not any(runs(pid) for pid in found))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    started: list[OwnedProcess] = []
    command = [sys.executable, "-c", SERVER, "polite"]
    thread = threading.Thread(target=lambda: started.append(OwnedProcess(command, {}, tmp_path / "log")))
    thread.start()
    thread.join()
    found = pids(tmp_path / "log")
    time.sleep(0.3)
    assert started[0].ended() == "" and all(runs(pid) for pid in found)
    started[0].close()


@pytest.mark.parametrize(
    ("code", "words"),
    [("raise SystemExit(3)", "ended with exit code 3"), ("os.kill(os.getpid(), 9)", "was ended by signal 9")],
)
def test_how_a_server_ended_is_told(code: str, words: str, tmp_path: Path) -> None:
    server = OwnedProcess([sys.executable, "-c", f"import os; print('x'); {code}"], {}, tmp_path / "log")
    assert eventually(lambda: server.ended() == words)
    server.close()


def test_the_log_is_ours_alone_and_its_tail_is_bounded(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    server = OwnedProcess([sys.executable, "-c", "[print(n) for n in range(99_999)]"], {}, log)
    assert eventually(lambda: server.ended() == "ended with exit code 0")
    assert log.stat().st_mode & 0o777 == 0o600
    assert tail(log, 2) == "99997\n99998"
    assert tail(tmp_path / "none", 2) == ""
    assert os.path.getsize(log) > 65536


def test_a_secret_in_the_tail_of_a_log_is_not_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nargs: {'api_key': ['a-key']}\na-keya-key\n")
    assert tail(log, 2, "a-key") == "args: {'api_key': ['***']}\n******"
    assert tail(log, 1, "") == "a-keya-key"


def test_a_port_is_claimed_once_and_not_where_somebody_listens() -> None:
    port = free_port()
    claim = PortClaim("127.0.0.1", port)
    with pytest.raises(OSError, match="in use"):
        PortClaim("127.0.0.1", port)
    claim.release()
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # whose end waits in the kernel
        for address in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(OSError, match="in use"):
                PortClaim(address, port)
    PortClaim("127.0.0.1", port).release()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_no_shared_memory_is_left_by_a_server_that_could_not_remove_its_own(end: str, tmp_path: Path) -> None:
    holder = (
        "import os, time; from multiprocessing.shared_memory import SharedMemory;"
        "held = SharedMemory(create=True, size=1000);"
        "print(os.getpid(), held.name, flush=True); time.sleep(100)"
    )
    server = OwnedProcess([sys.executable, "-c", holder], {}, tmp_path / "log")
    log = tmp_path / "log"
    assert eventually(lambda: log.is_file() and log.read_text().endswith("\n"))
    pid, name = log.read_text().split()
    memory = Path("/dev/shm") / name
    assert memory.is_file()
    if end == "killed":
        os.kill(int(pid), signal.SIGKILL)
        assert eventually(lambda: server.ended() != "")
    server.close()
    assert not memory.exists()


@pytest.mark.parametrize("end", ["closed", "killed", "itself"])
def test_no_temporary_file_of_a_server_is_left(end: str, tmp_path: Path) -> None:
    code = "import os, tempfile, time; print(os.getpid(), tempfile.mkdtemp(), flush=True);"
    code += "" if end == "itself" else "time.sleep(100)"
    log = tmp_path / "log"
    server = OwnedProcess([sys.executable, "-c", code], {"TMPDIR": str(tmp_path)}, log)
    assert eventually(lambda: log.is_file() and log.read_text().endswith("\n"))
    pid, made = log.read_text().split()
    assert Path(made).parent.parent == tmp_path
    if end == "killed":
        os.kill(int(pid), signal.SIGKILL)
    if end == "closed":
        server.close()
    assert eventually(lambda: server.ended() != "")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    server.close()
