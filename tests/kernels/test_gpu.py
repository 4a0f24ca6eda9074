"""Every op on CUDA tensors against its torch reference on the CPU. Needs a GPU: `make test-gpu`."""

import pytest
import torch

from megalr.ops import library
from tests.kernels import elementwise as plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FP32, BF16 = torch.float32, torch.bfloat16
# Nothing, less than a vector, ends inside a tile, whole chunks, several with a rest, and as a matrix.
SHAPES = [(1,), (0,), (3,), (2051,), (32768,), (100_003,), (512, 384), (3, 5, 7)]
MANY = [(7,)] * 400  # more tensors than one launch takes
LONG = [(5,), (12_000_003,), (9,)]  # a tensor of more chunks than one launch takes
DTYPES = [(FP32,) * 4, (BF16,) * 4, (FP32, BF16, FP32, FP32), (BF16, FP32, BF16, FP32), (FP32, FP32, FP32, BF16)]
ADAM = (0.9, 0.999, 1e-8)  # betas, eps
LR, DECAY = 0.01, 0.1


@pytest.fixture(scope="module")
def ops():
    for device in ("cpu", "cuda"):  # the CPU's library holds what ATen computes, on any device
        kernels = library.load(device)
        assert kernels.library, f"the kernels of {device} tensors do not run: {kernels.why}"
    return torch.ops.megalr


def make(shapes, dtype, offset=0, seed=0, positive=False):
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        flat = torch.randn(offset + torch.Size(shape).numel(), generator=generator)
        tensors.append((flat.abs() + 0.1 if positive else flat).to(dtype))  # nothing is divided by next to nothing
    return tensors


class Lists:
    """Weights, gradients and moments on the CPU, and the same on the GPU, as far from an aligned address as wished."""

    def __init__(self, shapes, dtypes, offset=0):
        flat = [make(shapes, dtype, offset, seed, positive=seed == 3) for seed, dtype in enumerate(dtypes)]
        self.shapes, self.offset = shapes, offset
        self.cpu = [self.views(tensors) for tensors in flat]
        self.gpu = [self.views([t.cuda() for t in tensors]) for tensors in flat]

    def views(self, tensors):
        return [t[self.offset :].view(shape) for t, shape in zip(tensors, self.shapes, strict=True)]

    def assert_equal(self):
        for expected, got in zip(self.cpu, self.gpu, strict=True):
            assert_close(got, expected)


def assert_close(got, expected):
    """To a few roundings of fp32, or one of bf16: the two processors do not add in one order."""
    for g, e in zip(got, expected, strict=True):
        assert g.is_cuda
        torch.testing.assert_close(g.cpu().float(), e.float(), rtol=2**-7 if g.dtype == BF16 else 1e-5, atol=2e-6)


CASES = [(SHAPES, 0), (SHAPES, 1), (SHAPES, 3), (MANY, 0), (LONG, 0), ([], 0)]
IDS = ["aligned", "1 off", "3 off", "many", "long", "none"]


