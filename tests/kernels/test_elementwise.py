"""The element-wise ops, compiled and as torch calls, against fp64; and what they refuse."""

import shutil
import sys
import types

import pytest
import torch
from torch.optim.adamw import adamw as torch_adamw

from megalr.ops import adam, apex, library
from tests.kernels import elementwise as plain
from tests.kernels.elementwise import BETA1, BETA2, DECAY, EPS, GAMMA1, GAMMA2, LR, NORM_EPS, SHAPES, THETA, copies

ADAMW = (LR, BETA1, BETA2, EPS, DECAY)
SPAM = (*ADAMW, GAMMA1, GAMMA2, THETA, NORM_EPS)
STEPS = [1, 2, 3, 10, 1, 100, 5000, 17]
BIAS1 = [1 - BETA1**t for t in STEPS]
BIAS2 = [1 - BETA2**t for t in STEPS]
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, F32), (F32, BF16, F32), (F32, F32, BF16)]


@pytest.fixture(params=["torch", "compiled"])
def ops(request, monkeypatch):
    if request.param == "compiled":
        if not (shutil.which("c++") or shutil.which("g++")):
            pytest.skip("no C++ compiler")
        monkeypatch.setenv("MEGALR_OPS", "compiled")
    return plain.ops(request.param)


def assert_near(got, expected, what):
    """Equal to fp32 rounding, also of terms that cancel; where the result is stored in bf16, to its rounding."""
    rtol = 2**-8 * 1.01 if got.dtype == BF16 else 1e-6
    atol = 3e-7 * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("views", [False, True])
def test_low_rank_adam(ops, dtypes, views, reset):
    lists = plain.inputs(dtypes=dtypes, views=views)
    before = copies(lists)
    assert ops.low_rank_adam(*lists, STEPS, *ADAMW, reset) is None
    for i, (w, g, m, v) in enumerate(zip(*before, strict=True)):
        new = plain.adamw(w, g, m, v, BIAS1[i], BIAS2[i])
        assert_near(lists[0][i], new[0], f"weights[{i}]")
        assert torch.equal(lists[1][i], g)
        for got, moment in zip((lists[2][i], lists[3][i]), new[1:], strict=True):
            assert_near(got, torch.zeros_like(moment) if reset else moment, f"moments[{i}]")


