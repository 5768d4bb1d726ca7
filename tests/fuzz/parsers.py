"""Everything that reads what strangers wrote, each with small files that it accepts to start from.

Shared by the property tests and by the coverage-guided fuzzer. Whatever the bytes, a parser returns or raises
an EplbError of one short line.
"""

from __future__ import annotations

import io
import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import save as safetensors

from eplb_plugin.config.sources import default_yaml, load_settings
from eplb_plugin.core.errors import EplbError
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.formats.placements import read_placement, read_placement_file
from eplb_plugin.integration.sglang.policy import parse_algorithm
from eplb_plugin.integration.vllm.plugin import vllm_options

MOST_BYTES = 64 * 2**20
"""What a parser may unpack here: enough for every valid start, little enough to notice who takes more."""

_LONGEST_MESSAGE = 50_000  # some repeat a value in full


def is_told(action: Callable[[], object]) -> bool:
    """Whether `action` refuses, which it has to do by an error of the package, in one line."""
    try:
        action()
    except EplbError as error:
        message = str(error)
        assert message, "says nothing"
        assert "\n" not in message, message
        assert len(message) < _LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]}"
        return True
    return False


@dataclass(frozen=True)
class Parser:
    """What reads one kind of file.

    Attributes:
        file: the name that the bytes get; with a folder, that folder is read.
        read: takes the path.
        starts: contents that it accepts.
        words: what to splice into them.
    """

    file: str
    read: Callable[[Path], object]
    starts: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()

    def __call__(self, content: bytes, folder: Path) -> bool:
        """Whether `content` is refused."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return is_told(lambda: self.read(path))


NUMBERS = (b"-1", b"NaN", b"Infinity", b"1e999", b"9" * 30, b"9" * 5000, b"0.5", b"18446744073709551616", b"")
JSON_WORDS = (
    *NUMBERS,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"null",
    b"true",
    b'"x"',
    b"\xff\xfe",
    b"\x00",
    b"[]",
    b"{}",
)
YAML_WORDS = (
    *JSON_WORDS,
    b"&a ",
    b"*a",
    b"!!timestamp x",
    b"!!bool x",
    b"!!int x",
    b"!!float x",
    b"!!binary x",
    b"!!set {a}",
    b"!!python/object/apply:os.getcwd []",
    b"2001-99-99",
    b".inf",
    b".nan",
    b"<<: ",
    b"? ",
    b"0x" + b"f" * 5000,
    b"\n  ",
    b"- ",
)
CSV_WORDS = (*NUMBERS, b",", b"\n", b'"', b"\r", b"expert_2", b"\x00", b"1_0", b"\xd9\xa3", b"inf", b" ")
PICKLE_WORDS = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"\x8a\xff",
    b"R",
    b"\x93",
    b"Q",
    b"b",
    b"(",
    b"t",
    b"}",
    b"]",
    b"\x8c\x05load_",
)


def _npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _pt(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _loads() -> tuple[bytes, ...]:
    count = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    return (
        _npz(load=count),
        _npz(load=count.astype(np.float16), layer_ids=np.array([1, 3, 7])),
        _npz(load=count.astype(">u8")),
    )


def _tokens() -> tuple[bytes, ...]:
    ids = np.array([0, 1, 2, 3, 3, 2, 1, 0, 4, 4], np.uint8).reshape(5, 1, 2)
    common = {"topk_ids": ids, "request": np.array([0, 0, 1, 1, 1]), "num_experts": np.int64(5)}
    return _npz(**common, category=np.array(["a", "b"])), _npz(**common, category=np.array([7, 8, 9]))


def _dumps() -> tuple[bytes, ...]:
    count = torch.arange(12, dtype=torch.int32).reshape(1, 3, 4)
    record = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.ones(1, 3, dtype=torch.int32)}
    return (
        _pt({"rank": 0, "logical_count": count}),
        _pt({"records": [record], "last_physical_to_logical_map": torch.tensor([[0, 1, 0]])}),
    )


def _histories() -> tuple[bytes, ...]:
    step = {"logical_expert_load": [[1, 2], [3, 4.5]]}
    return (json.dumps({"load_history": [step, step], "other": [1]}).encode(),)


def _statistics() -> tuple[bytes, ...]:
    counts = {f"{step}_{layer}": np.arange(4, dtype=np.int32) for step in (0, 1) for layer in (3, 5)}
    return safetensors(counts), safetensors({"0_0": np.ones(4, np.float32)})


def _read_statistics(path: Path) -> object:
    (path.parent / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    return read_trace(path.parent, MOST_BYTES)


def _read_placement(path: Path) -> object:
    return read_placement(path, 2, (0, 1))


def _read_placement_file(path: Path) -> object:
    return read_placement_file(path)


def _maps() -> tuple[bytes, ...]:
    stream = io.BytesIO()
    ids = np.array([[0, 1, 1], [1, 0, 0]])
    np.savez(stream, physical_to_logical=ids, layer_ids=np.array([3, 4]), num_logical=2, rank_slots=[1, 2])
    return (stream.getvalue(),)


def _torch_maps() -> tuple[bytes, ...]:
    stream = io.BytesIO()
    torch.save({"physical_to_logical_map": torch.tensor([[0, 1, 1], [1, 0, 0]])}, stream)
    return (stream.getvalue(),)


def _read_algorithm(path: Path) -> object:
    return parse_algorithm(path.read_bytes().decode("utf-8", "surrogateescape"))


def _read_additional_config(path: Path) -> object:
    try:
        return vllm_options(json.loads(path.read_bytes()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None  # vLLM reads the JSON itself
    except ValueError as error:
        if isinstance(error, EplbError):
            raise
        return None  # a number of too many digits, for the same reason


_PLACEMENT = {
    "format": "eplb-plugin placement 1",
    "num_logical": 2,
    "num_ranks": 1,
    "num_nodes": 1,
    "num_groups": 1,
    "layer_ids": [0, 1],
    "physical_to_logical": [[0, 1, 1], [1, 0, 0]],
}
_TRTLLM = {
    "num_slots": 3,
    "initial_global_assignments": {0: [0, 1, 1], 1: [1, 0, 0]},
    "layer_updates_per_iter": 0,
}

PARSERS = {
    "load": Parser("a.npz", lambda path: read_trace(path, MOST_BYTES), _loads()),
    "tokens": Parser("a.npz", lambda path: read_trace(path, MOST_BYTES), _tokens()),
    "sglang": Parser("a.pt", lambda path: read_trace(path, MOST_BYTES), _dumps(), PICKLE_WORDS),
    "benchmark": Parser("a.json", lambda path: read_trace(path, MOST_BYTES), _histories(), JSON_WORDS),
    "csv": Parser(
        "a.csv",
        lambda path: read_trace(path, MOST_BYTES),
        (
            b"step,layer,expert_0,expert_1\n0,3,1,2\n0,4,0,5\n1,3,7,8\n1,4,1,1\n",
            b"step,layer,expert_0\n0,0,1.5\n",
        ),
        CSV_WORDS,
    ),
    "tensorrt": Parser("statistics/rank0.safetensors", _read_statistics, _statistics(), JSON_WORDS),
    "placement": Parser("a.json", _read_placement, (json.dumps(_PLACEMENT).encode(),), JSON_WORDS),
    "location": Parser(
        "a.json", _read_placement, (b'{"physical_to_logical_map": [[0, 1, 1], [1, 0, 0]]}',), JSON_WORDS
    ),
    "map": Parser("a.npz", _read_placement_file, _maps()),
    "torch map": Parser("a.pt", _read_placement_file, _torch_maps(), PICKLE_WORDS),
    "config": Parser("a.yaml", _read_placement, (yaml.safe_dump(_TRTLLM).encode(),), YAML_WORDS),
    "settings": Parser(
        "settings.yaml",
        load_settings,
        (
            default_yaml().encode(),
            b"planner: {max_moves: 1, move_price: 0.5}\nsimulate: {policies: [greedy]}\n",
            b"eplb_plugin: {enabled: true, planner: {max_moves: 1}}\n",
        ),
        YAML_WORDS,
    ),
    "algorithm": Parser(
        "algorithm",
        _read_algorithm,
        (b"ensemble", b"eplb_plugin:move_price=0.05, max_moves=3,history=2,check_agreement=false"),
        (*NUMBERS, b",", b"=", b":", b"config=/", b"config=."),
    ),
    "additional": Parser(
        "additional",
        _read_additional_config,
        (b'{"eplb_plugin": {"enabled": true, "planner": {"max_moves": 1}, "history": 3}}',),
        JSON_WORDS,
    ),
}
"""All parsers, by name."""


def mutated(content: bytes, words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """`content` after a few small changes: bits, bytes, pieces cut out, doubled or exchanged for a word."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice((0, 1, 2, 4, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            del data[start:]
        elif kind == 3:
            data[start:start] = data[start:end] * rng.choice((1, 2, 100))
        elif kind == 4:
            data[start:end] = rng.randbytes(end - start)
        elif words:
            data[start:end] = rng.choice(words)
    return bytes(data)


def mutated_archive(content: bytes, words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """A zip whose checksums are right again after one of its members changed; damage alone stops at them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        names = old.namelist()
        chosen = rng.choice(names)
        method = rng.choice(
            (zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        )
        with zipfile.ZipFile(stream, "w", method) as new:
            for name in names:
                data = old.read(name)
                if name == chosen:
                    action = rng.randrange(12)
                    if action == 0:
                        continue
                    if action == 1:
                        name = rng.choice(names)  # noqa: PLW2901
                    if action > 1:
                        data = mutated(data, words, rng)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # names that are there twice are meant
                    new.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def odd(parser: Parser, rng: random.Random) -> bytes:
    """Something close to what the parser accepts."""
    start = rng.choice(parser.starts)
    if start.startswith(b"PK") and rng.random() < 0.8:
        return mutated_archive(start, parser.words, rng)
    return mutated(start, parser.words, rng)


def without_our_variables() -> None:
    """Forget the options of this package in the environment, which would decide what files do."""
    for name in [name for name in os.environ if name.upper().startswith("EPLB_PLUGIN_")]:
        del os.environ[name]
