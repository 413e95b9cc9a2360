"""What deltaw.hardware says agrees with the kernel: real cgroups, real ulimits, the processor's own list."""

import json
import os
import platform
import resource
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cgroups import new_cgroup, own_cgroup

from deltaw import hardware
from deltaw.errors import UsageError

GIB = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


@pytest.fixture(scope="module")
def machine():
    return hardware.look()


def look_in_child(preparation):
    """What a fresh process sees, after it ran `preparation`, as a dictionary."""
    report = """
        import dataclasses, json, resource
        from deltaw import hardware
        seen = dataclasses.asdict(hardware.look())
        seen["peak_rss_bytes"] = hardware.peak_rss_bytes()
        seen["ru_maxrss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(seen))
    """
    code = preparation + "\n" + textwrap.dedent(report)
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.fixture(scope="module")
def child():
    """(what a child of a large process saw, its cgroup if we may make one); one child, because torch loads slowly."""
    names = ("memory.max", "memory.limit_in_bytes")
    ballast = np.ones(400 << 20, dtype=np.uint8)
    with new_cgroup("memory", {names: str(2 * GIB)}, {names: str(3 * GIB)}) as inner:
        join = f"import os, pathlib; pathlib.Path({str(inner)!r}, 'cgroup.procs').write_text(str(os.getpid()))"
        seen = look_in_child(join if inner else "")
    return {"ballast_bytes": ballast.nbytes, **seen}, inner


@linux
def test_the_smallest_limit_of_the_own_cgroup_and_its_ancestors_is_the_memory_limit(child):
    seen, inner = child
    if inner is None:
        pytest.skip("may not make a memory cgroup here")
    assert seen["memory_limit_bytes"] == 2 * GIB
    assert seen["memory_limit_source"].startswith(f"cgroup ({inner.parent}/memory.")
    # What the child itself took is gone; the files it read are cache, which would be given back.
    assert 2 * GIB - seen["peak_rss_bytes"] <= seen["available_bytes"] < 2 * GIB


@linux
def test_a_large_parent_does_not_raise_the_peak_of_its_child(child):
    seen, _ = child
    # The right half is the reason for VmHWM: the other counter is the parent's.
    assert seen["peak_rss_bytes"] < seen["ballast_bytes"] < seen["ru_maxrss_bytes"]


@linux
def test_a_cpu_quota_bounds_the_cores():
    with new_cgroup("cpu", {("cpu.max", "cpu.cfs_quota_us"): "50000"}) as folder:
        if folder is None:
            pytest.skip("may not make a cpu cgroup here")
        before = own_cgroup("cpu")
        try:
            (folder / "cgroup.procs").write_text(str(os.getpid()))
            assert hardware._cpu_quota(folder) == 0.5
            assert hardware.usable_cores() == 1
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()))


