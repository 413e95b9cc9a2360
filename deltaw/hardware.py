"""What is here: cores, what they compute fast, how much memory this process may use, the GPU, and the measured rates.

It looks and measures, and sets up this process for it: threads, allocators, bits that repeat. It does not choose a
plan (`deltaw.plan` does).
Linux and macOS; Windows through WSL. The idea that keeps it short: whatever may bound memory, be it the RAM, a cgroup
or a ulimit, is one `_Bound` of (source, bytes, used bytes), and the answers are minima over the list of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltaw.errors import UsageError

# In the order in which they are printed; names as the kernel writes them.
INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("neon", "asimd", "sve", "bf16"),
)
BF16_INSTRUCTION_SETS = {"avx512_bf16", "amx_bf16", "bf16"}
PACKAGES = ("deltaw", "torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf", "bitsandbytes", "peft")
MAC_FLAGS = {"hw.optional.AdvSIMD": "neon", "hw.optional.arm.FEAT_BF16": "bf16"}
MAC_FREE_PAGES = ("vm.page_free_count", "vm.page_purgeable_count", "vm.page_pageable_external_count")
PROC = Path("/proc/self")

PRODUCTS = 128  # that oneDNN remembers prepared, 1 to 3 MB each, where nothing is known of the data
REMEMBERED = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KEPT_BLOCK_BYTES = 32 << 20  # up to which glibc can keep blocks that were freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as glibc numbers them


@dataclass(frozen=True)
class Gpu:
    """The first GPU that torch sees."""

    name: str
    total_bytes: int
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What `look` found; `memory_limit_source` says in words which bound is the smallest.

    `bf16_cpu`: the processor multiplies in bf16 faster than in fp32.
    """

    platform: str
    cpu_name: str
    cores: int
    instruction_sets: tuple[str, ...]
    bf16_cpu: bool
    total_bytes: int
    memory_limit_bytes: int
    memory_limit_source: str
    available_bytes: int
    gpu: Gpu | None
    mps: bool
    versions: dict[str, str | None]


class _Bound(NamedTuple):
    """Something that bounds this process's memory, and how much of it is taken already."""

    source: str
    limit_bytes: int
    used_bytes: int


# ---- reading


def _read(path: Path) -> str:
    """The stripped text of a small file, empty if it is not there or not for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _kib(path: str | Path, key: str) -> int:
    """Bytes of a line like "VmHWM:    2168 kB"; 0 without such a line."""
    for line in _read(Path(path)).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _sysctl(*keys: str) -> dict[str, str]:
    """Values that macOS knows, in one process; keys that this version lacks are left out."""
    found = subprocess.run(["/usr/sbin/sysctl", *keys], capture_output=True, text=True, check=False)
    pairs = (line.partition(": ") for line in found.stdout.splitlines())
    return {key: value for key, _, value in pairs}


def _cgroup_folders(controller: str, proc: Path = PROC) -> list[Path]:
    """The folders of this process's own cgroup and its ancestors, innermost first, that may bound `controller`.

    Both versions of cgroups can be mounted at once. A limit of any ancestor holds, so all of them are returned.
    """
    own: dict[str, str] = {}
    for line in _read(proc / "cgroup").splitlines():  # "4:memory:/path" in version 1, "0::/path" in version 2
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    folders: list[Path] = []
    for line in _read(proc / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, *_, options = right.split()
        if kind in own and (kind == "cgroup2" or controller in options.split(",")):
            root, mount = left.split()[3:5]
            # In a container the mount shows only a part of the tree, often this process's own cgroup as its root.
            inside = os.path.relpath(own[kind], root)
            folder = Path(mount) if inside.startswith("..") else Path(mount, inside)
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
    return folders


# ---- processor


def _cpu_quota(folder: Path) -> float | None:
    """Cores that one cgroup folder allows, e.g. 1.5; None where it sets no quota."""
    quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]  # version 2: "150000 100000" or "max 100000"
    if not period:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")  # version 1, none: -1
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def usable_cores() -> int:
    """The number of cores this process may keep busy: its affinity, cut to the cgroup's CPU quota, rounded up."""
    num_cores = os.cpu_count() or 1
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _cgroup_folders("cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, math.ceil(min([float(num_cores), *quotas])))


def _first_processor() -> dict[str, str]:
    """The first block of /proc/cpuinfo; no more is read, because hundreds of cores make it a slow file."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, colon, value = line.partition(":")
                if not colon:
                    break
                fields[key.strip()] = value.strip()
    return fields


def _cpu_name_maker_and_flags() -> tuple[str, str, set[str]]:
    """The processor's name, its maker, and the features that the system reports, in the names that Linux uses."""
    if sys.platform == "darwin":
        found = _sysctl("machdep.cpu.brand_string", "machdep.cpu.leaf7_features", *MAC_FLAGS)
        flags = {flag for key, flag in MAC_FLAGS.items() if found.get(key) == "1"}
        flags |= set(found.get("machdep.cpu.leaf7_features", "").lower().split())  # Macs with Intel processors
        return found.get("machdep.cpu.brand_string", platform.machine()), "", flags
    fields = _first_processor()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), fields.get("vendor_id", ""), flags  # aarch64 has neither


