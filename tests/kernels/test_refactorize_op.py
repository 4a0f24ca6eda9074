"""refactorize on lists, compiled and as torch calls, against the SVD of the product in fp64."""

import itertools
import shutil

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megalr.ops import library, toolchain
from megalr.ops.refactorization import refactorize_
from tests import processes

# (m, n, r): an odd one, m = r, n = r, both, rank 1, one row, tall, wide, more than one block of a Gram matrix.
SHAPES = [(24, 16, 4), (16, 24, 16), (7, 5, 5), (6, 6, 6), (33, 20, 1), (1, 9, 1), (700, 40, 24), (40, 700, 24)]
SHAPES += [(330, 300, 140), (24, 16, 4)]
F32, BF16 = torch.float32, torch.bfloat16
REFERENCE = library.reference("refactorize")


@pytest.fixture(params=["torch", "compiled"])
def op(request, monkeypatch):
    if request.param == "torch":
        return REFERENCE
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("MEGALR_OPS", "compiled")
    library.load("cpu")
    return torch.ops.megalr.refactorize.default


def pair(m, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)


def conditioned(m, n, r, condition, where, seed=0):
    """A pair with singular values or scales spread over `condition` in a factor, or in both so that they cancel."""
    b, a = (x.double() for x in pair(m, n, r, seed))
    turn = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(seed + 1)).double())[0]
    spread = torch.logspace(0, -torch.tensor(condition).log10().item(), r).double()
    b, a = {
        "columns of B": (b * spread, a),
        "rows of A": (b, spread[:, None] * a),
        "B": (b * spread @ turn, a),
        "A": (b, turn @ (spread[:, None] * a)),
        "scales cancel": (b * spread, a / spread[:, None]),
        "factors cancel": (b * spread @ turn, turn.T @ (a / spread[:, None])),
    }[where]
    return b.float(), a.float()


def moments_of(pairs, seed=9):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for b, a in pairs:
        for factor in (b, a):
            first = torch.randn(factor.shape, generator=generator).to(factor.dtype)
            made += [first, first.square() * 3]
    return made


def run(op, pairs, moments=(), mode="keep"):
    """Status, the new pairs and the new moments; the given tensors stay as they are."""
    b, a, carried = ([x.clone() for x in xs] for xs in (*zip(*pairs, strict=True), moments))
    status = op(b, a, carried, mode)
    return status.tolist(), list(zip(b, a, strict=True)), carried


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def product(b, a):
    return b.double() @ a.double()


