"""Lets torchvision's CUDA build be imported beside a CPU build of torch: it asks for operators that only its
own library defines. Python runs this file at the start of every process that has the folder on its path."""

import importlib.abc
import sys

_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _DefineOperators(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it only sees that torchvision is about to be imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for name, schema in _OPERATORS.items():
                torch.library.define(f"torchvision::{name}", schema)


sys.meta_path.insert(0, _DefineOperators())