@pytest.mark.parametrize(("shapes", "offset"), CASES, ids=IDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
def test_low_rank_adam(ops, shapes, offset, dtypes, reset):
    lists, steps = Lists(shapes, dtypes, offset), [i + 1 for i in range(len(shapes))]
    numbers = (steps, LR, *ADAM, DECAY, reset)
    ops.low_rank_adam(*lists.gpu, *numbers)
    library.reference("low_rank_adam")(*lists.cpu, *numbers)
    lists.assert_equal()


@pytest.mark.parametrize(("shapes", "offset"), CASES, ids=IDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_projected_adam(ops, shapes, offset, dtypes):
    lists, steps = Lists(shapes, dtypes, offset), [i + 1 for i in range(len(shapes))]
    got = plain.directions_of(ops, *lists.gpu[1:], steps, *ADAM, 0.25)
    expected = plain.directions_of(plain.ops("torch"), *lists.cpu[1:], steps, *ADAM, 0.25)
    assert_close(got, expected)
    lists.assert_equal()


@pytest.mark.parametrize(("shapes", "offset"), CASES, ids=IDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_stable_spam_adam(ops, shapes, offset, dtypes):
    """Three updates, in the second of which every gradient has a spike; the first tensor's is zero."""
    lists, n = Lists(shapes, dtypes, offset), len(shapes)
    rows = [torch.zeros(n, 3), torch.zeros(n, 3, device="cuda")]
    for t in (1, 2, 3):
        for grad in lists.cpu[1] + lists.gpu[1]:
            if grad.numel():
                grad.view(-1)[0] = 30 if t == 2 else 1
        if n:
            lists.cpu[1][0].zero_()
            lists.gpu[1][0].zero_()
        bias = ([1 - ADAM[0] ** t] * n, [1 - ADAM[1] ** t] * n)
        numbers = ([t] * n, *bias, LR, *ADAM, DECAY, 0.85, 0.999, 0.99, 1e-8)
        library.reference("stable_spam_adam")(*lists.cpu, rows[0], *numbers)
        ops.stable_spam_adam(*lists.gpu, rows[1], *numbers)
        assert_close([rows[1]], [rows[0]])
        lists.assert_equal()
        for cpu, gpu in zip(lists.cpu, lists.gpu, strict=True):  # what was rounded differently does not add up
            for i in range(n):
                gpu[i].copy_(cpu[i])


def test_stable_spam_adam_repeats_to_the_bit(ops):
    """No sum depends on which block is faster."""
    runs = [Lists(LONG, (FP32,) * 4) for _ in range(3)]
    for lists in runs:
        numbers = ([1] * 3, [0.1] * 3, [0.001] * 3, LR, *ADAM, DECAY, 0.85, 0.999, 0.99, 1e-8)
        ops.stable_spam_adam(*lists.gpu, torch.zeros(3, 3, device="cuda"), *numbers)
    for lists in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(lists.gpu[0], runs[0].gpu[0], strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("shapes", [SHAPES, MANY, LONG, []], ids=["shapes", "many", "long", "none"])
def test_momentum_reset(ops, shapes, offset, dtype):
    """Zeros in the tensors and nowhere beside them."""
    whole = [torch.ones(offset + torch.Size(shape).numel() + 9, dtype=dtype, device="cuda") for shape in shapes]
    ops.momentum_reset([t[offset:-9] for t in whole])
    for t in whole:
        assert not t[offset:-9].any()
        assert t[:offset].all() and t[-9:].all()


def test_on_another_stream(ops):
    """The launch goes to the current stream, whichever that is."""
    lists = Lists([(5_000_000,)], (FP32,) * 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for tensors in lists.gpu:
            tensors[0].mul_(2)  # what runs before the op on this stream has happened when it starts
        ops.low_rank_adam(*lists.gpu, [1], LR, *ADAM, DECAY, False)
    torch.cuda.current_stream().wait_stream(stream)
    for tensors in lists.cpu:
        tensors[0].mul_(2)
    library.reference("low_rank_adam")(*lists.cpu, [1], LR, *ADAM, DECAY, False)
    lists.assert_equal()


def test_nothing_waits_for_the_device(ops):
    """A copy to the host, or anything else that synchronises, raises here."""
    lists, rows = Lists(SHAPES, (FP32,) * 4), torch.zeros(len(SHAPES), 3, device="cuda")
    n, directions = len(SHAPES), [torch.empty_like(grad) for grad in lists.gpu[1]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.low_rank_adam(*lists.gpu, [1] * n, LR, *ADAM, DECAY, False)
        ops.projected_adam(directions, *lists.gpu[1:], [1] * n, *ADAM, 1.0)
        numbers = ([1] * n, [0.1] * n, [0.1] * n, LR, *ADAM, DECAY, 0.85, 0.999, 0.99, 1e-8)
        ops.stable_spam_adam(*lists.gpu, rows, *numbers)
        ops.momentum_reset(lists.gpu[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU, or none")
def test_on_a_device_that_is_not_the_current_one(ops):
    tensors = [torch.ones(1000, device="cuda:1")]
    ops.momentum_reset(tensors)
    assert torch.cuda.current_device() == 0
    assert not tensors[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: lists[1].__setitem__(0, lists[1][0].cpu()), r"grads\[0\] is on cpu"),
        (lambda lists: lists[2].__setitem__(6, lists[2][6].t().contiguous().t()), r"exp_avgs\[6\] is not contiguous"),
        (lambda lists: lists[0].__setitem__(2, lists[0][2].double()), r"weights\[2\] is float64"),
        (lambda lists: lists[3].pop(), "exp_avg_sqs has 7 tensors"),
    ],
)
def test_what_does_not_fit_is_named(ops, change, message):
    lists = Lists(SHAPES, (FP32,) * 4).gpu
    change(lists)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.low_rank_adam(*lists, [1] * len(SHAPES), LR, *ADAM, DECAY, False)


PAIRS = [(96, 64, 16), (64, 96, 16), (512, 1376, 128), (33, 20, 1), (64, 64, 64), (96, 64, 16)]


def make_pairs(condition=1.0):
    generator = torch.Generator(device="cuda").manual_seed(0)
    spread = [torch.logspace(0, -torch.tensor(condition).log10().item(), r, device="cuda") for _, _, r in PAIRS]
    b = [torch.randn(m, r, generator=generator, device="cuda") * s for (m, _, r), s in zip(PAIRS, spread, strict=True)]
    a = [torch.randn(r, n, generator=generator, device="cuda") for _, n, r in PAIRS]
    return b, a


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("mode", ["keep", "reset", "transport"])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_refactorize(ops, mode, condition):
    """The product stays, the factors are balanced, moments go along: singular vectors are no machine's own, so factors
    are not compared with the CPU's."""
    b, a = make_pairs(condition)
    before = [(x.double(), y.double()) for x, y in zip(b, a, strict=True)]
    moments = [] if mode == "keep" else [x for p, q in zip(b, a, strict=True) for x in (p * 3, p**2, q * 3, q**2)]
    old = [x.double() for x in moments]
    assert ops.refactorize(b, a, moments, mode).tolist() == [0] * len(PAIRS)
    for i, (x, y) in enumerate(before):
        new_b, new_a = b[i].double(), a[i].double()
        assert relative(new_b @ new_a, x @ y) < 5e-6
        assert relative(new_b.T @ new_b, new_a @ new_a.T) < 1e-4
        if mode == "reset":
            assert not any(moment.any() for moment in moments[4 * i : 4 * i + 4])
        if mode == "transport":
            # B' = B M and A' = M^-1 A; gradients map as dB M^-T and M^T dA, so these products do not change.
            assert relative(moments[4 * i].double() @ new_b.T, old[4 * i] @ x.T) < 1e-4 * condition**0.5
            assert relative(new_a.T @ moments[4 * i + 2].double(), y.T @ old[4 * i + 2]) < 1e-4 * condition**0.5
            assert (moments[4 * i + 1] >= 0).all() and (moments[4 * i + 3] >= 0).all()


def test_refactorize_leaves_bad_pairs_as_they_are(ops):
    b, a = make_pairs()
    b[1][3, 3] = torch.nan
    a[2][0] = a[2][1]
    b[3].zero_()
    before = [x.clone() for x in (*b, *a)]
    assert ops.refactorize(b, a, [], "keep").tolist() == [0, 1, 2, 2, 0, 0]
    for i in (1, 2, 3):
        for got, expected in ((b[i], before[i]), (a[i], before[len(b) + i])):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(b[0], before[0])
