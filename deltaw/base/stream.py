"""Frozen weights in mapped files: the next block is read while the present one computes, what was used is let go.

safetensors maps its files, so an opened base takes address space and no memory until a weight is read, and the system
may take a clean page back at any time. Left alone it reads a page when a product already waits for it, and drops the
wrong ones. A Pager knows the order: up through the blocks, down again in backward. It learns where the run is from the
seam to weights (deltaw/adapter/weight.py), so no kernel knows of it and no number depends on it.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.adapter.weight import ON_READ, stored_tensors
from deltaw.errors import BaseError
from deltaw.hardware import look

MAPPED_SHARE = 0.9  # of the blocks, so that streaming them makes sense
_PAGE = mmap.PAGESIZE
_WILL_NEED, _DO_NOT_NEED, _PAGE_OUT, _POPULATE_READ = 3, 4, 21, 22  # as Linux numbers them
CACHED_SHARE = 0.5  # of the memory there is, up to which the system may keep what the run has let go
_MEMORY_NAMES = ("/dev/", "/memfd:", "/SYSV")  # mapped like files, and in memory alone
_Range = tuple[int, int]


class Pager:
    """Reads and drops the pages of sections of weights that are used one after the other, up and down.

    Of all sections, the one in use and the one that comes next are in memory. What is dropped leaves this process;
    with `evict` the system's cache too: where not all fits, it would keep used pages and drop those just read ahead.
    """

    def __init__(self, sections: Sequence[Sequence[_Range]], *, evict: bool = False) -> None:
        self.sections = sections
        self.current, self.held = -1, set[int]()
        # On files of others the first does nothing.
        self._drop = (_PAGE_OUT, _DO_NOT_NEED) if evict else (_DO_NOT_NEED,)
        self._asked: queue.SimpleQueue[tuple[set[int], int | None] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="deltaw-pager", daemon=True)
        self._reader.start()

    def enter(self, number: int) -> None:
        """A weight of this section is about to be read."""
        if number == self.current:
            return
        last = len(self.sections) - 1
        up = (number > self.current or number == 0) and number != last  # the way turns at both ends
        following = min(number + 1, last) if up else max(number - 1, 0)
        dropped, wanted = self.held - {number, following}, following if following not in self.held else None
        self.held, self.current = {number, following}, number
        self._asked.put((dropped, wanted))

    def close(self) -> None:
        """Lets every section go and ends the reading thread."""
        self._asked.put(None)
        self._reader.join()
        for ranges in self.sections:
            _advise(ranges, _DO_NOT_NEED)

    def _read(self) -> None:
        while (asked := self._asked.get()) is not None:
            dropped, wanted = asked
            for number in dropped - self.held:
                for advice in self._drop:
                    _advise(self.sections[number], advice)
            # An older system reads ahead without putting the pages in place.
            if wanted in self.held and not _advise(self.sections[wanted], _POPULATE_READ):
                _advise(self.sections[wanted], _WILL_NEED)


def may_stream(device: torch.device) -> bool:
    """Whether a base on this device can be streamed: Linux alone says where files are mapped."""
    return device.type == "cpu" and sys.platform == "linux"


def stream(model: Any) -> Pager:
    """Has a Pager follow every read of the model's decoder blocks and, where it lies in a file, of its output head.

    Raises BaseError where weights of blocks are no views of a mapped file: those could not be read again.
    """
    blocks = blocks_of(model)
    sections, files = [*blocks, model.get_output_embeddings()], _mapped_files()
    ranges = [_ranges(stored_tensors(section), files) for section in sections]
    mapped = sum(stop - start for section in ranges[: len(blocks)] for start, stop in section)
    if mapped < MAPPED_SHARE * sum(tensor.nbytes for block in blocks for tensor in stored_tensors(block)):
        raise BaseError(
            "This base cannot be streamed: its weights are not used as they stand in its files. Experts that lie apart "
            "in the files cannot be streamed yet, nor can layers of other kinds than Linear in another dtype than is "
            "computed in."
        )
    pager = Pager(ranges, evict=mapped > CACHED_SHARE * look().memory_limit_bytes)
    for number, section in enumerate(sections):
        for module in section.modules():
            module.__dict__[ON_READ] = partial(pager.enter, number)
    return pager


def follow_modules(model: Any) -> list[RemovableHandle]:
    """Tells the Pager also of sections that run by their own modules, whose weights no kernel asks for.

    Returns what ends it.
    """

    def before(module: nn.Module, _args: Any) -> None:
        module.__dict__[ON_READ]()

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda _: module.__dict__[ON_READ]())

    sections = (*blocks_of(model), model.get_output_embeddings())
    handles = [section.register_forward_pre_hook(before) for section in sections]
    return [*handles, *(section.register_forward_hook(after) for section in sections)]


def release(tensors: Iterable[Tensor]) -> None:
    """Lets the pages of mapped tensors go; they are read again when they are needed."""
    _advise(_ranges(tensors, _mapped_files()), _DO_NOT_NEED)


def blocks_of(model: Any) -> Sequence[nn.Module]:
    """The decoder blocks of a model, in the order in which they compute; none where there is no list of them."""
    count = int(model.config.get_text_config().num_hidden_layers)
    lists: list[Any] = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    found: Sequence[nn.Module] = next((blocks for blocks in lists if len(blocks) == count), ())
    return found


# -- pages ------------------------------------------------------------------------------------------------------------


def _ranges(tensors: Iterable[Tensor], files: Sequence[_Range]) -> list[_Range]:
    """The pages of those tensors that lie in mapped files, what touches joined.

    Only those: the same advice about other memory would erase it. A file's mapping has whole pages to itself.
    """
    found: list[_Range] = []
    for start, size in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors):
        if not any(first <= start and start + size <= last for first, last in files):
            continue
        first, last = start // _PAGE * _PAGE, -(-(start + size) // _PAGE) * _PAGE
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def _mapped_files() -> list[_Range]:
    """Where files are mapped in this process; nowhere on a system that does not tell.

    By name, files of weights could not be told: those of the hub's cache are links to files that are named by digests.
    """
    maps = Path("/proc/self/maps")
    found: list[_Range] = []
    for line in maps.read_text("utf-8", errors="replace").splitlines() if maps.exists() else ():
        place, _, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" or not name or name[0].startswith(_MEMORY_NAMES):
            continue
        start, stop = (int(border, 16) for border in place.split("-"))
        if found and start == found[-1][1]:  # the system may cut one mapping in several
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _advise(ranges: Sequence[_Range], advice: int) -> bool:
    """Whether the system took the advice about all of the pages."""
    return all(
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice) == 0 for start, stop in ranges
    )
