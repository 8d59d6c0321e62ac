"""The processes that a start of the command has made: found, and ended, by a token that they carry.

A token is random and stands in the environment with which a process began; whatever it starts has
it too. Nothing else tells who made a process: sessions, groups and parents are shared with others,
or change when somebody dies. Nothing without the token is ever sent a signal.
"""

import os
import secrets
import signal
from contextlib import suppress
from pathlib import Path

RUN_OF = "CHAOS_JOB_RUN"
"""Names the variable."""
_LEAST_LENGTH = 16


def new_token() -> str:
    """Make a token that no other process of the machine carries."""
    return secrets.token_hex(_LEAST_LENGTH)


def processes_of(token: str) -> dict[int, str]:
    """Find the processes that carry a token and have not ended.

    Args:
        token: The token.

    Returns:
        Their command lines, by number.
    """
    found = {}
    for number in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if carries(number, token):
            with suppress(OSError):  # gone meanwhile
                command = Path(f"/proc/{number}/cmdline").read_bytes()
                found[number] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def carries(pid: int, token: str) -> bool:
    """Whether a process is there, is no zombie, and carries a token."""
    assert len(token) >= _LEAST_LENGTH, "others must not carry it by chance"
    wanted = f"{RUN_OF}={token}".encode()
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
            return False
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False


def send(pid: int, token: str, number: signal.Signals) -> bool:
    """Send a signal to a process, if it carries a token.

    Args:
        pid: The process.
        token: The token.
        number: The signal.

    Returns:
        Whether it was sent.
    """
    try:
        fd = os.pidfd_open(pid)  # from here on the number cannot become another process's
    except OSError:
        return False
    try:
        if not carries(pid, token):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def end_all(token: str) -> None:
    """Kill the processes that carry a token."""
    for pid in processes_of(token):
        send(pid, token, signal.SIGKILL)
