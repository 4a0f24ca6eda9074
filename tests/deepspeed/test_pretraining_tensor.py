"""The pretraining program with layers that two processes share, against one process."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.deepspeed.test_rules import assert_same_weights
from tests.end_to_end.commands import EVALUATE, ROOT, losses, perplexity, plain, run, small_run

pytestmark = pytest.mark.distributed
TRAIN = "tests.deepspeed.pretraining:train"
CONFIGS = ["zero1_lowrank_tp2.json", "zero2_galore_tp2.json"]
STEPS = 8


@pytest.fixture(scope="module", params=CONFIGS)
def runs(request, ranks, tmp_path_factory):
    """The folders of a run of two processes, and of one process with the same JSON but for "tensor_parallel"."""
    folder = tmp_path_factory.mktemp("shared layers")
    content = json.loads((ROOT / "ds_configs" / request.param).read_text())
    if "megalr" in content:
        content["megalr"]["refactorization"] = {"interval": 3}
    content["optimizer"]["params"]["lr"] = 1e-3
    found = []
    for processes in (2, 1):
        if processes == 1:
            del content["tensor_parallel"]
        config, run = folder / f"{processes}.json", folder / f"run of {processes}"
        config.write_text(json.dumps(content))
        flags = ["--deepspeed", str(config), *small_run(folder), "--steps", str(STEPS), "--save-every", "4"]
        flags += ["--batch-size", "6", "--output", str(run), "--export", str(folder / f"export of {processes}")]
        ranks(processes).run(TRAIN, flags, str(folder))
        found.append(run)
    return found


def test_two_processes_train_the_model_of_one(runs):
    two, one = runs
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for key in ("perplexity", "parameters", "trained_parameters", "tokens", "eval_tokens"):
        assert summaries[0][key] == pytest.approx(summaries[1][key], rel=1e-4)
    assert json.loads((two / "run.json").read_text())["deepspeed"]["train_batch_size"] == 6


def test_the_exported_model_is_that_of_one(runs):
    folder = runs[0].parent
    two, one = (load_file(folder / f"export of {n}" / "model.safetensors") for n in (2, 1))
    assert two.keys() == one.keys()
    assert_same_weights(two, one, 1e-3)


def test_its_run_is_scored_by_one(runs):
    two, _ = runs
    result = run([*plain(), EVALUATE, two], two.parent)
    assert result.code == 0, result.output
    assert perplexity(result.output) == pytest.approx(
        json.loads((two / "summary.json").read_text())["perplexity"], rel=1e-4
    )


def test_a_run_goes_on_with_another_number(ranks, runs):
    two, whole = runs
    resumed = two.with_name("resumed")
    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / f"checkpoints/step{STEPS}")
    (resumed / "summary.json").unlink()
    flags = ["--deepspeed", str(two.parent / "1.json"), *small_run(two.parent), "--steps", str(STEPS)]
    ranks(2).run(TRAIN, [*flags, "--batch-size", "6", "--output", str(resumed), "--resume"], str(two.parent))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)


def test_a_head_that_is_cut_by_vocabulary_is_exported(ranks, tmp_path):
    """A rank has the logits of its own tokens only; the comparison with the exported model needs all."""
    content = json.loads((ROOT / "ds_configs" / CONFIGS[0]).read_text())
    content["tensor_parallel"]["vocab_parallel_lm_head"] = True
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = ["--deepspeed", str(tmp_path / "ds.json"), *small_run(tmp_path), "--steps", "2", "--batch-size", "6"]
    ranks(2).run(
        TRAIN, [*flags, "--output", str(tmp_path / "run"), "--export", str(tmp_path / "export")], str(tmp_path)
    )
    assert (tmp_path / "export" / "model.safetensors").exists()
