"""A `python` for commands under test that forks a process in which torch is already imported.

    quick = QuickPython(folder).start()                 # folder gets bin/python and bin/torchrun
    quick.run("-m", "apps.LT2.train", ...)
    subprocess.run(["bash", "-c", "python -m apps.LT2.train ..."], env=quick.env())

Importing torch and the evaluation harness takes longer than a tiny model's work. `bin/python` sends
its arguments, folder, environment and open files to a server that has imported libraries, lingua
and apps. A fork of the server runs the module as `python` would, and imports lingua and apps again
if its folder has a copy of them. All processes of a test session share one server.
With `clone`, a fork of that server imports the modules of a copy of this repository, and commands
run there.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOAD = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "omegaconf._impl",
    "rich.table",
)
OPTIONAL = (
    *("tokenizers", "safetensors.torch", "lm_eval.tasks", "lm_eval.evaluator"),
    *("transformers", "pytablewriter"),  # of the harness's results
    *("matplotlib.pyplot", "matplotlib.backends.backend_agg"),
)
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
asked = {{"argv": {before} + sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
server.sendall(json.dumps(asked).encode())
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.recv(16) or 1))
"""


class QuickPython:
    def __init__(self, folder: Path):
        """`folder` must have a short path: addresses have at most 107 characters."""
        self.folder, self.bin = folder, folder / "bin"
        self.executable = str(self.bin / "python")

    def env(self) -> dict[str, str]:
        """Return the current environment with this `python` first in PATH."""
        env = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHON_EXEC": self.executable,  # what torchrun starts its processes with
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # many processes import the same modules
        return env

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess:
        """subprocess.run of `python *argv`."""
        return subprocess.run([self.executable, *argv], env=self.env(), **options)

    def clone(self, root: Path) -> QuickPython:
        """Return the `python` of a copy of this repository."""
        return QuickPython(Path(tempfile.mkdtemp(dir=self.folder))).start(self.executable, root)

    def start(self, python: str = sys.executable, *clone: Path) -> QuickPython:
        """Start the server with `python`, unless another process has started it."""
        address, pid = self.folder / "server", self.folder / "pid"
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if address.exists():
                return self
            self.bin.mkdir(exist_ok=True)
            for name, before in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
                text = CLIENT.format(python=sys.executable, address=str(address), before=before)
                (self.bin / name).write_text(text)
                (self.bin / name).chmod(0o755)
            command = [python, "-m", "tests.quick_python", address, *clone]
            server = subprocess.Popen(command, cwd=ROOT, env=self.env(), start_new_session=True)
            pid.write_text(str(server.pid))
            while not address.exists():
                assert server.poll() is None, "the server died"
                time.sleep(0.05)
        self.server = server  # kept: Popen warns of a process that it outlives
        return self

    def stop(self) -> None:
        """Kill the server, if it runs, and its forks, also in clones."""
        if (pid := self.folder / "pid").exists():
            with suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def skip_environment_report() -> None:
    """Keep the harness from asking pip, the compiler and the CPU: over a second per evaluation."""
    import torch.utils.collect_env

    torch.utils.collect_env.get_pretty_env_info = lambda: "skipped in tests"


# ---- in the server


def serve(address: str, root: str = str(ROOT)) -> None:
    gc.disable()  # imports leave no garbage
    for name in (*PRELOAD, *OPTIONAL):
        try:
            __import__(name)
        except ImportError:
            if name in PRELOAD:
                raise
    skip_environment_report()
    forget_own_modules()  # of the server that this one was forked from
    sys.path.insert(0, root)
    for name in ("train", "eval", "generate"):
        __import__(f"apps.LT2.{name}")
    prepare_options()
    for name in ("train", "eval", "generate"):  # a fork runs them as __main__
        delattr(sys.modules["apps.LT2"], name)
        del sys.modules[f"apps.LT2.{name}"]
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # the end of a fork need not unload torch's libraries
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    gc.enable()
    gc.freeze()  # forks then don't look through the libraries, which would copy their memory
    os.rename(address + ".new", address)  # who sees it may connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks that answer
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
            return
        connection.close()


def prepare_options() -> None:
    """Make the default options, which a process caches: a fifth of a second per command."""
    from_dict = sys.modules["lingua.config.from_dict"]
    for module, name in (("training", "TrainArgs"), ("evaluation", "EvalArgs")):
        from_dict._defaults(getattr(sys.modules[f"apps.LT2.{module}.args"], name))


def forget_own_modules() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("apps", "lingua")]:
        del sys.modules[name]


def answer(connection: socket.socket) -> None:
    """Run what is asked for in a fork, and send its exit status."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    received = b"".join(iter(lambda: connection.recv(65536), b""))
    asked = json.loads(received)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        run_as_python(**asked)
        return
    _, status = os.waitpid(pid, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status) & 0xFF).encode())
    os._exit(0)


def run_as_python(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    """Act as `python *argv`, for `-u`, `-m MODULE` and files, and end the process.

    The end skips what would free the memory of the libraries, which takes two seconds.
    """
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    imported = sys.modules["apps.LT2"].__file__
    assert imported is not None
    if (copy := Path(cwd) / "apps/LT2/__init__.py").exists() and not copy.samefile(imported):
        forget_own_modules()
    if torchrun := sys.modules.get("lingua.parallel.torchrun"):
        torchrun._parent = os.getppid()  # read at import, here in the server
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    while argv[0] == "-u":
        argv = argv[1:]
    status = 0
    try:
        if argv[0] == "-m":
            sys.path[0], sys.argv = cwd, argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(argv[0]).resolve().parent), argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(*sys.argv[1:])