def test_low_rank_adam_is_torch_fused_adamw(ops):
    lists = plain.inputs()
    expected = copies(lists)
    for step in range(1, 21):
        ops.low_rank_adam(*lists, [step] * len(SHAPES), *ADAMW, False)
        counts = [torch.tensor(float(step - 1)) for _ in SHAPES]
        hyper = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY}
        torch_adamw(*expected, [], counts, fused=True, amsgrad=False, maximize=False, **hyper)
    for got, wanted in zip(lists, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("views", [False, True])
def test_projected_adam(ops, dtypes, scale, views):
    _, *lists = plain.inputs(dtypes=(F32, *dtypes), views=views)
    before = copies(lists)
    directions = plain.directions_of(ops, *lists, STEPS, BETA1, BETA2, EPS, scale)
    assert len(directions) == len(SHAPES)
    for i, (g, m, v) in enumerate(zip(*before, strict=True)):
        new_m, new_v, update = plain.direction(g, m, v, BIAS1[i], BIAS2[i])
        assert directions[i].dtype == F32 and directions[i].shape == g.shape and directions[i].is_contiguous()
        assert_near(directions[i], scale * update, f"directions[{i}]")
        assert_near(lists[1][i], new_m, f"exp_avgs[{i}]")
        assert_near(lists[2][i], new_v, f"exp_avg_sqs[{i}]")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("views", [False, True])
def test_stable_spam_adam(ops, dtypes, views):
    lists = plain.inputs(dtypes=dtypes, views=views)
    before = copies(lists)
    # Thresholds that clip one entry, many entries and none.
    statistics = torch.tensor([[0.5, 1.0, 2.0], [0.001, 0.3, 0.2], [0.0, 0.0, 0.0], [20.0, 5.0, 30.0]]).repeat(2, 1)
    old = statistics.clone()
    ops.stable_spam_adam(*lists, statistics, STEPS, BIAS1, BIAS2, *SPAM)
    for i, (w, g, m, v) in enumerate(zip(*before, strict=True)):
        scaled, row = plain.stable(g, old[i], STEPS[i])
        assert_near(statistics[i], torch.tensor(row, dtype=torch.float64), f"statistics[{i}]")
        new = plain.adamw(w, scaled, m, v, BIAS1[i], BIAS2[i])
        for got, expected in zip((lists[0][i], lists[2][i], lists[3][i]), new, strict=True):
            assert_near(got, expected, f"tensor {i}")


def test_stable_spam_of_updates_in_a_row(ops):
    """The statistics of one update are those of the next; k goes on when the moments start again."""
    weights, _, exp_avgs, exp_avg_sqs = plain.inputs()
    ops.momentum_reset(exp_avgs + exp_avg_sqs)
    statistics = torch.zeros(len(SHAPES), 3)
    expected = [copies([weights, exp_avgs, exp_avg_sqs]), statistics.double()]
    for k in range(1, 7):
        grads = plain.inputs(seed=k)[1]
        t = k if k < 4 else k - 3
        if t == 1:
            ops.momentum_reset(exp_avgs + exp_avg_sqs)
            expected[0][1:] = [[torch.zeros_like(x) for x in moments] for moments in expected[0][1:]]
        biases = [[1 - beta**t] * len(SHAPES) for beta in (BETA1, BETA2)]
        ops.stable_spam_adam(weights, grads, exp_avgs, exp_avg_sqs, statistics, [k] * len(SHAPES), *biases, *SPAM)
        for i, g in enumerate(grads):
            scaled, row = plain.stable(g, expected[1][i], k)
            expected[1][i] = torch.tensor(row)
            w, m, v = (tensors[i] for tensors in expected[0])
            for tensors, new in zip(expected[0], plain.adamw(w, scaled, m, v, 1 - BETA1**t, 1 - BETA2**t), strict=True):
                tensors[i] = new
    torch.testing.assert_close(statistics.double(), expected[1], rtol=2e-6, atol=1e-9)
    for i in range(len(SHAPES)):
        torch.testing.assert_close(weights[i].double(), expected[0][0][i], rtol=2e-6, atol=1e-6)


def test_stable_spam_of_a_zero_gradient(ops):
    lists = [[tensor] for tensor in (torch.ones(5), torch.zeros(5), torch.ones(5), torch.ones(5))]
    fresh, used = torch.zeros(1, 3), torch.tensor([[2.0, 3.0, 4.0]])
    for statistics in (fresh, used):
        ops.stable_spam_adam(*lists, statistics, [1], [0.1], [0.001], *SPAM)
        assert all(torch.isfinite(tensors[0]).all() for tensors in lists)
    assert not fresh.any()
    torch.testing.assert_close(used, torch.tensor([[2 * THETA, 3 * GAMMA1, 4 * GAMMA2]]))
    torch.testing.assert_close(lists[2][0], torch.full((5,), BETA1**2))


def test_stable_spam_of_the_smallest_and_largest_gradients(ops):
    """Neither a norm below nor a square above what fp32 can hold is lost."""
    for size in (1e-42, 3e25):
        lists = [[tensor] for tensor in (torch.zeros(6), torch.full((6,), size), torch.zeros(6), torch.zeros(6))]
        statistics = torch.zeros(1, 3)
        ops.stable_spam_adam(*lists, statistics, [1], [0.1], [0.001], *SPAM[:-1], 0.0)
        torch.testing.assert_close(lists[2][0], torch.full((6,), 0.1 / 6**0.5), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_momentum_reset(ops, dtype):
    tensors = [torch.ones(shape, dtype=dtype) for shape in SHAPES]
    kept = torch.ones(9, dtype=dtype)
    ops.momentum_reset([*tensors, kept[1:8]])
    assert not any(tensor.any() for tensor in tensors)
    assert kept.tolist() == [1] + [0] * 7 + [1]


def test_nothing_to_do(ops):
    ops.momentum_reset([])
    ops.low_rank_adam([], [], [], [], [], *ADAMW, False)
    ops.projected_adam([], [], [], [], [], BETA1, BETA2, EPS, 1.0)
    ops.stable_spam_adam([], [], [], [], torch.zeros(0, 3), [], [], [], *SPAM)


@pytest.mark.parametrize("ops", ["compiled"], indirect=True)  # torch's own kernel rounds otherwise at a vector's tail
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_cut_changes_no_bit(ops, threads):
    """A fragment's elements become what they become in the whole tensor, with any cuts and any number of threads."""
    whole = plain.inputs(shapes=[(100_003,)])
    cuts = [1, 2, 5, 1000, 33_333, 60_000]
    parts = [[part.clone() for part in tensors[0].tensor_split(cuts)] for tensors in whole]
    ops.low_rank_adam(*whole, [3], *ADAMW, False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.low_rank_adam(*parts, [3] * len(parts[0]), *ADAMW, False)
    finally:
        torch.set_num_threads(before)
    for one, many in zip(whole, parts, strict=True):
        assert torch.equal(one[0], torch.cat(many))


def test_statistics_do_not_depend_on_the_threads(ops):
    def run(threads):
        lists, statistics = plain.inputs(), torch.zeros(len(SHAPES), 3)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            ops.stable_spam_adam(*lists, statistics, STEPS, BIAS1, BIAS2, *SPAM)
        finally:
            torch.set_num_threads(before)
        return torch.cat([statistics.view(-1), *(tensor.view(-1) for tensor in lists[0])])

    assert torch.equal(run(1), run(2))


def test_many_tiny_tensors(ops):
    shapes = [(i % 5,) for i in range(5000)]
    lists = plain.inputs(shapes=shapes)
    before = copies(lists)
    steps = [1 + i % 7 for i in range(len(shapes))]
    ops.low_rank_adam(*lists, steps, *ADAMW, False)
    biases = torch.tensor([[1 - BETA1**t, 1 - BETA2**t] for t in steps], dtype=torch.float64)
    sizes = torch.tensor([shape[0] for shape in shapes])
    bias1, bias2 = biases.repeat_interleave(sizes, dim=0).T
    new = plain.adamw(*(torch.cat(tensors) for tensors in before), bias1, bias2)
    assert_near(torch.cat(lists[0]), new[0], "weights")


BAD = {
    "length": "grads has 2 tensors and weights 3; give one for each of weights",
    "shape": "exp_avgs[1] has shape [3, 2] and weights[1] [2, 3]; they must be the same",
    "contiguous": "grads[1] is not contiguous (shape [2, 3], strides [1, 2]); keep it as grads[1].contiguous()",
    "dtype": "exp_avg_sqs[2] is float64; it must be float32 or bfloat16: keep it as exp_avg_sqs[2].float()",
    "mixed": "weights[1] is bfloat16 and weights[0] float32; a list has one dtype: split it",
    "device": "exp_avgs[2] is on meta and weights[0] on cpu; all tensors of a call are on one device: "
    'write exp_avgs[2].to("cpu")',
    "sparse": "grads[0] is sparse; write grads[0].to_dense()",
}


def bad(kind):
    """Lists of three tensors, with what is wrong with them."""
    lists = plain.inputs(shapes=[(4,), (2, 3), (5,)])
    weights, grads, exp_avgs, exp_avg_sqs = lists
    if kind == "length":
        grads.pop()
    elif kind == "shape":
        exp_avgs[1] = exp_avgs[1].T.contiguous()
    elif kind == "contiguous":
        grads[1] = torch.zeros(3, 2).T
    elif kind == "dtype":
        exp_avg_sqs[2] = exp_avg_sqs[2].double()
    elif kind == "mixed":
        weights[1] = weights[1].bfloat16()
    elif kind == "device":
        exp_avgs[2] = exp_avgs[2].to("meta")
    elif kind == "sparse":
        grads[0] = grads[0].to_sparse()
    return lists


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors(ops, kind):
    lists, message = bad(kind), BAD[kind]
    before = [[tensor.clone() for tensor in tensors] for tensors in lists]
    statistics, counts, biases = torch.zeros(3, 3), [1] * 3, [0.5] * 3
    if kind == "device":
        ops = plain.ops("torch")  # with a meta tensor among them torch's dispatcher asks for the fake implementation
    for name, args in (
        ("low_rank_adam", (*lists, counts, *ADAMW, True)),
        ("stable_spam_adam", (*lists, statistics, counts, biases, biases, *SPAM)),
    ):
        with pytest.raises(ValueError) as error:
            getattr(ops, name)(*args)
        assert str(error.value).splitlines()[0] == f"megalr.{name}: {message}"
    for tensors, old in zip(lists, before, strict=True):
        for tensor, same in zip(tensors, old, strict=True):
            assert tensor.is_meta or torch.equal(tensor.to_dense(), same.to_dense())


def test_bad_tensors_of_the_other_ops(ops):
    with pytest.raises(ValueError, match=r"megalr.momentum_reset: tensors\[1\] is not contiguous"):
        ops.momentum_reset([torch.zeros(2), torch.zeros(3, 2).T])
    with pytest.raises(ValueError, match=r"megalr.projected_adam: exp_avgs has 0 tensors and grads 1"):
        ops.projected_adam([torch.zeros(2)], [torch.zeros(2)], [], [], [1], BETA1, BETA2, EPS, 1.0)
    with pytest.raises(ValueError, match=r"megalr.projected_adam: directions\[0\] is bfloat16; it must be float32"):
        ops.projected_adam([torch.zeros(2).bfloat16()], *[[torch.zeros(2)]] * 3, [1], BETA1, BETA2, EPS, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_steps": [0]}, "clip_steps[0] is 0; it counts this update too, so it is at least 1"),
        ({"clip_steps": [1, 1]}, "clip_steps has 2 numbers and weights 1 tensors; give one for each of weights"),
        ({"bias1": [0.0]}, "bias1[0] is 0; it is 1 - prod beta_t over the updates, this one included, in (0, 1]"),
        ({"bias2": []}, "bias2 has 0 numbers and weights 1 tensors; give one for each of weights"),
        ({"statistics": torch.zeros(3)}, "statistics has shape [3]; it must be [1, 3], a row for each of weights"),
        (
            {"statistics": torch.zeros(1, 3).double()},
            "statistics is float64; it must be float32: keep it as statistics.float()",
        ),
        (
            {"statistics": torch.zeros(3, 1).T},
            "statistics is not contiguous (shape [1, 3], strides [1, 1]); keep it as statistics.contiguous()",
        ),
    ],
)
def test_bad_numbers(ops, change, message):
    if "contiguous" in message:
        change = {"statistics": torch.zeros(1, 6)[:, ::2]}
        message = message.replace("[1, 1]", "[6, 2]")
    given = {"statistics": torch.zeros(1, 3), "clip_steps": [1], "bias1": [0.5], "bias2": [0.5]} | change
    lists = [[torch.zeros(4)] for _ in range(4)]
    with pytest.raises(ValueError) as error:
        ops.stable_spam_adam(*lists, *given.values(), *SPAM)
    assert str(error.value).splitlines()[0] == f"megalr.stable_spam_adam: {message}"


def test_step_zero(ops):
    lists = [[torch.zeros(4), torch.zeros(4)] for _ in range(4)]
    message = r"steps\[1\] is 0; it counts this update too, so it is at least 1"
    with pytest.raises(ValueError, match=f"megalr.low_rank_adam: {message}"):
        ops.low_rank_adam(*lists, [1, 0], *ADAMW, False)
    with pytest.raises(ValueError, match=f"megalr.projected_adam: {message}"):
        ops.projected_adam(*lists, [1, 0], BETA1, BETA2, EPS, 1.0)


def test_lists_that_do_not_fit_an_empty_one():
    """Nothing to do is said by every list."""
    x = torch.zeros(2)
    for lists in (([], [x], [], []), ([], [], [x], []), ([], [], [], [x])):
        with pytest.raises(ValueError, match="megalr.low_rank_adam: .* has 1 tensors and weights 0"):
            adam.low_rank_adam(*lists, steps=[], **HYPER)
    with pytest.raises(ValueError, match="steps has 1 numbers and weights 0 tensors"):
        adam.low_rank_adam([], [], [], [], steps=[1], **HYPER)
    with pytest.raises(ValueError, match="exp_avgs has 1 tensors and grads 0"):
        adam.projected_adam([], [x], [], steps=[], betas=(BETA1, BETA2), eps=EPS)


def test_what_is_no_tensor_is_named():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"megalr.low_rank_adam: grads\[1\] is None; it must be a tensor"):
        adam.low_rank_adam([x, x.clone()], [x.clone(), None], [x.clone()] * 2, [x.clone()] * 2, steps=[1, 1], **HYPER)
    with pytest.raises(ValueError, match=r"megalr.projected_adam: grads\[0\] is None; it must be a tensor"):
        adam.projected_adam([None], [x], [x.clone()], steps=[1], betas=(BETA1, BETA2), eps=EPS)
    with pytest.raises(ValueError, match=r"megalr.momentum_reset: tensors\[0\] is float; it must be a tensor"):
        adam.momentum_reset([1.0])


SHARED = {
    "the same moment": lambda w, g, m, v: ((w, g, m, m), r"exp_avg_sqs\[.\] shares memory with exp_avgs\[.\]"),
    "a weight twice": lambda w, g, m, v: (([w[0], w[0]], g, m, v), r"weights\[1\] shares memory with weights\[0\]"),
    "a gradient that is a moment": lambda w, g, m, v: (
        (w, [g[0], m[1]], m, v),
        r"grads\[1\] shares memory with exp_avgs\[1\]",
    ),
    "overlapping runs": lambda w, g, m, v: (
        ([w[0][:6], w[0][5:8]], [g[0][:6], g[0][5:8]], [m[0][:6], m[0][6:9]], [v[0][:6], v[0][6:9]]),
        r"weights\[1\] shares memory with weights\[0\], and one of them is written: write weights\[1\].clone\(\)",
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_is_written_has_memory_of_its_own(ops, case):
    lists, message = SHARED[case](*plain.inputs(shapes=[(9,), (9,)]))
    before = copies(lists)
    with pytest.raises(ValueError, match=f"megalr.low_rank_adam: {message}"):
        ops.low_rank_adam(*lists, [1, 1], *ADAMW, False)
    assert all(torch.equal(x, y) for xs, ys in zip(lists, before, strict=True) for x, y in zip(xs, ys, strict=True))
    with pytest.raises(ValueError, match=r"tensors\[1\] shares memory with tensors\[0\]"):
        ops.momentum_reset([before[0][0], before[0][0][2:]])


def test_neighbours_and_what_is_only_read_may_touch(ops):
    """Runs of one buffer side by side, in any order; and one gradient for two weights."""
    w, g, m, v = (tensors[0] for tensors in plain.inputs(shapes=[(10,)]))
    lists = ([w[5:], w[:5]], [g[:5], g[:5]], [m[:5], m[5:]], [v[:5], v[5:]])
    ops.low_rank_adam(*lists, [1, 1], *ADAMW, False)


@pytest.mark.parametrize("name", plain.NAMES)
def test_opcheck(ops, name):
    lists = plain.inputs(shapes=[(4, 3), (7,), (0,)])
    counts, biases = [1, 2, 3], [0.1, 0.5, 1.0]
    args = {
        "momentum_reset": (lists[0],),
        "low_rank_adam": (*lists, counts, *ADAMW, True),
        "projected_adam": (*lists, counts, BETA1, BETA2, EPS, 0.5),
        "stable_spam_adam": (*lists, torch.zeros(3, 3), counts, biases, biases, *SPAM),
    }[name]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(torch.ops.megalr, name).default, args, test_utils=tests)


def test_python_functions():
    """The public functions are the ops with names for their arguments; a parameter that wants a gradient is fine."""
    weights, grads, exp_avgs, exp_avg_sqs = plain.inputs()
    expected = copies([weights, grads, exp_avgs, exp_avg_sqs])
    hyper = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    version = parameters[0]._version
    adam.low_rank_adam(parameters, grads, exp_avgs, exp_avg_sqs, steps=STEPS, **hyper)
    torch.ops.megalr.low_rank_adam(*expected, STEPS, *ADAMW, False)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected[0], strict=True))
    assert parameters[0]._version > version

    got = adam.projected_adam(grads, exp_avgs, exp_avg_sqs, steps=STEPS, betas=(BETA1, BETA2), eps=EPS, scale=2.0)
    same = plain.directions_of(torch.ops.megalr, *expected[1:], STEPS, BETA1, BETA2, EPS, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))

    statistics, other = torch.zeros(8, 3), torch.zeros(8, 3)
    spam = {"gammas": (GAMMA1, GAMMA2), "theta": THETA, "norm_eps": NORM_EPS}
    bias = {"clip_steps": STEPS, "bias1": BIAS1, "bias2": BIAS2}
    adam.stable_spam_adam(parameters, grads, exp_avgs, exp_avg_sqs, statistics, **bias, **hyper, **spam)
    torch.ops.megalr.stable_spam_adam(*expected, other, STEPS, BIAS1, BIAS2, *SPAM)
    assert torch.equal(statistics, other) and torch.equal(weights[3], expected[0][3])

    adam.momentum_reset(exp_avgs)
    assert not any(tensor.any() for tensor in exp_avgs)
    adam.momentum_reset([])
    assert adam.projected_adam([], [], [], steps=[], betas=(BETA1, BETA2), eps=EPS) == []


