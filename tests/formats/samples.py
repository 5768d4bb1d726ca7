"""Loads to write, and files of SGLang to change."""

from __future__ import annotations

import io
import zipfile

import torch

from eplb_plugin.formats.loads import LOAD_FORMATS, write_load
from eplb_plugin.offline.traces import LoadTrace

LAYERS = (3, 4, 6)


NAMES = {"npz": "load.npz", "sglang": "load.pt", "benchmark-json": "load.json", "csv": "load.csv"}


NAMES["tensorrt-llm"] = "statistics"


def trace_of(dtype=torch.int32, steps=4, layers=LAYERS, experts=5, seed=0):
    """A load with tokens in every step."""
    load = torch.randint(0, 50, (steps, len(layers), experts), generator=torch.Generator().manual_seed(seed))
    load[:, 0, 0] += 1
    load = load.to(dtype)
    return LoadTrace(load / 7 if dtype.is_floating_point else load, layer_ids=layers)


def write(path, trace, name):
    write_load(path, trace, LOAD_FORMATS[name], top_k=2 if name == "tensorrt-llm" else None)
    return path


def detail_dumps(folder, placement, counts, mode, first_pass=7):
    """What the ranks write in the modes per_pass and per_token: counts [ranks, passes, layers, physical]."""
    folder.mkdir()
    for rank, of_rank in enumerate(counts):
        records = []
        for index, count in enumerate(of_rank):
            record = {"forward_pass_id": first_pass + index, "rank": rank, "gatherer_key": "primary"}
            if mode == "per_token":
                record |= {"input_ids": [1, 2], "positions": [0, 1], "forward_mode": 1, "misc_objects": []}
                record["topk_ids_of_layer"] = torch.full((2, 2, 8), -1, dtype=torch.int32)
            records.append(record | {"global_physical_count": count})
        content = {"records": records, "last_physical_to_logical_map": placement}
        torch.save(content, folder / f"expert_distribution_recorder_1.5_{rank}.pt")
    return folder


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rezipped(content, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The same archive with its entries changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return stream.getvalue()


def pickled(payload):
    """A file of torch.save whose pickle is `payload`."""
    return rezipped(torch_file({}), lambda name, data: payload if name.endswith("data.pkl") else data)


GOOD_PT = torch_file({"logical_count": torch.ones(2, 3, 4, dtype=torch.int32)})


RECORD = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.ones(1, 3, dtype=torch.int32)}


MAP = torch.tensor([[0, 1, 0]])


def records(*changed, placement=MAP):
    content = {"records": [RECORD | change for change in changed], "last_physical_to_logical_map": placement}
    return torch_file(content)