@linux
@pytest.mark.parametrize(("name", "source"), [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")])
def test_a_ulimit_below_all_other_bounds_is_the_memory_limit(machine, name, source):
    which = getattr(resource, name)
    soft_bytes, hard_bytes = resource.getrlimit(which)
    limit_bytes = machine.memory_limit_bytes - (64 << 20)
    resource.setrlimit(which, (limit_bytes, hard_bytes))
    try:
        seen = hardware.look()
    finally:
        resource.setrlimit(which, (soft_bytes, hard_bytes))
    assert (seen.memory_limit_bytes, seen.memory_limit_source) == (limit_bytes, f"{source} ({name})")
    assert seen.available_bytes < limit_bytes - (100 << 20)  # python and torch alone map more than this


def test_cgroups_of_version_2_are_found_in_a_container_and_outside(tmp_path):
    (tmp_path / "cgroup").write_text("0::/docker/abc/job\n")
    mount = tmp_path / "mount"
    line = "31 23 0:28 {} {} rw,nosuid shared:9 - cgroup2 cgroup rw\n"

    (tmp_path / "mountinfo").write_text(line.format("/", mount))
    names = [str(folder.relative_to(mount)) for folder in hardware._cgroup_folders("memory", tmp_path)]
    assert names == ["docker/abc/job", "docker/abc", "docker", "."]

    (tmp_path / "mountinfo").write_text(line.format("/docker/abc", mount))
    assert hardware._cgroup_folders("memory", tmp_path) == [mount / "job", mount]

    (tmp_path / "mountinfo").write_text(line.format("/elsewhere", mount))
    assert hardware._cgroup_folders("memory", tmp_path) == [mount]


def test_cgroup_files_of_version_2_are_understood(tmp_path):
    for name, text in {
        "memory.max": "max",
        "memory.high": "5000",
        "memory.current": "3000",
        "cpu.max": "150000 100000",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 300\ninactive_file 700\n")
    assert list(hardware._cgroup_bounds([tmp_path])) == [(f"cgroup ({tmp_path}/memory.high)", 5000, 2000)]
    assert hardware._cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware._cpu_quota(tmp_path) is None


def test_looking_is_quick_and_plausible(machine):
    times = []
    for _ in range(3):
        start_seconds = time.perf_counter()
        assert hardware.look().cores == machine.cores
        times.append(time.perf_counter() - start_seconds)
    assert machine.gpu is not None or min(times) < 0.05  # a GPU's driver starts at its own pace
    assert 1 <= machine.cores <= os.cpu_count()
    assert 0 < machine.available_bytes < machine.memory_limit_bytes <= machine.total_bytes
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["python"] == platform.python_version()


@linux
def test_bf16_flag_agrees_with_cpuinfo(machine):
    words = set(Path("/proc/cpuinfo").read_text().split())
    hidden = {"GenuineIntel", "avx512_fp16"} <= words and "amx_bf16" not in words
    assert machine.bf16_cpu == bool(words & {"avx512_bf16", "amx_bf16", "bf16"} and not hidden)
    assert hardware.emulates_bf16(machine) == (not words & {"avx512_bf16", "amx_bf16", "bf16"})
    assert set(machine.instruction_sets) == words & set(hardware.INSTRUCTION_SETS)


@pytest.mark.parametrize(
    ("maker", "flags", "fast"),
    [
        ("AuthenticAMD", {"avx512_bf16", "avx512_fp16"}, True),
        ("GenuineIntel", {"avx512_bf16", "avx512_fp16", "amx_bf16"}, True),
        ("GenuineIntel", {"avx512_bf16", "avx512_fp16"}, False),  # AMX is hidden
        ("GenuineIntel", {"avx512_bf16"}, True),  # from before AMX
        ("GenuineIntel", {"avx512f", "avx512_fp16"}, False),
        ("", {"asimd", "bf16"}, True),
        ("", {"asimd"}, False),
    ],
)
def test_a_processor_is_fast_in_bf16_where_it_has_a_product_that_is(maker, flags, fast):
    assert hardware.multiplies_fast_in_bf16(maker, flags) == fast


def test_compute_dtype_is_bf16_only_where_it_is_computed(machine):
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    old = hardware.Gpu("Turing", 16 * GIB, (7, 5), bf16=False)
    new = hardware.Gpu("Hopper", 80 * GIB, (9, 0), bf16=True)
    linux_bf16 = replace(machine, platform="Linux-6.8", bf16_cpu=True, gpu=new)
    assert hardware.compute_dtype(cpu, linux_bf16) == hardware.compute_dtype(cuda, linux_bf16) == torch.bfloat16
    assert hardware.compute_dtype(cpu, replace(linux_bf16, bf16_cpu=False)) == torch.float32
    assert hardware.compute_dtype(cuda, replace(linux_bf16, gpu=old)) == torch.float32
    mac = replace(linux_bf16, platform="macOS-15.0-arm64", gpu=None)
    assert (hardware.compute_dtype(cpu, mac), hardware.compute_dtype(mps, mac)) == (torch.float32, torch.bfloat16)


def test_compute_dtype_is_the_faster_one_here(machine):
    dtypes = (torch.float32, torch.bfloat16)
    size = (256,) * 3 if hardware.emulates_bf16(machine) else (1024, 576, 1536)
    # In turns, and the best of each, so that a busy machine does not decide.
    turns = [{dtype: hardware.measure_gemm(dtype, *size, seconds=0.05) for dtype in dtypes} for _ in range(3)]
    rates = {dtype: max(turn[dtype] for turn in turns) for dtype in dtypes}
    assert rates[hardware.compute_dtype(torch.device("cpu"), machine)] > 0.7 * max(rates.values())


def test_measuring_leaves_the_random_numbers_of_a_run_alone():
    state = torch.get_rng_state()
    hardware.measure_gemm(torch.float32, m=8, k=8, n=8, seconds=0.0)
    assert torch.equal(state, torch.get_rng_state())


@linux
def test_peak_rss_grows_by_what_is_touched_and_stays():
    # Other tests may have held more before, so as much is touched as is needed to pass their peak.
    before = hardware.peak_rss_bytes()
    held = hardware._kib("/proc/self/status", "VmRSS")
    touched = np.ones(before - held + (200 << 20), dtype=np.uint8)
    grown = hardware.peak_rss_bytes() - before
    del touched
    assert 190 << 20 < grown < 260 << 20
    assert hardware.peak_rss_bytes() == pytest.approx(before + grown, abs=4 << 20)  # the kernel's own uncertainty


def test_a_device_that_is_not_here_is_refused_with_what_is():
    assert hardware.choose_device("cpu") == torch.device("cpu")
    assert hardware.choose_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UsageError, match="'tpu' is unknown; choose auto, cuda, mps, cpu"):
        hardware.choose_device("tpu")
    for name, is_here in {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items():
        if not is_here:
            with pytest.raises(UsageError, match=rf"'{name}' is not available.*\n.*finds here: .*cpu"):
                hardware.choose_device(name)


def test_threads_are_set_to_what_is_usable():
    before = torch.get_num_threads()
    try:
        assert hardware.set_threads(2) == torch.get_num_threads() == 2
        assert hardware.set_threads(1) == torch.get_num_threads() == 1
        assert hardware.set_threads(None) == torch.get_num_threads() == 1  # no more than torch has
        with pytest.raises(UsageError, match="at least 1, not 0"):
            hardware.set_threads(0)
    finally:
        torch.set_num_threads(before)


@linux
def test_memory_that_was_freed_is_given_back():
    code = """
        from deltaw import hardware
        hardware.tune_memory()
        blocks = [bytearray(1 << 16) for _ in range(4000)]
        held = blocks[-1]
        del blocks
        before = hardware.rss_bytes()
        hardware.give_memory_back()
        print(before - hardware.rss_bytes())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 << 20