def processor() -> list[str]:
    """The processor's name and its features, in order: what code that was compiled for it depends on."""
    name, _, flags = _cpu_name_maker_and_flags()
    return [name, *sorted(flags)]


def multiplies_fast_in_bf16(maker: str, flags: Collection[str]) -> bool:
    """Whether a processor with these features multiplies in bf16 faster than in fp32.

    Intel's cores with AMX are fast in bf16 through AMX alone. Where a virtual machine hides it, the product of AVX-512
    that is left has half the rate of fp32: 169 against 324 GFLOP/s on two cores. Older ones, which never had AMX, are
    told from them by lacking avx512_fp16.
    """
    amx_hidden = maker == "GenuineIntel" and "avx512_fp16" in flags and "amx_bf16" not in flags
    return bool(BF16_INSTRUCTION_SETS & set(flags)) and not amx_hidden


def emulates_bf16(machine: Machine) -> bool:
    """Whether torch has no product in bf16 on this processor at all, so that every operand is converted."""
    return machine.platform.startswith("macOS") or not BF16_INSTRUCTION_SETS & set(machine.instruction_sets)


# ---- memory


def _ram() -> _Bound:
    """Main memory; used is what could not be had without swapping."""
    if sys.platform == "darwin":
        found = _sysctl("hw.memsize", "hw.pagesize", *MAC_FREE_PAGES)
        total_bytes = int(found["hw.memsize"])
        free_bytes = sum(int(found.get(key, 0)) for key in MAC_FREE_PAGES) * int(found["hw.pagesize"])
        return _Bound("RAM", total_bytes, max(0, total_bytes - free_bytes))
    total_bytes, available_bytes = (_kib("/proc/meminfo", key) for key in ("MemTotal", "MemAvailable"))
    return _Bound("RAM", total_bytes, total_bytes - available_bytes)


def _ulimits() -> Iterator[_Bound]:
    """The soft limits on address space and on data, where they are set; both count what is mapped, touched or not."""
    limits = (
        ("ulimit -v (RLIMIT_AS)", resource.RLIMIT_AS, "VmSize"),
        ("ulimit -d (RLIMIT_DATA)", resource.RLIMIT_DATA, "VmData"),
    )
    for source, which, used_key in limits:
        soft_bytes, _ = resource.getrlimit(which)
        if soft_bytes != resource.RLIM_INFINITY:
            yield _Bound(source, soft_bytes, _kib(PROC / "status", used_key))


def _file_cache_bytes(folder: Path) -> int:
    """Cached file pages of a cgroup: they count as its usage, and are given back when memory is asked for."""
    fields = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
    # Version 1 has fields without "total_" as well, which leave out the descendants; version 2 includes them.
    prefix = "total_" if "total_inactive_file" in fields else ""
    return sum(int(fields.get(f"{prefix}{key}", 0)) for key in ("active_file", "inactive_file"))


def _cgroup_bounds(folders: list[Path]) -> Iterator[_Bound]:
    """What the memory controller allows in each folder; above memory.high a process is stalled, so it counts too."""
    for folder in folders:
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _read(folder / name)
            if limit.isdecimal() and used.isdecimal():
                yield _Bound(f"cgroup ({folder / name})", int(limit), max(0, int(used) - _file_cache_bytes(folder)))