@pytest.fixture
def apex_calls(monkeypatch):
    """What reaches apex's kernel, where it is installed on a machine with a GPU; CPU tensors stand for the GPU's."""
    calls = []
    fake = types.ModuleType("amp_C")
    fake.multi_tensor_adam = lambda *args: calls.append(args)
    monkeypatch.setitem(sys.modules, "amp_C", fake)
    apex.kernels.cache_clear()
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setitem(library._loaded, "cpu", library.load("cuda"))
    yield calls
    apex.kernels.cache_clear()


HYPER = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}


def test_apex_takes_tensors_of_equal_step(apex_calls):
    """apex's kernel is called as its FusedAdam calls it, once for each step count."""
    lists = plain.inputs(shapes=[(2,), (3,), (4,)])
    adam.low_rank_adam(*lists, steps=[5, 1, 5], **HYPER)
    weights, grads, exp_avgs, exp_avg_sqs = lists
    order = (grads, weights, exp_avgs, exp_avg_sqs)
    for (chunk, overflow, tensors, *hyper), step, members in zip(apex_calls, (5, 1), ((0, 2), (1,)), strict=True):
        assert chunk == 65536 and overflow.dtype == torch.int32
        assert [[x.data_ptr() for x in some] for some in tensors] == [[x[i].data_ptr() for i in members] for x in order]
        assert hyper == [LR, BETA1, BETA2, EPS, step, 1, 1, DECAY]
    assert library.runs_from("low_rank_adam", "cpu").startswith("apex, ")


