"""The CUDA kernels' logic, run on this machine's processor thread by thread, against float64; and what that can find.

csrc/README.md says what it cannot. Compiling takes some twenty seconds, once.
"""

import ctypes
import shutil

import numpy as np
import pytest
import torch

from tests.kernels.emulated import (
    BLOCKS,
    CHUNK,
    CSRC,
    SCHEDULES,
    AdamW,
    Emulated,
    Runs,
    StableSpam,
    compile_all,
    sources,
)
from tests.processes import run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

# Nothing, less than a pack, ends inside a tile, whole chunks, several chunks with a rest.
SIZES = [1, 0, 3, 130, 2048, 2051, CHUNK, 3 * CHUNK, 3 * CHUNK + 5]
ADAM = AdamW(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(compile_all(tmp_path_factory.mktemp("emulation"), sources(), "kernels.so", link=["-shared"]))


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def emulated(request, library):
    return Emulated(library, request.param)


@pytest.fixture
def forward(library):
    return Emulated(library, SCHEDULES["forward"])


def make_runs(sizes, dtypes=(FP32,) * 4, offsets=(0,) * 4, seed=0):
    """Random tensors which begin ``offsets`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(dtype, offset):
        return [torch.randn(offset + n, generator=generator).to(dtype)[offset:] for n in sizes]

    runs = Runs(*map(tensors, dtypes, offsets))
    for v in runs.exp_avg_sqs:
        v.square_()
    return runs


def adam64(grad, m, v, biases, adam):
    """Direction and moments in float64, from gradients and moments as they are stored."""
    m = adam.beta1 * m.double() + (1 - adam.beta1) * grad
    v = adam.beta2 * v.double() + (1 - adam.beta2) * grad**2
    return (m / biases[0]) / ((v / biases[1]).sqrt() + adam.eps), m, v


def adamw64(w, direction, adam):
    return w.double() * (1 - adam.lr * adam.weight_decay) - adam.lr * direction


def biases(step, adam=ADAM):
    return 1 - adam.beta1**step, 1 - adam.beta2**step


def assert_close(got, expected):
    """To the rounding of what ``got`` is stored in, and a few roundings of fp32 arithmetic."""
    torch.testing.assert_close(got.double(), expected, rtol=2**-8 if got.dtype == BF16 else 2e-6, atol=1e-6)


def check_low_rank_adam(emulated, runs, *, reset=False):
    got = runs.clone()
    steps = [i + 1 for i in range(len(runs.grads))]
    emulated.low_rank_adam(got, steps, ADAM, reset=reset)
    for i, step in enumerate(steps):
        direction, m, v = adam64(runs.grads[i].double(), runs.exp_avgs[i], runs.exp_avg_sqs[i], biases(step), ADAM)
        assert_close(got.weights[i], adamw64(runs.weights[i], direction, ADAM))
        assert_close(got.exp_avgs[i], m * (not reset))
        assert_close(got.exp_avg_sqs[i], v * (not reset))
        assert torch.equal(got.grads[i], runs.grads[i])


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
def test_low_rank_adam(emulated, reset):
    check_low_rank_adam(emulated, make_runs(SIZES), reset=reset)


@pytest.mark.parametrize("which", range(16))
def test_low_rank_adam_in_every_mixture_of_dtypes(forward, which):
    dtypes = [BF16 if which >> i & 1 else FP32 for i in range(4)]
    check_low_rank_adam(forward, make_runs([5, CHUNK + 7], dtypes))


@pytest.mark.parametrize("offsets", [(1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_low_rank_adam_on_runs_that_begin_anywhere(forward, offsets, dtype):
    """The slower path is right, and it is taken: a load of 16 bytes at such an address would raise."""
    check_low_rank_adam(forward, make_runs([3, 2048, CHUNK + 7], (dtype,) * 4, offsets))


def test_more_tensors_than_a_table_holds(forward):
    check_low_rank_adam(forward, make_runs([7] * 90))


def test_a_tensor_of_more_chunks_than_a_table_holds(forward):
    """It goes on in the next launch, behind others and before others."""
    check_low_rank_adam(forward, make_runs([100, (BLOCKS + 5) * CHUNK + 3, 0, 5, (BLOCKS - 9) * CHUNK, 9]))


def test_one_call_equals_many(forward):
    """No table, chunk or neighbour changes a bit."""
    together = make_runs(SIZES)
    alone = together.clone()
    forward.low_rank_adam(together, [3] * len(SIZES), ADAM)
    for i in range(len(SIZES)):
        forward.low_rank_adam(Runs(*([tensors[i]] for tensors in alone)), [3], ADAM)
    for one, other in zip(sum(together, []), sum(alone, []), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", [(FP32,) * 4, (FP32, BF16, FP32, FP32), (FP32, BF16, BF16, FP32), (BF16,) * 4])
def test_projected_adam(emulated, dtypes):
    runs = make_runs(SIZES, dtypes)
    got, steps = runs.clone(), [2 * i + 1 for i in range(len(SIZES))]
    directions = emulated.projected_adam(got, steps, ADAM, 0.25)
    for i, step in enumerate(steps):
        direction, m, v = adam64(runs.grads[i].double(), runs.exp_avgs[i], runs.exp_avg_sqs[i], biases(step), ADAM)
        assert_close(directions[i], 0.25 * direction)
        assert_close(got.exp_avgs[i], m)
        assert_close(got.exp_avg_sqs[i], v)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.uint8], ids=["fp32", "bf16", "bytes"])
def test_momentum_reset(emulated, dtype, offset):
    """Zeros in the tensors and nowhere beside them."""
    sizes = [*SIZES, 64 * CHUNK + 3]
    whole = [torch.ones(offset + n + 40, dtype=dtype) for n in sizes]
    emulated.momentum_reset([t[offset : offset + n] for t, n in zip(whole, sizes, strict=True)])
    for t, n in zip(whole, sizes, strict=True):
        assert not t[offset : offset + n].any()
        assert t[:offset].all() and t[offset + n :].all()


SPAM = StableSpam(gamma1=0.85, gamma2=0.999, theta=0.99, norm_eps=1e-8)


def spam64(grad, statistics, k, spam):
    """The clipped and normalized gradient, and the new statistics M, a, b."""
    largest, (mean, a, b) = grad.abs().max(), statistics.double()
    mean = spam.theta * mean + (1 - spam.theta) * largest
    threshold = mean / (1 - spam.theta**k)
    grad = torch.where(grad.abs() > threshold, grad * threshold / largest, grad)
    n = grad.norm()
    a = spam.gamma1 * a + (1 - spam.gamma1) * n
    b = spam.gamma2 * b + (1 - spam.gamma2) * n**2
    a_hat, b_hat = a / (1 - spam.gamma1**k), b / (1 - spam.gamma2**k)
    return grad / n * a_hat / (b_hat.sqrt() + spam.norm_eps), torch.stack([mean, a, b])


@pytest.mark.parametrize("dtypes", [(FP32,) * 4, (FP32, BF16, FP32, FP32), (BF16,) * 4])
def test_stable_spam_adam(emulated, dtypes):
    """Three updates, in which one gradient has a spike."""
    sizes = [n for n in SIZES if n]
    runs = make_runs(sizes, dtypes)
    statistics = torch.zeros(len(sizes), 3)
    for t in range(1, 4):
        for grad in runs.grads:
            grad[0] = 30 if t == 2 else grad[0]
        got, new = runs.clone(), statistics.clone()
        emulated.stable_spam_adam(got, new, [t] * len(sizes), _per_tensor(biases(t), sizes), ADAM, SPAM)
        for i in range(len(sizes)):
            grad, expected = spam64(runs.grads[i].double(), statistics[i], t, SPAM)
            assert_close(new[i], expected)
            direction, m, v = adam64(grad, runs.exp_avgs[i], runs.exp_avg_sqs[i], biases(t), ADAM)
            assert_close(got.weights[i], adamw64(runs.weights[i], direction, ADAM))
            assert_close(got.exp_avgs[i], m)
            assert_close(got.exp_avg_sqs[i], v)
        runs, statistics = got, new


def _per_tensor(pair, sizes):
    return [pair[0]] * len(sizes), [pair[1]] * len(sizes)


@pytest.mark.parametrize("sizes", [[9] * 110, [5, (BLOCKS + 5) * CHUNK + 3, 7]], ids=["tensors", "chunks"])
def test_stable_spam_adam_over_several_tables(forward, sizes):
    runs, statistics = make_runs(sizes), torch.zeros(len(sizes), 3)
    for i, grad in enumerate(runs.grads):
        grad.mul_(i + 1)
    forward.stable_spam_adam(runs, statistics, [1] * len(sizes), _per_tensor(biases(1), sizes), ADAM, SPAM)
    for grad, row in zip(runs.grads, statistics, strict=True):
        assert_close(row, spam64(grad.double(), torch.zeros(3), 1, SPAM)[1])


def test_stable_spam_adam_repeats_to_the_bit_in_every_order(library):
    results = []
    for schedule in SCHEDULES.values():
        runs, statistics = make_runs([5 * CHUNK + 3]), torch.zeros(1, 3)
        Emulated(library, schedule).stable_spam_adam(runs, statistics, [1], ([0.1], [0.001]), ADAM, SPAM)
        results.append([statistics, *runs.weights])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_stable_spam_adam_of_a_zero_gradient(forward):
    """The statistics decay, the gradient stays zero, nothing is NaN."""
    runs, statistics = make_runs([10]), torch.ones(1, 3)
    runs.grads[0].zero_()
    runs.exp_avgs[0].zero_()
    before = runs.clone()
    forward.stable_spam_adam(runs, statistics, [7], ([0.5], [0.5]), ADAM, SPAM)
    assert_close(statistics[0], torch.tensor([SPAM.theta, SPAM.gamma1, SPAM.gamma2], dtype=torch.float64))
    assert_close(runs.weights[0], before.weights[0].double() * (1 - ADAM.lr * ADAM.weight_decay))
    assert not runs.exp_avgs[0].any()


def test_a_gradient_that_is_not_a_number_is_not_taken_for_a_small_one(emulated):
    runs, statistics = make_runs([2 * CHUNK]), torch.zeros(1, 3)
    runs.grads[0][CHUNK + 77] = torch.nan
    emulated.stable_spam_adam(runs, statistics, [1], ([0.1], [0.001]), ADAM, SPAM)
    assert statistics.isnan().all()


def test_empty_lists(forward):
    nothing = Runs([], [], [], [])
    forward.momentum_reset([])
    forward.low_rank_adam(nothing, [], ADAM)
    assert forward.projected_adam(nothing, [], ADAM, 1.0) == []
    forward.stable_spam_adam(nothing, torch.zeros(0, 3), [], ([], []), ADAM, SPAM)


def test_rounding_to_bf16_is_torchs(library):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.00390625, 1.01171875, 3.4e38, 1e-40])
    values = torch.cat([edges, bits.view(FP32)])
    got = torch.empty(values.numel(), dtype=BF16)
    pointers = (ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(got.data_ptr()))
    library.emulated_to_bfloat16(ctypes.c_int64(values.numel()), *pointers)
    torch.testing.assert_close(got, values.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_a_reduction_follows_another_at_once(emulated):
    values = torch.arange(512.0)  # a value for each thread of a block of the kernels
    assert (emulated.wrong_kernel("reductions", values) == 6 * values.sum()).all()


# The tables, with the constants of a real build and for tensors that fit into no memory here.


def compile_tables(folder, csrc=CSRC):
    return ctypes.CDLL(compile_all(folder, [csrc / "emulation/tables.cpp"], "tables.so", link=["-shared"]))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return compile_tables(tmp_path_factory.mktemp("tables"))


LARGE = [2**31 + 5, 1, 0, 3 * 2**31 + 32768, 32768, 2**33 - 1, 7] + [100] * 300


def assert_tables_cover(tables, of_floats):
    """Every element of every tensor is some block's, once; all lists' addresses are those of the same elements."""
    width, record = (4, tables.record_floats) if of_floats else (1, tables.record_bytes)
    chunk = tables.chunk_elements() * (1 if of_floats else 8)
    assert (tables.chunk_elements(), tables.blocks_of_launch()) == (32768, 256)
    bases = np.array([2**44 * i + 2**40 * of_list for i in range(1, 1 + len(LARGE)) for of_list in (0, 1)], np.uint64)
    blocks = np.zeros(
        sum(-(-n // chunk) for n in LARGE),
        np.dtype([("begin", np.uint64, 2), ("size", np.int64), ("launch", np.int32), ("tensor", np.int32)]),
    )
    sizes = np.array(LARGE, np.int64)
    record.restype = ctypes.c_int64
    at = [ctypes.c_void_p(array.ctypes.data) for array in (sizes, bases, blocks)]
    assert record(len(LARGE), at[0], at[1], ctypes.c_int64(len(blocks)), at[2]) == len(blocks)
    assert (np.bincount(blocks["launch"]) <= 256).all() and (blocks["size"] <= chunk).all()
    for i, size in enumerate(LARGE):
        own = blocks[blocks["tensor"] == i]
        first = np.concatenate([[0], np.cumsum(own["size"])])
        assert first[-1] == size
        for of_list in (0, 1):
            offsets = own["begin"][:, of_list] - bases[2 * i + of_list]
            assert (offsets == width * first[:-1].astype(np.uint64)).all()


@pytest.mark.parametrize("of_floats", [True, False], ids=["elements", "bytes"])
def test_tables_of_tensors_above_two_to_the_31_elements(tables, of_floats):
    assert_tables_cover(tables, of_floats)


def mutated(folder, name, old, new):
    """A copy of csrc/ with a mistake in it."""
    shutil.copytree(CSRC, folder / "csrc")
    path = folder / "csrc" / name
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return folder / "csrc"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "static_cast<int64_t>(chunk_of_block[blockIdx.x]) * Size",
            "static_cast<int32_t>(chunk_of_block[blockIdx.x] * Size)",
        ),
        ("int64_t chunks_of(int64_t size,", "int64_t chunks_of(int32_t size,"),
        ("table.size[tensors] = sizes[i]", "table.size[tensors] = static_cast<int32_t>(sizes[i])"),
    ],
    ids=["an offset", "a count of chunks", "a size"],
)
def test_numbers_of_32_bits_in_a_table_are_found(tmp_path, old, new):
    csrc = mutated(tmp_path, "cuda/multi_tensor.cuh", old, new)
    with pytest.raises(AssertionError):
        assert_tables_cover(compile_tables(tmp_path, csrc), True)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("cuda/elements.cuh", "return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0", "return p != nullptr"),
        pytest.param(
            "cuda/momentum_reset.cu",
            "const int head = before < bytes ? before : bytes",
            "const int head = before * 0",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["aligned() is always true", "no bytes before the first word"],
)
def test_loads_that_are_not_aligned_are_found(tmp_path, name, old, new):
    """An x86 processor does them; a GPU faults."""
    csrc = mutated(tmp_path, name, old, new)
    kernels = [csrc / path.relative_to(CSRC) for path in sources() if path.name != "wrong_kernels.cpp"]
    mutant = ctypes.CDLL(compile_all(tmp_path, kernels, "mutant.so", link=["-shared"]))
    emulated = Emulated(mutant, SCHEDULES["forward"])
    runs = make_runs([CHUNK + 7], offsets=(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="a load or store of 16 bytes at an address that is no multiple"):
        emulated.low_rank_adam(runs, [1], ADAM)
        emulated.momentum_reset(runs.exp_avgs)


# What the emulation finds, shown by kernels with one mistake each.


def in_all_schedules(library, name, values):
    """Shared memory keeps what an earlier block left there, which must not be the right answer."""
    results = {}
    for key, schedule in SCHEDULES.items():
        Emulated(library, schedule).wrong_kernel(name, -values)
        results[key] = Emulated(library, schedule).wrong_kernel(name, values)
    return results


VALUES = torch.arange(1.0, 97.0)


def test_a_missing_barrier_shows_in_some_order(library):
    """Not in all: forwards each thread reads what the one before it has written. Hence several orders."""
    expected = VALUES.roll(1)
    wrong = in_all_schedules(library, "neighbour without its barrier", VALUES)
    assert all(torch.equal(out, expected) for out in in_all_schedules(library, "neighbour", VALUES).values())
    assert not all(torch.equal(out, expected) for out in wrong.values())
    assert torch.equal(wrong["forward"][1:], expected[1:])
    assert not torch.equal(wrong["reverse"][1:], expected[1:])


@pytest.mark.parametrize("which", [0, 1])
def test_the_kernels_own_reduction_needs_each_of_its_barriers(tmp_path, which):
    """They are taken out of a copy, one by one."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    header = tmp_path / "csrc/cuda/reduce.cuh"
    parts = header.read_text(encoding="utf-8").split("  __syncthreads();")
    assert len(parts) == 3
    barrier = ["  __syncthreads();"] * 2
    barrier[which] = ""
    header.write_text(parts[0] + barrier[0] + parts[1] + barrier[1] + parts[2], encoding="utf-8")
    mutant = compile_all(tmp_path, [tmp_path / "csrc/emulation/wrong_kernels.cpp"], "mutant.so", link=["-shared"])
    results = in_all_schedules(ctypes.CDLL(mutant), "reductions", torch.arange(512.0)).values()
    assert not all((out == 6 * torch.arange(512.0).sum()).all() for out in results)


def test_shared_memory_written_too_early_shows(library):
    expected = VALUES
    for _ in range(4):
        expected = expected + expected.roll(-1)
    assert all(torch.equal(out, expected) for out in in_all_schedules(library, "rounds", VALUES).values())
    wrong = in_all_schedules(library, "rounds without the second barrier", VALUES)
    assert not all(torch.equal(out, expected) for out in wrong.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier of some", r"thread 1 waits at a barrier, .*wrong_kernels.cpp:\d+, and thread 0 has ended"),
        ("barrier after return", "thread 1 waits at a barrier, .* and thread 0 has ended"),
        ("two barriers", "thread 0 waits at a barrier, .* and thread 32 waits at a barrier"),
        ("shuffle of some", "thread 0 waits at a shuffle, .* and thread 3 has ended"),
    ],
)
def test_divergence_raises(emulated, name, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.wrong_kernel(name, VALUES)


def test_warps_need_not_keep_step(emulated):
    out = emulated.wrong_kernel("warp sums", VALUES)
    assert (out[:32] == VALUES[:32].sum()).all()
    assert torch.equal(out[32:], VALUES[32:])


@pytest.mark.slow
def test_memory_beside_a_tensor_is_not_touched(tmp_path):
    """Under the address sanitizer, which is shown to notice a kernel of one thread too many."""
    kernels = [source for source in sources() if source.suffix == ".cu"]
    program = compile_all(tmp_path, [*kernels, CSRC / "emulation/bounds.cpp"], "bounds", ["-fsanitize=address"])
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    run([program], env=environment)
    wrong = run([program, "overrun"], env=environment, check=False)
    assert wrong.code != 0
    assert "heap-buffer-overflow" in wrong.stderr
