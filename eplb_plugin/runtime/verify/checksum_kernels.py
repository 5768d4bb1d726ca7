"""Compiled sums of words in memory, for fingerprints of weights on the CPU.

As for planning, the interpreter lock is released and the cache is on disk. Integers wrap, so sums are the
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
    """Write the sum of factor * word of each item to int64 `sums` [items].

    Args:
        addresses: int64 [items, tensors], where the rows of an item begin; divisible by 4.
        ends: int64 [tensors], how many of the words belong to a tensor or to one before it.
        places: int64 [words], which word of its row each is.
        factors: int64 [words].
    """
    for item in range(addresses.shape[0]):
        total = 0
        first = 0
        for tensor in range(addresses.shape[1]):
            words: Any = _words_at(addresses[item, tensor])  # type: ignore[call-arg]
            for at in range(first, ends[tensor]):
                total += factors[at] * words[places[at]]
            first = ends[tensor]
        sums[item] = total


@_compile
def sum_blocks(addresses, num_words, of_word, of_block, sums):
    """Write the sum over blocks of (factor of the block * sum of factor * word) to int64 `sums` [items].

    Args:
        addresses: int64 [items, tensors], where the rows of an item begin; divisible by 4.
        num_words: int64 [tensors], words of a row.
        of_word: int64 [words of a block], the factors.
        of_block: int64 [blocks], the factors, over all tensors; the last block of a tensor may be shorter.
    """
    for item in range(addresses.shape[0]):
        total = 0
        block = 0
        for tensor in range(addresses.shape[1]):
            words: Any = _words_at(addresses[item, tensor])  # type: ignore[call-arg]
            for first in range(0, num_words[tensor], of_word.shape[0]):
                part = 0
                for at in range(min(of_word.shape[0], num_words[tensor] - first)):
                    part += of_word[at] * words[first + at]
                total += of_block[block] * part
                block += 1
        sums[item] = total