def assert_balanced(old, new, tolerance=2e-6):
    (b, a), expected, r = new, product(*old), old[0].shape[1]
    assert relative(product(b, a), expected) < tolerance
    assert relative(product(b.T, b), product(a, a.T)) < max(1e-5, 4 * tolerance)
    s = torch.linalg.svdvals(expected)[:r]
    assert relative(product(b.T, b), torch.diag(s)) < max(1e-5, 4 * tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_equals_the_decomposition_of_the_product(op, dtype):
    pairs = [tuple(x.to(dtype) for x in pair(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    status, new, _ = run(op, pairs)
    assert status == [0] * len(SHAPES)
    for i in range(len(SHAPES)):
        assert new[i][0].dtype == new[i][1].dtype == dtype
        assert_balanced(pairs[i], new[i], tolerance={F32: 2e-6, BF16: 2**-7}[dtype])


def test_the_last_pair_is_the_first_again(op):
    """Equal pairs have equal results, and a list of one is a list."""
    pairs = [pair(*shape) for shape in SHAPES]
    _, new, _ = run(op, pairs)
    for i in (0, len(SHAPES) - 1):
        _, alone, _ = run(op, pairs[i : i + 1])
        assert torch.equal(alone[0][0], new[0][0]) and torch.equal(alone[0][1], new[0][1])


def test_compiled_is_the_reference_with_the_same_signs(op):
    pairs = [pair(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    moments = moments_of(pairs)
    expected = run(REFERENCE, pairs, moments, "transport")
    got = run(op, pairs, moments, "transport")
    assert got[0] == expected[0]
    for xs, ys in zip(got[1], expected[1], strict=True):
        assert all(relative(x, y) < 2e-4 for x, y in zip(xs, ys, strict=True))  # close singular values' vectors mix
    assert all(relative(x, y) < 5e-4 for x, y in zip(got[2], expected[2], strict=True))


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
@pytest.mark.parametrize(
    "where",
    ["columns of B", "rows of A", "B", "A", "scales cancel", "factors cancel"],
    ids=lambda x: x.replace(" ", "-"),
)
@pytest.mark.parametrize("shape", [(24, 16, 4), (330, 300, 140)], ids=str)
def test_ill_conditioned_keeps_the_product_or_the_pair(op, shape, where, condition):
    old = conditioned(*shape, condition, where)
    s = torch.linalg.svdvals(product(*old))[: shape[2]]
    (status,), (new,), _ = run(op, [old])
    if status:
        assert status == 2 and torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
        assert s[-1] < 1e-6 * s[0] or (where == "factors cancel" and condition == 1e9)
    else:
        assert_balanced(old, new)


def test_scales(op):
    """Neither squares nor norms leave the range of the numbers."""
    b, a = pair(40, 30, 8)
    scales = [(1e18, 1e18), (1e-18, 1e-18), (1e36, 1e-36), (1e-36, 1e36), (1e36, 1e36), (1e37, 1e37), (1e-30, 1e8)]
    old = [(b * x, a * y) for x, y in scales]
    status, new, _ = run(op, old)
    assert status == [0] * len(scales)
    for one, other in zip(old, new, strict=True):
        assert_balanced(one, other)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_out_of_the_dtypes_range_is_left_alone(op, dtype):
    b, a = (x.sign().to(dtype) * 3e38 for x in pair(64, 64, 2))
    status, (new,), _ = run(op, [(b, a)])
    assert status == [1] and torch.equal(new[0], b) and torch.equal(new[1], a)


def test_a_neighbours_dtype_changes_nothing(op):
    """bf16 ends at 3.39e38, fp32 at 3.40e38."""
    edge = (torch.full((1, 1), 3.395e38), torch.full((1, 1), 3.395e38))
    neighbour = tuple(x.bfloat16() for x in pair(8, 7, 3))
    assert run(op, [edge])[0] == [0]
    assert run(op, [edge, neighbour])[0] == run(op, [neighbour, edge])[0] == [0, 0]


@pytest.mark.parametrize("condition", [1.0, 1e6], ids=["Cholesky", "QR"])
def test_moments_that_would_not_be_finite_leave_the_pair_as_it_was(op, condition):
    """The maps of factors of such scales are 1e20 and more, their squares above what fp32 can hold."""
    b, a = conditioned(24, 16, 4, condition, "A")
    pairs = [(b * 1e-20, a * 1e20)] * 2 + [(b * 1e20, a * 1e-20)] * 2 + [(b, a)] * 3
    moments = moments_of(pairs)
    for i in (1, 3):
        for moment in moments[4 * i : 4 * i + 4]:
            moment.mul_(1e-12)
    for i, bad in ((5, float("nan")), (6, float("inf"))):
        moments[4 * i + i - 3][2, 3] = bad
    status, new, carried = run(op, pairs, moments, "transport")
    assert status == [3, 0, 3, 0, 0, 3, 3]
    for i, code in enumerate(status):
        old = (*pairs[i], *moments[4 * i : 4 * i + 4])
        got = (*new[i], *carried[4 * i : 4 * i + 4])
        if code:
            assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(got, old, strict=True))
        else:
            assert_balanced(pairs[i], new[i])
            assert all(moment.isfinite().all() for moment in carried[4 * i : 4 * i + 4])
    assert run(op, pairs, moments, "reset")[0] == [0] * 7


FAILING = """
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

using at::Tensor;

std::tuple<Tensor, Tensor> eigh(const Tensor&, std::string_view, bool) {
  TORCH_CHECK_LINALG(false, "no convergence, on purpose");
}
std::tuple<Tensor, Tensor, Tensor> svd(const Tensor&, bool, bool, std::optional<std::string_view>) {
  TORCH_CHECK_LINALG(false, "no convergence, on purpose");
}
TORCH_LIBRARY_IMPL(aten, CPU, m) {
  const std::string fail = std::getenv("FAIL");
  if (fail.find("eigh") != std::string::npos) m.impl("_linalg_eigh", &eigh);
  if (fail.find("svd") != std::string::npos) m.impl("_linalg_svd", &svd);
}
"""

NOT_CONVERGING = """
import sys, torch
from megalr.ops import library
from tests.kernels.test_refactorize_op import REFERENCE, conditioned, moments_of, pair
pairs = [pair(24, 16, 4), conditioned(24, 16, 4, 1e6, "A"), pair(9, 9, 3)]
pairs[2][0][0] = torch.nan
moments = moments_of(pairs)
library.load("cpu")
torch.ops.load_library(sys.argv[1])
for op in (REFERENCE, torch.ops.megalr.refactorize.default):
    b, a, m = [x.clone() for x, _ in pairs], [x.clone() for _, x in pairs], [x.clone() for x in moments]
    status = op(b, a, m, "transport").tolist()
    same = [torch.equal(x, y[0]) for x, y in zip(b, pairs)]
    print(status, same == [s != 0 for s in status[:2]] + [False])  # NaN is equal to nothing
"""


@pytest.mark.slow  # it compiles against torch's headers
@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_a_decomposition_that_does_not_converge_is_the_status_of_its_pair(tmp_path):
    """Other pairs are done, or told so; with torch's own decompositions replaced, in a process of its own."""
    source, target, failing = (tmp_path / name for name in ("failing.cpp", "failing.o", "failing.so"))
    source.write_text(FAILING, encoding="utf-8")
    commands = [toolchain.compile_command(source, target, tmp_path), toolchain.link_command("cpu", [target], failing)]
    for command in commands:
        processes.run(command)
    # The reference knows no eigh, the compiled op no SVD where the Gram matrices will do.
    for fail, expected in (
        ("eigh", ["[0, 0, 1] True"] * 2),
        ("svd", ["[4, 4, 1] True", "[0, 4, 1] True"]),
        ("eigh svd", ["[4, 4, 1] True"] * 2),
    ):
        done = processes.run(
            processes.python(NOT_CONVERGING, failing), warm=True, env={"FAIL": fail, "MEGALR_OPS": "compiled"}
        )
        assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("mode", ["keep", "reset", "transport"])
def test_bad_pairs_keep_their_bits_and_the_others_are_done(op, mode):
    pairs = [pair(24, 16, 4, seed=i) for i in range(8)]
    pairs[1][0][3, 2] = float("nan")
    pairs[2][1][2, 3] = float("inf")
    pairs[3][0].zero_()
    pairs[4][1].zero_()
    pairs[5][0][:, 2] = pairs[5][0][:, 1]
    pairs[6][1][0] = 2 * pairs[6][1][3]
    moments = [] if mode == "keep" else moments_of(pairs)
    status, new, carried = run(op, pairs, moments, mode)
    assert status == [0, 1, 1, 2, 2, 2, 2, 0]
    for i in range(8):
        if not status[i]:
            assert_balanced(pairs[i], new[i])
        else:
            bits = [(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(new[i], pairs[i], strict=True)]
            assert all(torch.equal(x, y) for x, y in bits)
    for j, (got, old) in enumerate(zip(carried, moments, strict=True)):
        assert torch.equal(got, old) == bool(status[j // 4])


def test_reset_zeroes_what_is_not_finite_too(op):
    pairs = [pair(24, 16, 4), pair(9, 30, 3)]
    moments = moments_of(pairs)
    moments[2][0, 0] = float("nan")
    _, _, carried = run(op, pairs, moments, "reset")
    assert not any(moment.any() for moment in carried)


@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("where", ["columns of B", "A", "factors cancel"], ids=lambda x: x.replace(" ", "-"))
def test_gradients_map_exactly(op, where, condition):
    """dL/dB_new and dL/dA_new are the old gradients, transported as first moments are."""
    b, a = conditioned(30, 20, 5, condition, where)
    slope = torch.randn(30, 20, generator=torch.Generator().manual_seed(5)).double()  # dL/d(B A)
    moments = [slope @ a.double().T, torch.rand(30, 5), b.double().T @ slope, torch.rand(5, 20)]
    _, ((new_b, new_a),), carried = run(op, [(b, a)], [moment.float() for moment in moments], "transport")
    # What a mapping in fp32 can keep: the old gradient's columns may be much larger than the new one's.
    scale = 1e-5 * (moments[0].norm() / (slope @ new_a.double().T).norm()).clamp_min(1).item()
    assert relative(carried[0], slope @ new_a.double().T) < scale
    scale = 1e-5 * (moments[2].norm() / (new_b.double().T @ slope).norm()).clamp_min(1).item()
    assert relative(carried[2], new_b.double().T @ slope) < scale
    assert carried[1].min() >= 0 and carried[3].min() >= 0


def test_nothing_to_do(op):
    assert op([], [], [], "transport").tolist() == []
    assert refactorize_([], []).shape == (0,)
    assert op([torch.ones(3, 0)], [torch.ones(0, 4)], [], "keep").tolist() == [0]


REFUSED = {
    "not contiguous": (lambda b, a, m: (b, [a[0], turned(a[1])], m), r"A\[1\] is not contiguous .*A\[1\]\.contiguous"),
    "wide B": (lambda b, a, m: ([b[0], b[1][:2].clone()], a, m), r"B\[1\] has shape \[2, 3\].*at most rank 2"),
    "other rank": (lambda b, a, m: (b, [a[0], a[1][:2].clone()], m), r"B\[1\] has shape \[8, 3\] and A\[1\] \[2, 7\]"),
    "integers": (lambda b, a, m: ([b[0].int(), b[1]], a, m), r"B\[0\] is int32; it must be float32 or"),
    "float64": (
        lambda b, a, m: (b, [a[0], a[1].double()], m),
        r"A\[1\] is float64; it must be float32 or bfloat16: keep it as A\[1\]\.float\(\)",
    ),
    "float16": (
        lambda b, a, m: (b, a, [m[0].half(), *m[1:]]),
        r"moments\[0\] is float16; it must be float32 or bfloat16",
    ),
    "one twice": (lambda b, a, m: ([b[0], b[0]], a, m), r"B\[1\] shares memory with B\[0\]"),
    "a moment twice": (lambda b, a, m: (b, a, [*m[:5], m[4], *m[6:]]), r"moments\[5\] shares memory with moments\[4\]"),
    "sparse": (lambda b, a, m: ([b[0].to_sparse(), b[1]], a, m), r"B\[0\] is sparse.*to_dense"),
    "lengths": (lambda b, a, m: (b, a[:1], m), "A has 1 tensors and B 2"),
    "moments missing": (lambda b, a, m: (b, a, m[:7]), r"moments has 7 tensors and B 2; .*takes 4 .*exp_avg_B"),
    "a moment's shape": (lambda b, a, m: (b, a, [*m[:6], m[4], m[7]]), r"moments\[6\] has shape \[8, 3\] and A\[1\]"),
    "a moment's strides": (lambda b, a, m: (b, a, [*m[:7], turned(m[7])]), r"moments\[7\] is not contiguous"),
}


def turned(x):
    return x.T.contiguous().T


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(op, case):
    change, message = REFUSED[case]
    pairs = [pair(8, 7, 3), pair(8, 7, 3)]
    b, a = map(list, zip(*pairs, strict=True))
    b, a, moments = change(b, a, moments_of(pairs))
    with pytest.raises(ValueError, match=message):
        op(b, a, moments, "transport")


def test_modes_refused(op):
    b, a = pair(8, 7, 3)
    with pytest.raises(ValueError, match='mode is "zero"; write keep, reset or transport'):
        op([b], [a], [], "zero")
    with pytest.raises(ValueError, match="moments has 4 tensors and B 1; this mode takes 0"):
        op([b], [a], moments_of([(b, a)]), "keep")


def test_parameters_and_versions(op):
    """Parameters that want gradients are changed in place, and autograd is told."""
    (b, a), expected = pair(24, 16, 4), pair(24, 16, 4)
    op([expected[0]], [expected[1]], [], "keep")
    parameter = torch.nn.Parameter(b)
    version = parameter._version
    refactorize_([parameter], [a])
    assert relative(parameter.detach(), expected[0]) < 1e-5 and parameter._version > version


def test_low_precision_products_are_not_used(op):
    torch.set_float32_matmul_precision("medium")
    try:
        old = pair(330, 300, 140)
        _, (new,), _ = run(op, [old])
        assert_balanced(old, new)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_agree(op, threads):
    before = torch.get_num_threads()
    shapes = [(64, 40, 8), (24, 50, 6), (30, 30, 10)] * 4  # small enough a rank for pairs side by side
    pairs = [pair(*shape, seed=i) for i, shape in enumerate(shapes)]
    pairs[4][0][0, 0] = float("nan")
    moments = moments_of(pairs)
    try:
        torch.set_num_threads(threads)
        status, new, _ = run(op, pairs, moments, "transport")
    finally:
        torch.set_num_threads(before)
    assert status == [int(i == 4) for i in range(len(pairs))]
    for i in range(len(pairs)):
        assert status[i] or assert_balanced(pairs[i], new[i]) is None


def allocations(function):
    """Each allocation, the peak of all, in bytes, as torch's allocators report them, and the names of what ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    sizes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    peak = max(itertools.accumulate(sizes))
    assert peak >= max(sizes) > 0
    return {size for size in sizes if size > 0}, peak, {event.name() for event in events}


def test_memory_is_seen():
    """The measure of the next test counts what C++ allocates, inside a decomposition too."""
    b = torch.randn(100, 50)
    sizes, peak, _ = allocations(lambda: torch.linalg.svd(b @ b.T))
    assert max(sizes) == 4 * 100 * 100 and peak > 3 * 4 * 100 * 100


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", ["Cholesky", "QR"])
@pytest.mark.parametrize(
    ("shapes", "r"),
    [
        ([(512, 512)] * 4, 128),  # LLaMA-1B's shapes, divided by 4
        ([(1365, 512), (1365, 512), (512, 1365), (512, 512)], 128),
        *(([(601, 601)] * 2, r) for r in (150, 250, 300)),
        ([(601, 901), (901, 601)], 300),
    ],
    ids=str,
)
def test_memory(op, way, threads, shapes, r):
    """At most 4 times the largest pair beside the tensors, to half the rank that a pair can have; no m x n product."""
    if op is REFERENCE:
        pytest.skip("the reference is there to be read")
    before = torch.get_num_threads()
    kind = (1e2, "columns of B") if way == "Cholesky" else (1e6, "A")
    pairs = [conditioned(m, n, r, *kind) for m, n in shapes]
    b, a = map(list, zip(*pairs, strict=True))
    moments = moments_of(pairs)
    try:
        torch.set_num_threads(threads)
        statuses = []
        sizes, peak, names = allocations(lambda: statuses.append(op(b, a, moments, "transport")))
    finally:
        torch.set_num_threads(before)
    assert statuses[0].tolist() == [0] * len(pairs)
    assert ("aten::linalg_svd" in names) == (way == "QR")
    assert peak <= 4 * max(4 * r * (m + n) for m, n in shapes)
    assert not sizes & {width * m * n for m, n in shapes for width in (4, 8)}
    assert max(sizes) < max(4 * min(m * n for m, n in shapes), 17 * r * r)  # eigh's workspace is 2 r x r in fp64


def test_opcheck(op):
    pairs = [pair(8, 7, 3), pair(9, 30, 4)]
    b, a = map(list, zip(*pairs, strict=True))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for mode, moments in {"keep": [], "reset": moments_of(pairs), "transport": moments_of(pairs)}.items():
        torch.library.opcheck(torch.ops.megalr.refactorize.default, (b, a, moments, mode), test_utils=tests)
