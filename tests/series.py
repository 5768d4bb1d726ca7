"""Reading what a `/metrics` shows."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str | bytes) -> dict[str, float]:
    """Value by series, labels as in `name{value,value}`; without the times that counters were created at."""
    text = text.decode() if isinstance(text, bytes) else text
    return {
        sample.name + (f"{{{','.join(sample.labels.values())}}}" if sample.labels else ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def fetch(port: int) -> dict[str, float]:
    """The samples at a port of this machine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return samples(answer.read())