# ---- the whole machine


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_gpu() -> Gpu | None:
    """The GPU that torch calls cuda:0, of NVIDIA or AMD."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(found.name, found.total_memory, (found.major, found.minor), bf16)


def free_gpu_bytes() -> int:
    """What of the first GPU nobody holds, but for what torch keeps here for the next tensor."""
    gc.collect()  # a model and its hooks refer to each other in circles
    kept = torch.cuda.memory_reserved(0) - torch.cuda.memory_allocated(0)
    return int(torch.cuda.mem_get_info(0)[0] + kept)


def look() -> Machine:
    """What is here, in a few milliseconds; a GPU adds the time that its driver takes to start."""
    cpu_name, maker, flags = _cpu_name_maker_and_flags()
    ram = _ram()
    bounds = [ram, *_cgroup_bounds(_cgroup_folders("memory")), *_ulimits()]
    smallest = min(bounds, key=lambda bound: bound.limit_bytes)
    return Machine(
        platform=platform.platform(),
        cpu_name=cpu_name,
        cores=usable_cores(),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        bf16_cpu=multiplies_fast_in_bf16(maker, flags),
        total_bytes=ram.limit_bytes,
        memory_limit_bytes=smallest.limit_bytes,
        memory_limit_source=smallest.source,
        available_bytes=max(0, min(bound.limit_bytes - bound.used_bytes for bound in bounds)),
        gpu=_first_gpu(),
        mps=torch.backends.mps.is_available(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    )


# ---- choices that follow from it


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes cuda, else mps, else cpu.

    Raises UsageError, naming what is available, if `name` is unknown or not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device, is_here in here.items() if is_here]
    if name == "auto":
        return torch.device(available[0])
    if name not in here:
        raise UsageError(f"device {name!r} is unknown; choose auto, {', '.join(here)}")
    if name not in available:
        hint = f"hint: use --device auto; torch {torch.__version__} finds here: {', '.join(available)}"
        raise UsageError(f"device {name!r} is not available on this machine\n{hint}")
    return torch.device(name)


def compute_dtype(device: torch.device, machine: Machine) -> torch.dtype:
    """bf16 where `device` is fast in it, else fp32; never fp16, whose range makes gradients overflow.

    So a GPU older than Ampere computes in fp32: it would be faster in fp16, but needs loss scaling, which deltaw has
    not. A CPU without bf16 instructions converts every operand and is many times slower in bf16 than in fp32, and one
    whose AMX is hidden is half as fast in it (`multiplies_fast_in_bf16`). On
    macOS the flag speaks for the GPU of the same chip; torch's CPU path there has no fast bf16 product.
    """
    if device.type == "cuda":
        fast = machine.gpu is not None and machine.gpu.bf16
    elif device.type == "mps":
        fast = machine.bf16_cpu
    else:
        fast = machine.bf16_cpu and not machine.platform.startswith("macOS")
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For thousands of small factorisations: threads gain nothing there, and wait for each other on a busy machine."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def set_threads(num_threads: int | None) -> int:
    """Let torch compute with so many threads; None: with those it has, at most the usable cores. Returns the number.

    torch itself counts the machine's cores and knows no cgroup quota. Raises UsageError below 1.
    """
    chosen = min(torch.get_num_threads(), usable_cores()) if num_threads is None else num_threads
    if chosen < 1:
        raise UsageError(f"threads must be at least 1, not {chosen}")
    torch.set_num_threads(chosen)
    return chosen


@functools.cache
def tune_memory(products: int = PRODUCTS) -> None:
    """Bounds what oneDNN remembers, and lets the C library keep what was freed for the next step. Before any product.

    oneDNN and torch's layer above it keep a prepared product, with its memory, for each of the last 1,024 shapes; as
    every batch has new ones, a run grew by 22 MB a step. `products` of each hold the peak. The first call in a process
    decides; what the environment says already stays.

    glibc gives large blocks back and has them zeroed anew; kept, a step of dense rows takes 190,000 page faults less
    and the high-water mark stays what it was. 32 MB is the largest size that it may keep.
    """
    for name in ("LRU_CACHE_CAPACITY", REMEMBERED):
        os.environ.setdefault(name, str(products))
    _mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    _mallopt(_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """While inside, the C library gives blocks above 1 MB back to the system when they are freed.

    For work that keeps one of several large blocks which it makes: in one heap, each would lie in a hole that the next
    ones needed, and 0.8 GB of merged weights took 1.6.
    """
    _mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        _mallopt(_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)


def _mallopt(parameter: int, value: int) -> None:
    """Sets a parameter of glibc's malloc, where that is the C library."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(parameter, value)


