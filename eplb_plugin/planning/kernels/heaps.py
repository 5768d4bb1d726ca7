"""Binary heaps of numbered items in an array, ordered by a key of each item; equal keys by number."""

from __future__ import annotations

from .compiling import _compile


@_compile
def _sink(heap, size, at, key):
    """Let an item of a heap sink to where it belongs: the lowest key is on top, of equal ones the first."""
    item = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        low, high = heap[child], heap[min(child + 1, size - 1)]
        if key[high] < key[low] or (key[high] == key[low] and high < low):
            child, low = child + 1, high
        if key[item] < key[low] or (key[item] == key[low] and item < low):
            break
        heap[at] = low
        at = child
    heap[at] = item


@_compile
def _rise(heap, at, key):
    """Let an item of a heap rise to where it belongs."""
    item = heap[at]
    while at > 0:
        above = heap[(at - 1) // 2]
        if key[above] < key[item] or (key[above] == key[item] and above < item):
            break
        heap[at] = above
        at = (at - 1) // 2
    heap[at] = item
