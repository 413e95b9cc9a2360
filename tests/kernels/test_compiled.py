"""The compiled passes against what stands beside them in torch, and what happens where none can be made."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from libraries import library_for
from torch import nn

from deltaw.base.builtin import cache_folder
from deltaw.kernels import Norm, Span, compiled, continued_spans, spans_of
from deltaw.kernels.loss import _losses_and_slopes
from deltaw.kernels.pointwise import gated, gated_backward, rms_norm, rms_norm_backward, rotate
from deltaw.kernels.tiles import attend, attend_backward, parts_of, tiles_of

# Of the largest number: what two orders of an fp32 sum may differ by; and in bf16, one unit of the last of 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
# By which attention as a whole may be off; in bf16, rounding what comes out is 1.7e-3.
ATTENTION_OFF = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Attention as a whole in all ways in which its products are made: what else the library is compiled for is no matter.
WHOLE = pytest.mark.parametrize(
    ("library", "dtype"),
    [
        ("compiled", torch.float32),
        ("compiled without AVX-512", torch.float32),
        ("compiled", torch.bfloat16),
        ("compiled without AMX", torch.bfloat16),
    ],
    indirect=["library"],
    ids=str,
)
# Rows of 1 to 3 numbers leave every vector half empty; the last has enough of them for two threads.
SIZES = pytest.mark.parametrize("size", [(1, 1), (3, 7), (5, 64), (2, 129), (300, 192)], ids=str)


def norm_of(width: int, offset: float = 1.0) -> Norm:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(width), requires_grad=False)
    return Norm(layer, 1e-5, offset)


def agree(found, wanted, dtype, least=0.0) -> None:
    """No number of the two ways differs by more than the tolerance, of the largest or of `least`; nor do all together."""
    found, wanted = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        apart, size = (a.float() - b.float()).abs(), b.float().abs()
        assert float(apart.max()) <= TOLERANCE[dtype] * max(least, float(size.max()))
        assert float(apart.norm()) <= TOLERANCE[dtype] * max(least, float(size.norm()))


def both(function, *arguments):
    """What the library makes of it, and torch."""
    assert compiled.in_use()
    found = function(*arguments)
    with compiled.left_out():
        assert not compiled.in_use()
        return found, function(*arguments)


@DTYPES
@SIZES
def test_norms_and_gates_are_those_of_torch(library, size, dtype):
    x, d, u = (torch.randn(size).mul(3).to(dtype) for _ in range(3))
    norm = norm_of(size[1])
    for function, given in (
        *((rms_norm, (x, norm)), (rms_norm_backward, (d, x, norm)), (rms_norm_backward, (d, x, norm, u))),
        *((gated, (x, u, "silu")), (gated_backward, (d, x, u, "silu"))),
    ):
        agree(*both(function, *given), dtype, least=1.0)  # a row of one number is its own norm, with a slope near 0


@DTYPES
@pytest.mark.parametrize(("width", "turned"), [(8, 8), (12, 8), (64, 64), (6, 2)], ids=str)
def test_rotations_are_those_of_torch_also_of_a_part_of_a_head(library, width, turned, dtype):
    x = torch.randn(70, 5, width).to(dtype)
    angles = torch.rand(70, turned // 2) * 6
    agree(*both(rotate, x, angles.cos(), angles.sin()), dtype)


def test_what_is_not_contiguous_is_read_as_it_is(library):
    x, d = torch.randn(2, 12, 9, dtype=torch.float32).transpose(1, 2)
    norm = norm_of(12)
    assert not x.is_contiguous()
    agree(*both(rms_norm_backward, d, x, norm), torch.float32)
    agree(*both(gated, x, d, "silu"), torch.float32)
    heads = torch.randn(3, 7, 8).transpose(0, 1)
    agree(*both(rotate, heads, torch.rand(7, 4), torch.rand(7, 4)), torch.float32)


def test_a_sigmoid_is_exact_to_rounding_from_end_to_end(library):
    """silu(x)/x over the whole range of its exp, against fp64."""
    x = torch.cat([torch.linspace(-120, 120, 400_001), torch.tensor([-0.0, 1e-30, -1e-30, 3e38, -3e38])])
    found = compiled.gated(x, torch.ones_like(x))
    exact = (x.double() * torch.sigmoid(x.double())).float()
    torch.testing.assert_close(found, exact, rtol=2.5e-7, atol=1e-34)  # below e^-85 it is 0
    rounded = x.bfloat16()
    found = compiled.gated(rounded, torch.ones_like(rounded))
    exact = rounded.double() * torch.sigmoid(rounded.double())
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 * 1.01, atol=1e-34)  # half of the last of 8 bits


@DTYPES
def test_what_is_not_a_number_stays_none(library, dtype):
    """A run stops at a gradient that is no number: no pass may lose it on the way."""
    x = torch.randn(4, 40).to(dtype)
    x[2, 3] = math.nan
    y, norm = torch.ones_like(x), norm_of(40)
    given = ((rms_norm, (x, norm)), (rms_norm_backward, (x, y, norm)), (rms_norm_backward, (y, x, norm)))
    for function, arguments in given:
        assert function(*arguments).isnan().any(1).tolist() == [False, False, True, False]
    for arguments in ((x, y, "silu"), (y, x, "silu")):
        assert gated(*arguments).isnan().sum() == 1
    for out in gated_backward(x, y, y, "silu")[:2]:
        assert out.isnan().sum() == 1
    losses, slopes = _losses_and_slopes(x, torch.zeros(4, dtype=torch.long), torch.ones(4))
    assert losses.isnan().tolist() == [False, False, True, False] and slopes[2].isnan().all()
    for width in (8, 32):
        q, k, v, d = (torch.randn(9, 1, width).to(dtype) for _ in range(4))
        given = (spans_of([0, 4, 9]), 0.3, None, None)
        for number, bad in enumerate((q, k, v, d)):
            bad = bad.clone()
            bad[1, 0, 2] = math.nan
            q_, k_, v_, d_ = (bad if n == number else x for n, x in enumerate((q, k, v, d)))
            outs = [attend(q_, k_, v_, *given), *attend_backward(d_, q_, k_, v_, *given)]
            assert any(out[:4].isnan().any() for out in outs) and not any(out[4:].isnan().any() for out in outs)


@DTYPES
@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize("continued", [False, True], ids=["", "continued"])
def test_attention_over_tiles_of_every_kind_is_that_of_torch(library, continued, window, dtype):
    """Documents side by side, whole ones, one in parts; and all but the first behind rows in common."""
    spans = continued_spans(*rows_of((1, 33, 6, 260, 260, 40, 256, 1, 700), 3 if continued else None))
    assert {tile.count > 1 for tile in tiles_of(spans, window)} == {True, False}
    assert compiled.in_use()
    case = (spans, 6, 2, 16, window, dtype)
    agree(attention(*case), in_tiles(*case), dtype)


@WHOLE
@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize("continued", [False, True], ids=["", "continued"])
@pytest.mark.parametrize(
    ("width", "heads", "key_heads"), [(32, 6, 2), (64, 3, 3), (96, 5, 1), (128, 8, 4), (256, 2, 1)], ids=str
)
def test_attention_as_a_whole_is_near_to_the_exact_one_and_in_bf16_nearer_than_in_tiles(
    library, width, heads, key_heads, continued, window, dtype
):
    """Of documents whole and in parts, of one row and of many keys, with rows of none behind them."""
    lengths = (1, 33, 6, 260, 64, 1, 700, 1100) if width < 256 else (40, 20, 30, 300, 700)
    spans = continued_spans(*rows_of(lengths, 3 if continued else None))
    require_attention(width, dtype)
    is_near(spans, heads, key_heads, width, window, dtype)


@WHOLE
def test_attention_as_a_whole_to_thousands_of_keys(library, dtype):
    """So many that a block is one head of 32 queries, with more scores than are meant to stay in the cache."""
    require_attention(32, dtype)
    for length in (2300, 4300):
        is_near(spans_of([0, length]), 2, 1, 32, None, dtype)


@WHOLE
def test_attention_as_a_whole_takes_fewer_parts_at_a_time_where_they_need_more_room(library, monkeypatch, dtype):
    require_attention(32, dtype)
    spans = continued_spans(*rows_of((40, 300, 40, 20, 700, 33), 1))
    (*given, d), rest = random_heads(700 + 433, 6, 2, 32, dtype), (spans, 0.2, None, None)
    whole = attend_backward(d, *given, *rest)
    monkeypatch.setattr(compiled, "ROOM", 2 * 2 * 32 * 400)
    for one, other in zip(attend_backward(d, *given, *rest), whole, strict=True):
        assert torch.equal(one, other)


@DTYPES
def test_attention_to_no_documents_is_zero_and_a_cap_on_scores_is_not_lost(library, dtype):
    q, k, v, d = random_heads(70, 2, 1, 32, dtype)
    assert not attend(q, k, v, (), 0.2, None, None).any()
    assert not any(grad.any() for grad in attend_backward(d, q, k, v, (), 0.2, None, None))
    rest = (spans_of([0, 30, 70]), 0.2, None, 1.5)
    agree(*both(attend, q, k, v, *rest), dtype)
    agree(*both(attend_backward, d, q, k, v, *rest), dtype)
    assert not torch.allclose(attend(q, k, v, *rest), attend(q, k, v, *rest[:3], None), atol=1e-2)


@DTYPES
def test_attention_as_a_whole_is_there_where_its_products_are_and_heads_are_as_wide_as_they_take(
    library, request, dtype
):
    """Always for fp32, and for bf16 wherever this processor and the flags of the library have the instruction."""
    way = request.node.callspec.params["library"]
    multiplies = multiplies_bf16() and way in ("compiled", "compiled without AMX")
    here = torch.device("cpu")
    assert compiled.attends(here, dtype, 64) == (dtype == torch.float32 or multiplies)
    assert not compiled.attends(here, dtype, 48) and not compiled.attends(here, torch.float64, 64)
    assert not compiled.attends(torch.device("meta"), dtype, 64)


def multiplies_bf16():
    return Path("/proc/cpuinfo").exists() and "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def require_attention(width, dtype):
    """That what is tested is not attention in tiles."""
    if dtype == torch.bfloat16 and not multiplies_bf16():
        pytest.skip("bf16 is not multiplied here")
    assert compiled.attends(torch.device("cpu"), dtype, width)


def random_heads(rows, heads, key_heads, width, dtype):
    """q, k, v and an upstream gradient."""
    return tuple(torch.randn(rows, count, width).to(dtype) for count in (heads, key_heads, key_heads, heads))


def attention(spans, heads, key_heads, width, window, dtype, computed=None):
    """Attention over random heads and its three gradients, with three rows behind of no document; in `computed`."""
    torch.manual_seed(0)
    given = random_heads(spans[-1].stop + 3, heads, key_heads, width, dtype)
    q, k, v, d = (x.to(computed or dtype) for x in given)
    rest = (spans, width**-0.5, window, None)
    return [attend(q, k, v, *rest), *attend_backward(d, q, k, v, *rest)]


@lru_cache(maxsize=12)  # of all cases of one library, which are small
def in_tiles(*case):
    """The same by torch; no library changes it."""
    with compiled.left_out():
        assert not compiled.in_use()
        return attention(*case)


@lru_cache(maxsize=1)
def in_tiles_and_exactly(*case):
    """The same by torch, in its dtype and in fp64."""
    with compiled.left_out():
        return attention(*case), attention(*case, computed=torch.float64)


def is_near(*case):
    """Rows of no document are zero; the rest is little off fp64, and in bf16 nearer to it than tiles."""
    found, (tiled, exact), dtype = attention(*case), in_tiles_and_exactly(*case), case[-1]
    for one, other, true in zip(found, tiled, exact, strict=True):
        assert one.dtype == dtype and one.shape == true.shape and not one[-3:].any()
        off, tiles_off = (float((x.double() - true).norm() / true.norm()) for x in (one, other))
        assert off < ATTENTION_OFF[dtype] and (off < tiles_off or dtype == torch.float32)


def rows_of(lengths, shared=None):
    """Bounds, and the rows of the document `shared` for all behind it."""
    bounds = list(accumulate(lengths, initial=0))
    if shared is None:
        return bounds, []
    return bounds, [(0, 0) if n <= shared else tuple(bounds[shared : shared + 2]) for n in range(len(lengths))]


def test_parts_are_all_queries_once_and_the_keys_that_they_see():
    for window in (None, 1, 50, 300, 5000):
        spans = continued_spans(*rows_of((1, 33, 0, 260, 64, 700, 5000), 3))
        queries, seen = [], {}
        parts = parts_of(spans, window)
        for first, last, own, before, before_end in parts.rows_n5.tolist():
            assert parts.most_keys >= last - own + before_end - before
            queries += range(first, last)
            keys = [*range(before, before_end), *range(own, last)]
            for query in range(first, last):
                reach = keys[: len(keys) - (last - query) + 1]
                seen[query] = reach if window is None else reach[-window:]
        assert queries == list(range(spans[-1].stop))
        for start, stop, before, before_end in spans:
            for query in range(start, stop):
                reach = [*range(before, before_end), *range(start, query + 1)]
                assert seen[query] == (reach if window is None else reach[-window:])


@DTYPES
def test_losses_and_their_slopes_are_those_of_torch(library, dtype):
    logits = torch.randn(40, 1003).mul(5).to(dtype)
    logits[3, 7] = 90  # one token has nearly all
    targets, weights = torch.randint(1003, (40,)), torch.rand(40)
    targets[3] = 7
    found, wanted = both(_losses_and_slopes, logits, targets, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-6, atol=1e-6)
    agree(found[1], wanted[1], dtype)
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-9)


def test_what_torch_would_refuse_is_refused(library):
    """Nothing is read or written behind a tensor's end."""
    x, y, norm = torch.randn(4, 6), torch.randn(4, 8), norm_of(8)
    n, q = torch.zeros(1, 4, dtype=torch.int32), torch.randn(4, 2, 32).bfloat16()
    for wrong in (
        lambda: rms_norm(x, norm),
        lambda: rms_norm_backward(x, y, norm),
        lambda: rms_norm_backward(y.bfloat16(), y, norm),
        lambda: rms_norm_backward(y, y, norm, x),
        lambda: rms_norm_backward(y, y, norm, y.bfloat16()),
        lambda: gated(x, y, "silu"),
        lambda: gated_backward(x, y, y, "silu"),
        lambda: rotate(torch.randn(4, 2, 6), torch.rand(3, 3), torch.rand(3, 3)),
        lambda: rotate(torch.randn(4, 2, 6), torch.rand(4, 4), torch.rand(4, 4)),
        lambda: attend(q, q[:3], q, (Span(0, 4),), 1.0, None, None),
        lambda: attend(q, q, q.float(), (Span(0, 4),), 1.0, None, None),
        lambda: attend(q, q, q, (Span(0, 5),), 1.0, None, None),
        lambda: attend_backward(q[:3], q, q, q, (Span(0, 4),), 1.0, None, None),
        lambda: compiled.softmax_(torch.randn(1, 4, 17), n, n + 1, 1.0),
        lambda: compiled.softmax_backward_(torch.randn(1, 4, 16), torch.randn(1, 4, 16).bfloat16(), n, n + 1, 1.0),
        lambda: _losses_and_slopes(x, torch.tensor([0, 1, 2, 6]), torch.ones(4)),
        lambda: _losses_and_slopes(x, torch.tensor([0, 1, 2, -1]), torch.ones(4)),
        lambda: _losses_and_slopes(x, torch.tensor([0, 1, 2]), torch.ones(4)),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            wrong()


def test_the_default_dtype_of_a_process_is_not_that_of_losses(library):
    torch.set_default_dtype(torch.float64)
    try:
        losses, _ = _losses_and_slopes(torch.randn(5, 40).bfloat16(), torch.arange(5), torch.ones(5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses.dtype == torch.float32


PROGRAM = """
import hashlib, sys, torch
from pathlib import Path
from deltaw.kernels import compiled, continued_spans
from deltaw.kernels.loss import _losses_and_slopes
from deltaw.kernels.tiles import attend, attend_backward
assert compiled.prepare(Path(sys.argv[1])) is None
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
x, d, u = (torch.randn(900, 200).bfloat16() for _ in range(3))
rows, _ = torch.randint(500, (96,), dtype=torch.int32).sort()
outs = [compiled.rms_norm_backward(d, x, torch.rand(200), 1e-5, u), *compiled.gated_backward(d, x, u)]
outs += _losses_and_slopes(x, torch.randint(200, (900,)), torch.rand(900))
outs.append(sums := torch.zeros(500, 4, 32))
compiled.add(sums, torch.randn(3 * 4, 32, 32).bfloat16(), rows, 3)
seen = (torch.full((1, 90), n, dtype=torch.int32) for n in (3, 80))
outs.append(compiled.softmax_(torch.randn(4, 2 * 90, 96), *seen, 0.3))
q, k, v, d = (torch.randn(900, heads, 64).bfloat16() for heads in (6, 2, 2, 6))
spans = continued_spans([0, 300, 310, 500, 900], [(0, 0), (0, 300), (0, 300), (0, 0)])
outs += [attend(q, k, v, spans, 0.1, None, None), *attend_backward(d, q, k, v, spans, 0.1, None, None)]
print(hashlib.sha256(b"".join(out.float().numpy().tobytes() for out in outs)).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    library_for("compiled")
    program = [sys.executable, "-c", PROGRAM, str(cache_folder() / "compiled")]
    found = {subprocess.run([*program, n], check=True, capture_output=True, text=True).stdout for n in "13"}
    assert len(found) == 1 and len(found.pop().strip()) == 64


# -- where none can be made -----------------------------------------------------------------------------------------


@pytest.fixture
def nothing(monkeypatch):
    """A process that has no library yet."""
    monkeypatch.setattr(compiled, "_state", compiled._State())


SCRIPTS = {
    "broken": "case $1 in --version) ;; *) echo In file >&2; echo x: error: out of cheese >&2; exit 3;; esac",
    "idle": ":",
    "other": "case $1 in --version) ;; *) exit 3;; esac",
}


@pytest.mark.parametrize(
    ("chosen", "found", "reason"),
    [
        ("", "", "there is no g++"),
        ("no-such-compiler --fast", "", "there is no no-such-compiler"),
        ("", "broken", "g++ says: x: error: out of cheese"),
        ("other", "", "other says: nothing"),
        ("", "idle", "No such file or directory"),
    ],
)
def test_without_a_compiler_that_works_torch_does_the_work(chosen, found, reason, nothing, tmp_path, monkeypatch):
    for name, script in SCRIPTS.items():
        for path in (tmp_path / name, *([tmp_path / "g++"] if name == found else [])):
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", chosen)
    for _ in range(2):
        assert reason in str(compiled.prepare(tmp_path / "cache"))
    assert compiled.in_use() is None
    x = torch.randn(2, 3)
    assert not compiled.takes(x) and rms_norm(x, norm_of(3)).shape == x.shape
    assert not [file for file in (tmp_path / "cache").glob("*") if file.suffix in (".so", ".tmp")]


def test_a_compiler_that_does_not_work_gives_way_to_gcc(nothing, tmp_path, monkeypatch):
    library_for("compiled")
    (tmp_path / "mine").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path / 'mine'} -O9")
    assert compiled.prepare(cache_folder() / "compiled") is None and compiled.in_use()


def test_it_can_be_left_out_and_is_made_once(nothing, tmp_path, monkeypatch):
    library_for("compiled")
    monkeypatch.setenv("DELTAW_COMPILED", "0")
    assert compiled.prepare(tmp_path / "a") == "DELTAW_COMPILED is 0"
    monkeypatch.delenv("DELTAW_COMPILED")
    assert compiled.prepare(tmp_path / "b") is None
    (made,) = (tmp_path / "b").glob("*.so")
    changed = made.stat().st_mtime_ns
    with compiled.left_out():
        assert compiled.prepare(tmp_path / "b") is None and compiled.in_use() is None
    assert compiled.in_use()
    monkeypatch.setattr(compiled, "_state", compiled._State())
    assert compiled.prepare(tmp_path / "b") is None and made.stat().st_mtime_ns == changed
    compiled.leave_out("it was wrong")
    assert compiled.prepare(tmp_path / "b") == "it was wrong" and compiled.in_use() is None


def test_little_memory_makes_none_and_is_asked_again(nothing, tmp_path, monkeypatch):
    library_for("compiled")
    monkeypatch.setattr("deltaw.kernels.library.COMPILING_BYTES", 1 << 60)
    assert "too little for a compiler" in str(compiled.prepare(tmp_path / "e"))
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "_state", compiled._State())
    assert compiled.prepare(tmp_path / "e") is None


DAMAGE = {"cut": lambda data: data[: len(data) // 3], "flipped": lambda data: data[:9000] + b"\1" + data[9001:]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_made_anew(damage, nothing, tmp_path):
    library_for("compiled")
    folder = tmp_path / "d"
    shutil.copytree(cache_folder() / "compiled", folder)
    for there in folder.glob("*.so"):
        there.write_bytes(DAMAGE[damage](there.read_bytes()))
    assert compiled.prepare(folder) is None and compiled.in_use()
    made = folder / f"passes-{compiled.in_use()}.so"
    assert hashlib.sha256(made.read_bytes()).hexdigest() == made.with_suffix(".sha256").read_text()


def test_a_library_that_others_may_write_is_not_run(nothing, tmp_path):
    library_for("compiled")
    folder = tmp_path / "f"
    shutil.copytree(cache_folder() / "compiled", folder)
    folder.chmod(0o777)
    assert "is not ours alone" in str(compiled.prepare(folder))
