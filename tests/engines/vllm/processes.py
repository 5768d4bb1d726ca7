"""Starts an engine in a process group of its own, and never leaves one behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def environment(ranks: int, folder: Path, **more: str) -> dict[str, str]:
    """What an engine of `ranks` ranks on this machine's cores needs; checks of its workers go to `folder`."""
    cores = sorted(os.sched_getaffinity(0))
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "EPLB_"))}
    return {
        **keep,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "WORKER_CHECKS_FOLDER": str(folder),
        **more,
    }


@contextlib.contextmanager
def engine(command: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A Python command under the running interpreter, output in `log`; its group is killed in the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                # An engine that is well ends by itself and takes its shared memory along.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            # One that hangs does not: its workers ignore SIGTERM while they wait for each other.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