@functools.cache
def tune_gpu() -> None:
    """Settings of torch for CUDA that one process needs once, before the first product.

    cuDNN's attention prepares a plan for every new length of a document, which takes longer than the attention; sums of
    products are kept in fp32; and cuBLAS gets a workspace of its own, without which its bits may change (`repeatable`).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextlib.contextmanager
def repeatable(device: torch.device, *, strict: bool) -> Iterator[None]:
    """While inside, a GPU gives the same bits each time; a processor does anyway. Only `strict` binds the attention.

    Fused attention adds up its gradients in whatever order blocks end, unless torch is told to refuse what has no
    repeatable form. So that is for the kernels of deltaw, whose parts all have one; a model's own modules may have not.
    """
    if device.type != "cuda":
        yield
        return
    usual = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    search: Any = torch.utils.deterministic
    filled, search.fill_uninitialized_memory = search.fill_uninitialized_memory, False  # it costs time
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise UsageError(
            "This process multiplied on the GPU before deltaw could set CUBLAS_WORKSPACE_CONFIG, or it is set to "
            f"{os.environ.get('CUBLAS_WORKSPACE_CONFIG')!r}: set it to :4096:8 before Python starts."
        ) from error
    finally:
        torch.use_deterministic_algorithms(usual[0], warn_only=usual[1])
        search.fill_uninitialized_memory = filled


def prepares_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies there, which prepares a product for each new shape."""
    return device.type == "cpu" and dtype == torch.bfloat16


def remembered_products() -> int:
    """How many prepared products oneDNN keeps in this process, from `tune_memory` or by the environment."""
    given = os.environ.get(REMEMBERED, "")
    return int(given) if given.isdecimal() else PRODUCTS


def give_memory_back() -> None:
    """Has the C library return what it kept of freed memory: before a phase of a run that needs memory of its own.

    Nothing for every step: it takes 30 ms itself, and pages that are needed again are zeroed anew (dev/LOG.md).
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


# ---- measurements


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_calls(call: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Seconds that `num_calls` take together, until the device has really finished."""
    _synchronize(device)
    start_seconds = time.perf_counter()
    for _ in range(num_calls):
        call()
    _synchronize(device)
    return time.perf_counter() - start_seconds


def measure_gemm(
    dtype: torch.dtype,
    m: int = 1024,
    k: int = 576,
    n: int = 1536,
    seconds: float = 0.4,
    device: str | torch.device = "cpu",
) -> float:
    """The rate of an (m, k) by (k, n) matrix product in GFLOP/s, 2mkn operations each, as the median of many timings.

    The default shape is one of SmolLM2-135M's with 1,024 tokens. At least three timings are taken, however slow.
    """
    place = torch.device(device)
    # A generator of its own, so that measuring does not change the random numbers of a run.
    random = torch.Generator().manual_seed(0)
    a_MK, b_KN = (torch.randn(shape, generator=random).to(place, dtype) for shape in ((m, k), (k, n)))
    out_MN = torch.empty(m, n, dtype=dtype, device=place)
    multiply = functools.partial(torch.mm, a_MK, b_KN, out=out_MN)
    time_calls(multiply, 1, place)  # packs weights, fills caches, starts threads and kernels
    # Fast devices do several products per timing, so that the clock and the launch weigh little.
    num_calls = max(1, math.ceil(2e-3 / time_calls(multiply, 1, place)))
    timings: list[float] = []
    while len(timings) < 3 or sum(timings) < seconds:
        timings.append(time_calls(multiply, num_calls, place))
    return 2 * m * k * n * num_calls / statistics.median(timings) / 1e9


def rss_bytes() -> int:
    """The main memory that this process holds now; its peak so far on a system that does not tell."""
    status = PROC / "status"
    return _kib(status, "VmRSS") if status.exists() else peak_rss_bytes()


def file_rss_bytes() -> int:
    """How much of `rss_bytes` are pages of files, which the system can take back; 0 where it does not tell."""
    status = PROC / "status"
    return _kib(status, "RssFile") if status.exists() else 0


def peak_rss_bytes() -> int:
    """The most main memory that this process has held so far, mapped files that were touched included.

    On Linux this is VmHWM. ru_maxrss would lie there: it survives exec, so that a small program started by a large
    one reports the memory of its parent. The kernel counts pages per core, so a few hundred KiB are uncertain.
    """
    if (status := PROC / "status").exists():
        return _kib(status, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
