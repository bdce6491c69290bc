"""Whether an LMDB file is whole: its pages walked before LMDB, which trusts what it maps, may follow them.

LMDB has no checksums. A changed bit in a page's header or in a pointer can hide records, or end the process with
SIGBUS. But its trees are redundant: a page says its own number, nodes fill it without gaps, keys ascend, a tree knows
how many pages and entries it has, and a page has one use. All of that is compared here. What nodes hold is left to
their owner's checksums.

The format is that of LMDB 0.9 (MDB_page, MDB_node, MDB_db and MDB_meta in its mdb.c) as machines of 64 bits,
little-endian, write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Fields = npt.NDArray[np.void]

_PAGE = np.dtype([("number", "<u8"), ("unused", "<u2"), ("kind", "<u2"), ("lower", "<u2"), ("upper", "<u2")])
"""In an overflow page, the bytes of lower and upper are one number: how many pages lie in a row."""
_NODE = np.dtype([("low", "<u2"), ("high", "<u2"), ("flags", "<u2"), ("key_bytes", "<u2")])
"""low and high are the size of a leaf node's value; with flags, the page that a branch node points to."""
_NUMBER = np.dtype("<i8")
"""A page's number. LMDB's is unsigned; what no file can hold is negative here."""
_TREE = np.dtype(
    [
        ("page_bytes", "<u4"),
        ("flags", "<u2"),
        ("depth", "<u2"),
        ("branch_pages", "<u8"),
        ("leaf_pages", "<u8"),
        ("overflow_pages", "<u8"),
        ("entries", "<u8"),
        ("root", _NUMBER),
    ]
)
_META = np.dtype(
    [
        ("page", _PAGE),
        ("magic", "<u4"),
        ("version", "<u4"),
        ("address", "<u8"),
        ("map_bytes", "<u8"),
        ("free", _TREE),
        ("names", _TREE),
        ("last_page", "<u8"),
        ("transaction", "<u8"),
    ]
)
_MAGIC = 0xBEEFC0DE
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_INTEGER_KEYS = 8
"""Flag of a tree: its keys are numbers as the machine has them."""
_ELSEWHERE, _SUBTREE = 1, 2
"""Flags of a leaf node: its value lies in overflow pages; its value is a tree."""
_HEADER_BYTES, _NODE_BYTES = 16, 8


class PageFault(Exception):
    """A file that is not a whole LMDB file. The message says which rule it breaks."""


@dataclass(frozen=True)
class _Form:
    """What a tree is made with.

    key_type: what its keys are and ascend as; None does not look at them. leaf_flags: those that a leaf node may have.
    """

    key_type: np.dtype[Any] | None
    flags: int
    leaf_flags: int


_FREE = _Form(np.dtype("<u8"), _INTEGER_KEYS, _ELSEWHERE)
_NAMES = _Form(None, 0, _SUBTREE)
_NAMED = _Form(np.dtype(">u8"), 0, _ELSEWHERE)


@dataclass(frozen=True)
class _Nodes:
    """N nodes of P pages, in order. page_n: which of the pages. at_n: where a node starts in the file.

    children_n: the page that a branch node points to; of no meaning in a leaf.
    """

    page_n: Integers
    at_n: Integers
    flags_n: Integers
    key_bytes_n: Integers
    value_bytes_n: Integers
    children_n: Integers

    @property
    def first_n(self) -> npt.NDArray[np.bool_]:
        """Whether a node is the first of its page."""
        return np.append(True, self.page_n[1:] != self.page_n[:-1])[: len(self.page_n)]