def test_what_apex_has_not_is_the_ops(apex_calls):
    for dtypes, reset in (((F32, F32, F32), True), ((BF16, F32, F32), False)):
        lists = plain.inputs(dtypes=dtypes)
        before = copies(lists)
        adam.low_rank_adam(*lists, steps=STEPS, reset=reset, **HYPER)
        expected = plain.adamw(*(tensors[3] for tensors in before), BIAS1[3], BIAS2[3])
        assert_near(lists[0][3], expected[0], "weights[3]")
    assert apex_calls == []


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "device"])
def test_apex_gets_nothing_that_is_bad(apex_calls, kind):
    with pytest.raises(ValueError) as error:
        adam.low_rank_adam(*bad(kind), steps=[1] * 3, **HYPER)
    assert str(error.value).splitlines()[0] == f"megalr.low_rank_adam: {BAD[kind]}"
    for steps, message in (([1, 1, 0], r"steps\[2\] is 0"), ([1], "steps has 1 numbers and weights 3 tensors")):
        with pytest.raises(ValueError, match=message):
            adam.low_rank_adam(*plain.inputs(shapes=[(4,)] * 3), steps=steps, **HYPER)
    assert apex_calls == []


def test_apex_is_not_asked_where_torch_is_wished_for(monkeypatch, apex_calls):
    monkeypatch.setenv("MEGALR_OPS", "torch")
    monkeypatch.setattr(library, "_loaded", {})
    assert library.load("cuda").instead == {}


def test_apex_is_not_needed():
    apex.kernels.cache_clear()
    assert apex.kernels() is None or hasattr(apex.kernels(), "multi_tensor_adam")


def test_nothing_is_loaded_without_a_call(monkeypatch):
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setenv("MEGALR_OPS", "torch")
    assert library.load("cpu").library is None
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setenv("MEGALR_OPS", "fast")
    with pytest.raises(ValueError, match="MEGALR_OPS=fast: write auto, compiled or torch"):
        library.load("cpu")


def test_a_gradient_that_is_not_a_number_spreads_to_its_own_statistics(ops):
    lists = [[torch.ones(5000), torch.ones(3)] for _ in range(4)]
    lists[1][0][4500] = torch.nan
    statistics = torch.zeros(2, 3)
    ops.stable_spam_adam(*lists, statistics, [1, 1], [0.1, 0.1], [0.1, 0.1], *SPAM)
    assert statistics[0].isnan().all() and statistics[1].isfinite().all()
    assert lists[0][0].isnan().all() and lists[0][1].isfinite().all()
