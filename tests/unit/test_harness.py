"""``megalr evaluate --tasks``: lm_eval scores the model that was trained, or a sentence says why not."""

import importlib.util
import json
import re
import shutil

import pytest
import torch

from megalr.data.tokenizer import load_tokenizer
from megalr.errors import UserError
from megalr.train import harness
from megalr.train.models import build_model, config_from_dict, fit_to_text
from megalr.train.ranks import Ranks
from megalr.train.score import _results_folder, parse_score_arguments, score
from tests.processes import ROOT

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
TASKS = ROOT / "tests" / "fixtures" / "tasks"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install lm-eval accelerate"
)


@pytest.fixture
def model():
    config = config_from_dict(
        {
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"vocab_size": 4096, "max_position_embeddings": 512, "initializer_range": 1.0},
        }
    )
    fit_to_text(config, load_tokenizer(None), 256)
    return build_model(config, seed=3)


@pytest.fixture
def exported(tmp_path, model):
    folder = tmp_path / "an export"
    model.save_pretrained(folder)
    load_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The folder of a task whose data are where its file says."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    file = folder / "next_word.yaml"
    data = json.dumps({"data_files": {"test": str(folder / "next_word.jsonl")}})
    file.write_text(f"{file.read_text()}dataset_kwargs: {data}\n")
    return folder


def run(*words):
    score(parse_score_arguments([str(word) for word in words]), ALONE)


def by_hand(model):
    """The share of examples in which the right word has the largest probability after the text."""
    tokenizer, right = load_tokenizer(None), []
    for line in (TASKS / "next_word.jsonl").read_text().splitlines():
        row, likelihoods = json.loads(line), []
        for choice in row["choices"]:
            begin = len(tokenizer(row["text"]).input_ids)
            tokens = torch.tensor(tokenizer(f"{row['text']} {choice}").input_ids)
            with torch.no_grad():
                logits = model(tokens[None, :-1]).logits[0].log_softmax(-1)
            likelihoods.append(logits.gather(1, tokens[1:, None])[begin - 1 :].sum().item())
        right.append(likelihoods.index(max(likelihoods)) == row["answer"])
    return sum(right) / len(right)


@needs_lm_eval
def test_a_local_task_is_scored_as_by_hand(exported, task, model, monkeypatch, capfd):
    monkeypatch.chdir(task)  # no repository of git
    run(exported, "--tasks", "next_word", "--task-path", task)
    printed, complaints = capfd.readouterr()
    assert "fatal" not in complaints
    results = json.loads((exported / "tasks.json").read_text())
    assert results["scored"] == [str(exported)]
    expected = by_hand(model)
    assert 0 < expected < 1  # a model that says nothing would pass otherwise
    assert results["results"]["next_word"]["acc,none"] == pytest.approx(expected)
    assert results["n-samples"]["next_word"] == {"original": 8, "effective": 8}
    assert re.search(rf"\|next_word\| +1\|none +\| +0\|acc +\|↑ +\| *{expected:.3g}", printed)
    assert printed.endswith(f"wrote {exported / 'tasks.json'}\n")
    run(exported, "--tasks", "next_word", "--task-path", task, "--limit", "4")
    again = json.loads((exported / "tasks-2.json").read_text())
    assert again["n-samples"]["next_word"]["effective"] == 4
    run(exported, "--tasks", "next_word", "--task-path", task, "--limit", "1", "--output", exported / "new" / "a.json")
    assert "next_word" in json.loads((exported / "new" / "a.json").read_text())["results"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tasks", "next_wrod"], "has no task 'next_wrod': did you mean next_word"),
        (["--tasks", "next_word", "--sequence-length", "513"], "--sequence-length is 513, but the model reads at most"),
        (["--tasks", "broken"], "lm_eval cannot run broken: "),
    ],
)
def test_what_lm_eval_cannot_do_is_said(exported, task, flags, sentence):
    broken = (task / "next_word.yaml").read_text().replace("task: next_word", "task: broken")
    (task / "broken.yaml").write_text(broken.replace("next_word.jsonl", "gone.jsonl"))
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(exported, *flags, "--task-path", task)
    assert not (exported / "tasks.json").exists()


def test_without_lm_eval_a_sentence_says_what_to_install(exported, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm-evaluation-harness, which is not installed: `pip install lm-eval"):
        run(exported, "--tasks", "next_word")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--limit", "4"], "--limit goes with --tasks"),
        (["--task-path", "x"], "--task-path goes with --tasks"),
        (["--tasks", "a,,b"], "expected names with a comma between them"),
        (["--tasks", "a", "--dataset", "x.txt"], "--dataset is for the held-out perplexity"),
        (["--tasks", "a", "--galore-compatible-eval"], "--galore-compatible-eval is for the held-out perplexity"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_score_arguments(["run", *flags])


def test_scores_of_a_checkpoint_are_written_beside_the_checkpoints(tmp_path):
    assert _results_folder(tmp_path / "run" / "checkpoints" / "step3") == tmp_path / "run"
    assert _results_folder(tmp_path / "run") == tmp_path / "run"
