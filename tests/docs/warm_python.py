"""A Python that has imported torch, Lightning and transformers, and forks for each command.

Importing them takes a process five seconds of CPU; what the pages' examples compute takes tenths of
one, and there are some hundred processes. Whoever connects (stand_ins/python) hands over arguments,
directory, environment and the three standard files, sends signals, and gets the exit code.
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
from importlib import import_module

WARM = (
    "torch",
    "lightning.pytorch",
    "transformers",
    "moe_lightning.module",
    "moe_lightning.cli.predict",
    "moe_lightning.cli.fit",
    "moe_lightning.cli.worker",
)


def wait_for_a_command(path: str) -> list[str]:
    """Serve for ever; returns in a fork, whose business it is to run the arguments."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    listener.settimeout(5)
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if os.getppid() != parent:  # nobody is left to ask
                os._exit(0)
            continue
        connection.setblocking(True)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _supervise(connection)
        connection.close()


def _supervise(connection: socket.socket) -> list[str]:
    """Fork once more, and pass on signals and the exit code; returns in the fork."""
    request, files, _, _ = socket.recv_fds(connection, 1 << 18, 3)
    arguments, directory, environ = json.loads(request)
    if (child := os.fork()) == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environ)
        return arguments
    for number, file in enumerate(files):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        os.close(file)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([connection, ended], [], [])[0]):
        if ready:
            # Whoever asked has a signal for it, or is gone.
            os.kill(child, int(connection.recv(16) or signal.SIGKILL))
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)


def run(executable: str, arguments: list[str]) -> None:
    """As ``python ARGUMENTS``, a module or a script."""
    sys.executable = executable
    if arguments[0] == "-m":
        sys.argv = ["-m", *arguments[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for module in WARM:
        import_module(module)
    executable, *arguments = wait_for_a_command(sys.argv[1])
    run(executable, arguments)
