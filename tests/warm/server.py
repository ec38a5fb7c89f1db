"""Imports what commands take seconds to import, once, and forks itself for each that a client hands it."""

import atexit
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import threading

STACKS = [
    *("torch.distributed", "torch.utils.data", "matplotlib.pyplot", "timm", "accelerate", "sacrebleu"),
    *("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.generation.utils"),
    *("fairseq.trainer", "fairseq.options", "fairseq.dataclass.initialize", "fairseq.checkpoint_utils"),
]


def serve(address: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    del sys.path[0]  # this folder
    for name in STACKS:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.settimeout(1)
    while _runs(int(os.environ["WARM_OWNER"])):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            _handle(connection)
        connection.close()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _handle(connection: socket.socket) -> None:
    """Runs the command in a child; tells the client how it ended, or ends it when the client is gone."""
    connection.setblocking(True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as told:
        command, folder, environment = json.loads(told.read(int.from_bytes(size, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(streams, folder, environment)
        os._exit(_run(*command))
    for stream in streams:
        os.close(stream)
    child = os.pidfd_open(pid)
    if child not in select.select([connection, child], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(streams: list[int], folder: str, environment: dict[str, str]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if "HF_MODULES_CACHE" in environment:  # transformers asks for it where it is imported
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = environment["HF_MODULES_CACHE"]
    logging.root.handlers.clear()  # some of fairseq's modules set up logging where they are imported
    logging.root.setLevel(logging.WARNING)


def _run(first: str, *rest: str) -> int:
    """Its exit code."""
    try:
        if first == "-m":
            sys.argv, sys.path[:0] = list(rest), [os.getcwd()]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[:0] = [first, *rest], [os.path.dirname(os.path.abspath(first))]
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # as Python does when it ends: threads, then what was registered, then what was not written
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
