"""
Scripts in processes of their own, several ranks too, without seconds of imports in each: multiprocessing's fork server
imports what all of them need, once, and nothing else. It imports this module; it must not import the tests.
"""

import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import shared  # isort: skip  # before torchvision
import matplotlib.pyplot  # noqa: F401
import medmnist  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
KEPT = shared  # the operators that it declares live as long as it does
SERVER = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
SERVER.set_forkserver_preload([__name__])


def start_server(**environment):
    """Its environment is read when it starts, and handed on to the scripts."""
    found_by = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))  # Python 3.11 does not tell it sys.path
    with mock.patch.dict(os.environ, environment | {"PYTHONPATH": found_by}):
        multiprocessing.forkserver.ensure_running()


def run_as_script(arguments, folder, environment, parent_path):
    """In the child: as `python ARGUMENTS` in that folder, which finds nothing of the project by itself."""
    os.chdir(folder)
    del os.environ["PYTHONPATH"]
    os.environ.update(environment)
    output = os.open("output.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours = [name for name, module in sys.modules.items() if str(ROOT) in str(getattr(module, "__file__", ""))]
    for name in ours:
        if name not in ("__main__", "__mp_main__", __name__):
            del sys.modules[name]
    project = {str(ROOT), str(ROOT / "tests"), ""}
    sys.path[:] = [path for path in parent_path if path not in project]
    sys.argv = arguments
    sys.path.insert(0, str(Path(folder, arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


class Script:
    """As subprocess.Popen; of several ranks it waits for all."""

    def __init__(self, arguments, folder, ranks=1, **environment):
        Path(folder, "output.txt").touch()
        self.processes, group = [], {}
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(ranks):
            if ranks > 1:
                group |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            given = ([str(a) for a in arguments], str(folder), environment | group, sys.path)
            self.processes.append(SERVER.Process(target=run_as_script, args=given))
            self.processes[-1].start()

    def poll(self):
        """None while one is running, else the first exit status that is not 0 (-9 for SIGKILL), else 0."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout=900):
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.processes), timeout)
        return self.poll()

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self):
        for process in self.processes:
            process.kill()
