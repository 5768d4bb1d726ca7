"""The sampled bytes of a tensor, which "sampled" fingerprints cover."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.runtime.verify import checksum
from eplb_plugin.runtime.verify.fingerprints import fingerprint_rows

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(st.integers(4097, 30_000_000))
def test_samples_are_words_of_the_tensor_from_first_to_last(num_bytes: int) -> None:
    places = checksum.sampled_bytes.__wrapped__(num_bytes, CPU).view(-1, 4)
    assert (places.diff(dim=1) == 1).all()
    assert (places[0, 0], places[-1, -1]) == (0, num_bytes - 1)
    gaps = places[1:, 0] - places[:-1, -1]
    assert int(gaps.min()) > 0
    assert int(gaps.max()) <= num_bytes / 512 + 8
    assert places.numel() == 4096


def test_samples_do_not_keep_to_a_few_columns_of_a_matrix() -> None:
    columns = checksum.sampled_bytes(2048 * 7168, CPU)[::4] % 7168
    assert columns.unique().numel() > 500


def test_sampling_reads_no_more_than_it_says() -> None:
    row = torch.randint(256, (1, 100_000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    places = set(checksum.sampled_bytes(100_000, CPU).tolist())
    before = fingerprint_rows([row], "sampled").item()
    for place in range(0, 100_000, 97):
        row[0, place] ^= 255
        assert (fingerprint_rows([row], "sampled").item() != before) == (place in places)
        row[0, place] ^= 255
