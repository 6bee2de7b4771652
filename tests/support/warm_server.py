"""The server of `warm.py`: started as a program, it reads requests and forks a command for each."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
from typing import NoReturn

#: A command that runs for so many seconds hangs, and is killed.
LIMIT = 60

_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _serve() -> None:
    import addcow_mp

    for module in pkgutil.walk_packages(addcow_mp.__path__, "addcow_mp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(*json.loads(line))
        _answer(pid)
        while os.WIFSTOPPED(status := os.waitpid(pid, os.WUNTRACED)[1]):
            _answer("stopped")
        _answer(os.waitstatus_to_exitcode(status))


def _answer(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _become(cwd: str, faults: str, out: str, err: str, *arguments: str) -> NoReturn:
    """Be the command from here on."""
    from addcow_mp.device import faults as points

    signal.alarm(LIMIT)  # one that hangs is killed by this
    os.chdir(cwd)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, _NEW), (2, err, _NEW)):
        os.dup2(os.open(name, flags, 0o600), number)
    if faults:
        os.environ["ADDCOW_FAULTS"] = faults
        importlib.reload(points)  # which is when the rules are read
    sys.argv[:] = ["addcow", *arguments]
    runpy.run_module("addcow_mp", run_name="__main__", alter_sys=True)
    sys.exit("the command did not exit")


if __name__ == "__main__":
    _serve()
