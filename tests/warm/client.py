"""Has a command run by the server, with this process's folder, environment and streams, and ends as it ended.

`tests/warm/__init__.py` makes a program of it.
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time


def connect(folder: str) -> socket.socket:
    connection, address = socket.socket(socket.AF_UNIX), f"{folder}/socket"
    with open(f"{folder}/lock", "w") as lock, open(f"{folder}/log", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of those who come first starts it
        try:
            connection.connect(address)
        except OSError:
            subprocess.Popen(
                [sys.executable, os.environ["WARM_SERVER"], address],
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # it must have one thread to be forked
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for _ in range(1000):
                time.sleep(0.01)
                if connection.connect_ex(address) == 0:
                    break
    return connection


def main() -> None:
    command, folder = sys.argv[1:], os.environ.get("WARM_FOLDER")
    if not folder or not command or (command[0].startswith("-") and command[0] not in ("-m", "-c")):
        os.execv(sys.executable, [sys.executable, *command])
    connection = connect(folder)
    told = json.dumps([command, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [len(told).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(told)
    answer = connection.recv(16)
    if not answer:
        sys.exit(f"the server of {folder} is gone: see its log there")
    code = int(answer)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
