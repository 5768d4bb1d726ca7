"""Coverage-guided fuzzing of every parser, with atheris: `python -m tests.fuzz.fuzz_formats --seconds 20`.

Each parser runs in a process of its own, which has little memory and ends with the input that broke it. That
file is kept, and its name is printed. Coverage is that of this package, not of the libraries that it calls.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["eplb_plugin"]):
    from tests.fuzz.parsers import PARSERS, mutated, mutated_archive, without_our_variables

_MOST_MEMORY = 6 * 2**30
_SLOWEST = 60
_LONGEST_INPUT = 8192


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Fuzz one parser in this process, which atheris ends."""
    parser = PARSERS[name]
    corpus, found = folder / "corpus", folder / "found"
    for place in (corpus, found):
        place.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(parser.starts):
        (corpus / f"start_{index}").write_bytes(start)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    without_our_variables()

    def change(data: bytes, most: int, seed: int) -> bytes:
        """atheris's own changes, and those that know the words and the checksums of the formats."""
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        try:
            changed = mutated_archive(data, parser.words, rng) if data[:2] == b"PK" else None
        except Exception:  # no longer an archive
            changed = None
        return (changed or mutated(data, parser.words, rng))[:most]

    atheris.Setup(
        [
            name,
            f"-max_total_time={seconds}",
            f"-timeout={_SLOWEST}",
            f"-max_len={_LONGEST_INPUT}",
            f"-artifact_prefix={found}/",
            "-verbosity=0",
            "-print_final_stats=1",
            str(corpus),
        ],
        lambda data: parser(data, folder / "work"),
        custom_mutator=change,
    )
    atheris.Fuzz()


def main() -> int:
    """Fuzz the parsers one after the other; 1 if any of them broke."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=int, default=20, help="for each parser")
    arguments.add_argument(
        "--folder", type=Path, help="where inputs are kept; by default a new temporary one"
    )
    arguments.add_argument("--one", choices=sorted(PARSERS), help="this parser alone, in this process")
    given = arguments.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="eplb_fuzz_"))
    if given.one:
        fuzz(given.one, folder / given.one, given.seconds)
        return 0
    broken = []
    for name in PARSERS:
        command = [sys.executable, "-m", "tests.fuzz.fuzz_formats", "--one", name]
        command += ["--seconds", str(given.seconds), "--folder", str(folder)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(
            f"{name}: {runs[0] if runs else 'no'} inputs, {'broken' if done.returncode else 'fine'}",
            flush=True,
        )
        if done.returncode:
            broken.append(name)
            print("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
            print(*sorted((folder / name / "found").iterdir()), sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
