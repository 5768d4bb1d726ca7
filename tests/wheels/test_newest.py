"""The newest wheels of vLLM and SGLang from pip's index have every seam that the plugin uses.

`make test-wheels` downloads them, 380 MB in all, and reads what matters. Nothing is installed, and no
engine is imported. Without an index, the tests are skipped and say so.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from eplb_plugin.integration.adapters import ENGINES, adapters
from eplb_plugin.integration.common.seams import Seam

from .sources import Wheel

ADAPTERS = dict(zip(ENGINES, adapters(), strict=True))
LIMIT = 900  # seconds of a download


def seams(engine: str) -> tuple[Seam, ...]:
    return import_module(f"eplb_plugin.integration.{engine}.seam_table").SEAMS


@pytest.fixture(scope="module", params=ENGINES)
def newest(request, tmp_path_factory):
    """The engine's name, and its newest wheel for this machine."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", folder, ADAPTERS[request.param].package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        pytest.skip(f"no wheel of {request.param} from pip's index: {' '.join(last)}")
    (path,) = Path(folder).glob("*.whl")
    yield request.param, Wheel(path)
    path.unlink()


@pytest.mark.timeout(LIMIT + 60)
def test_every_seam_is_there(newest):
    engine, wheel = newest
    adapter = ADAPTERS[engine]
    assert wheel.missing(seams(engine)) == []
    if adapter.untested(wheel.version) is None or wheel.version in adapter.checked:
        return
    warnings.warn(f"{adapter.name} {wheel.version} has every seam: name it in `checked`", stacklevel=1)


@pytest.mark.timeout(LIMIT + 60)
def test_what_is_gone_or_takes_other_arguments_is_noticed(newest):
    engine, wheel = newest
    for seam in seams(engine):
        gone = seam._replace(target=f"{seam.target}_x")
        assert wheel.missing((gone,)) == [f"{gone.target} is missing"]
        if seam.arguments:
            more = seam._replace(arguments=(*seam.arguments, "no_such"))
            assert len(wheel.missing((more,))) == 1
