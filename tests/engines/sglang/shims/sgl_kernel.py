"""Stands for SGLang's GPU kernels, which have no CPU build: importable, and an error when one is called."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(f"sgl_kernel.{name} has no CPU build")

    return missing