def checked_metas(data: Path) -> Fields:
    """(2,) the meta pages, which LMDB reads when it opens a file, each checked alone: others may write meanwhile.

    Raises PageFault.
    """
    with data.open("rb") as file:
        first = file.read(_META.itemsize)
        _require(len(first) == _META.itemsize, "a file begins with two meta pages")
        page_bytes = int(np.frombuffer(first, _META)[0]["free"]["page_bytes"])
        _require(512 <= page_bytes <= 65536 and not page_bytes & (page_bytes - 1), "a page is 512 to 65536 bytes")
        file.seek(page_bytes)
        second = file.read(_META.itemsize)
    _require(len(second) == _META.itemsize, "a file begins with two meta pages")
    metas = np.frombuffer(first + second, _META)
    _require((metas["page"]["kind"] == _META_PAGE).all(), "a meta page is one")
    _require((metas["magic"] == _MAGIC).all(), "a meta page begins with LMDB's number")
    _require(metas["version"][0] == metas["version"][1], "both meta pages are of one version")  # LMDB refuses another
    _require((metas["free"]["page_bytes"] == page_bytes).all(), "pages are of one size")
    _require((metas["last_page"] < metas["map_bytes"] // page_bytes).all(), "the last page lies in the map")
    return metas


def check_pages(data: Path) -> None:
    """Checks all pages of the newest transaction, in about 0.1 us per node.

    The file has one named tree, whose keys are big-endian numbers of 8 bytes. Nothing may write to it meanwhile, and
    it must reach as far as its last page. A bit of a transaction's number can change unseen, and what it did with it.

    Raises PageFault.
    """
    meta = _newest(checked_metas(data))
    file = _File(np.memmap(data, np.uint8, "r"), int(meta["free"]["page_bytes"]), int(meta["last_page"]))
    free, free_pages = file.walk(meta["free"], _FREE)
    names, name_pages = file.walk(meta["names"], _NAMES)
    trees = [value for flags, value in zip(names.flags_n, file.values(names)) if flags == _SUBTREE]
    _require([len(tree) for tree in trees] == [_TREE.itemsize], "one name stands for a tree")
    _, named_pages = file.walk(trees[0].view(_TREE)[0], _NAMED)
    unused = [_numbers(value) for value in file.values(free)]
    uses = np.concatenate([np.arange(2), free_pages, name_pages, named_pages, *unused])
    _require(uses.min() >= 0 and uses.max() <= file.last_page, "a page that is used or free is not after the last")
    _require(np.bincount(uses).max() == 1, "a page has one use")


@dataclass(frozen=True)
class _File:
    """The bytes of a file, up to its last page at least."""

    content: npt.NDArray[np.uint8]
    page_bytes: int
    last_page: int

    def walk(self, tree: Fields, form: _Form) -> tuple[_Nodes, Integers]:
        """The nodes of a tree's leaves, and all pages of the tree."""
        _require(tree["flags"] == form.flags, "a tree is of its kind")
        depth = int(tree["depth"])
        pages, lowest_p = tree["root"].reshape(1)[:depth], np.zeros(1, np.uint64)
        visited = []
        for kind in [_BRANCH] * (depth - 1) + [_LEAF]:
            visited.append(pages)
            nodes = self._nodes(pages, kind)
            if form.key_type is not None:
                lowest_p = self._checked_order(nodes, form.key_type, kind, lowest_p)
            pages = nodes.children_n
        _require(not (nodes.flags_n & ~form.leaf_flags).any(), "a value is of a kind that its tree holds")
        overflow = self._overflow_pages(nodes)
        counts = (sum(map(len, visited[:-1])), len(visited[-1]), len(overflow), len(nodes.at_n))
        noted = tuple(int(tree[name]) for name in ("branch_pages", "leaf_pages", "overflow_pages", "entries"))
        _require(counts == noted, f"a tree has the pages and entries that it notes, {noted}, got {counts}")
        return nodes, np.concatenate([*visited, overflow])

    def values(self, leaves: _Nodes) -> list[npt.NDArray[np.uint8]]:
        """The values of leaf nodes, wherever they lie."""
        starts = self._value_starts(leaves).tolist()
        return [self.content[at : at + size] for at, size in zip(starts, leaves.value_bytes_n.tolist())]

    def _nodes(self, pages: Integers, kind: int) -> _Nodes:
        """All nodes of branch or leaf pages, which they must fill without gaps."""
        header = self._headers(pages, kind)
        lower_p, upper_p = (header[name].astype(np.int64) for name in ("lower", "upper"))
        fits = (lower_p > _HEADER_BYTES) & (lower_p <= upper_p) & (upper_p < self.page_bytes)
        _require(fits.all(), "offsets of nodes lie before the nodes")
        count_p = (lower_p - _HEADER_BYTES) // 2
        page_n = np.repeat(np.arange(len(pages)), count_p)
        index_n = np.arange(len(page_n)) - np.repeat(np.cumsum(count_p) - count_p, count_p)
        start_n = pages[page_n] * self.page_bytes
        offset_n = self._read(start_n + _HEADER_BYTES + 2 * index_n, np.dtype("<u2")).astype(np.int64)
        fits_n = (offset_n >= upper_p[page_n]) & (offset_n <= self.page_bytes - _NODE_BYTES)
        _require(fits_n.all(), "a node lies in its page")
        head = self._read(start_n + offset_n, _NODE)
        low_n, high_n, flags_n, key_n = (head[name].astype(np.int64) for name in ("low", "high", "flags", "key_bytes"))
        value_n = low_n | high_n << 16
        stored_n = np.where(flags_n & _ELSEWHERE, _NUMBER.itemsize, value_n) if kind == _LEAF else 0
        node_n = _NODE_BYTES + key_n + stored_n
        filled_p = np.bincount(page_n, node_n + node_n % 2, len(pages))
        _require((filled_p == self.page_bytes - upper_p).all(), "nodes fill their page without gaps")
        return _Nodes(page_n, start_n + offset_n, flags_n, key_n, value_n, value_n | flags_n << 32)

    def _checked_order(
        self, nodes: _Nodes, key_type: np.dtype[Any], kind: int, lowest_p: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        """The keys of the nodes, which ascend and lie in the range that the branches above give to their page.

        lowest_p: the first key that may lie in each page. The first node of a branch page has no key of its own.
        """
        page_n, first_n = nodes.page_n, nodes.first_n & (kind == _BRANCH)
        _require((nodes.key_bytes_n[~first_n] == key_type.itemsize).all(), "a key has the size of its kind")
        key_n = lowest_p[page_n]
        key_n[~first_n] = self._read(nodes.at_n[~first_n] + _NODE_BYTES, key_type)
        _require((key_n[1:] > key_n[:-1]).all(), "keys ascend")
        before_last = page_n < len(lowest_p) - 1
        in_range = (key_n >= lowest_p[page_n]).all() and (key_n[before_last] < lowest_p[page_n[before_last] + 1]).all()
        _require(in_range, "a key lies under the branch that leads to it")
        return key_n

    def _overflow_pages(self, leaves: _Nodes) -> Integers:
        """The pages of all values that do not lie in the leaves."""
        elsewhere_n = (leaves.flags_n & _ELSEWHERE) != 0
        first_v = self._value_starts(leaves)[elsewhere_n] // self.page_bytes
        header = self._headers(first_v, _OVERFLOW)
        count_v = header["lower"].astype(np.int64) | header["upper"].astype(np.int64) << 16
        needed_v = -(-(leaves.value_bytes_n[elsewhere_n] + _HEADER_BYTES) // self.page_bytes)
        fits = (needed_v <= count_v) & (first_v + count_v <= self.last_page + 1)
        _require(fits.all(), "a value fits into its overflow pages")
        index = np.arange(count_v.sum()) - np.repeat(np.cumsum(count_v) - count_v, count_v)
        pages: Integers = np.repeat(first_v, count_v) + index
        return pages

    def _value_starts(self, leaves: _Nodes) -> Integers:
        start_n: Integers = leaves.at_n + _NODE_BYTES + leaves.key_bytes_n
        elsewhere_n = (leaves.flags_n & _ELSEWHERE) != 0
        pages = self._read(start_n[elsewhere_n], _NUMBER)
        _require(((pages > 0) & (pages <= self.last_page)).all(), "an overflow page is a page")
        start_n[elsewhere_n] = pages * self.page_bytes + _HEADER_BYTES
        return start_n

    def _headers(self, pages: Integers, kind: int) -> Fields:
        _require(((pages > 0) & (pages <= self.last_page)).all(), "a tree's pages are not after the last")
        _require(len(np.unique(pages)) == len(pages), "a page is pointed to once")
        header = self._read(pages * self.page_bytes, _PAGE)
        _require((header["number"] == pages.astype(np.uint64)).all(), "a page says its own number")
        _require((header["kind"] == kind).all(), "a page is of the kind that is pointed to")
        return header

    def _read(self, at_n: Integers, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """(N,) values of a type, one from each place."""
        values: npt.NDArray[Any] = self.content[at_n[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
        return values


def _newest(metas: Fields) -> Fields:
    """The one of the two meta pages that the last transaction wrote."""
    transactions = [int(number) for number in metas["transaction"]]
    newest = int(transactions[1] > transactions[0])
    alternate = transactions[newest] in (0, transactions[1 - newest] + 1) and transactions[newest] % 2 == newest
    _require(alternate, "transactions write the two meta pages in turn")
    meta: Fields = metas[newest]
    return meta


def _numbers(value: npt.NDArray[np.uint8]) -> Integers:
    """The pages of one entry of the tree of free pages: their count, and they."""
    _require(len(value) % _NUMBER.itemsize == 0 and len(value) > 0, "an entry of free pages is a list of numbers")
    numbers = value.view(_NUMBER)
    _require(0 <= numbers[0] < len(numbers), "an entry of free pages holds as many as it says")
    return numbers[1 : 1 + numbers[0]]


def _require(holds: bool | np.bool_, rule: str) -> None:
    if not holds:
        raise PageFault(f"in a whole file {rule}")
