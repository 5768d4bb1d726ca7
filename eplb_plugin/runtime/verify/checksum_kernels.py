"""Compiled checksums of words in CPU memory.

They release the interpreter lock, and their compiled code is kept on disk. Integers wrap, so sums are the
same in any order.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from ...core.jit import cached_njit

__all__ = ["sum_blocks", "sum_samples"]

_compile = cached_njit(nogil=True, fastmath=False, boundscheck=False)


@intrinsic
def _words_at(typing_context, address):
    """A pointer to the int32 words at an address, int64."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int32)(types.int64), generate


@_compile
def sum_samples(addresses, ends, places, factors, sums):
    """Write the sum of factor * word of each expert to int64 `sums` [experts].

    Args:
        addresses: int64 [experts, tensors], of the rows of an expert; divisible by 4.
        ends: int64 [tensors], number of sampled words up to the end of each tensor.
        places: int64 [sampled words], position in its row, in words.
        factors: int64 [sampled words].
    """
    for expert in range(addresses.shape[0]):
        total = 0
        first = 0
        for tensor in range(addresses.shape[1]):
            words: Any = _words_at(addresses[expert, tensor])  # type: ignore[call-arg]
            for at in range(first, ends[tensor]):
                total += factors[at] * words[places[at]]
            first = ends[tensor]
        sums[expert] = total


@_compile
def sum_blocks(addresses, num_words, of_word, of_block, sums):
    """Write the sum over blocks of (block factor * sum of word factor * word) to int64 `sums` [experts].

    Args:
        addresses: int64 [experts, tensors], of the rows of an expert; divisible by 4.
        num_words: int64 [tensors], words of a row.
        of_word: int64 [words of a block], word factors.
        of_block: int64 [blocks of all tensors], block factors; the last block of a tensor may be shorter.
    """
    for expert in range(addresses.shape[0]):
        total = 0
        block = 0
        for tensor in range(addresses.shape[1]):
            words: Any = _words_at(addresses[expert, tensor])  # type: ignore[call-arg]
            for first in range(0, num_words[tensor], of_word.shape[0]):
                part = 0
                for at in range(min(of_word.shape[0], num_words[tensor] - first)):
                    part += of_word[at] * words[first + at]
                total += of_block[block] * part
                block += 1
        sums[expert] = total
