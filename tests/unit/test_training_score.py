"""What is scored is what was trained, with the tokenizer that it was trained with, or nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalr.checkpoint.__main__ import main as tool
from megalr.checkpoint.export.weights import Weights
from megalr.checkpoint.saving import write_entries
from megalr.data import DataConfig, load_data
from megalr.data.tokenizer import EMBEDDED_TOKENIZER, digest_of_tokenizer, load_tokenizer
from megalr.errors import UserError
from megalr.layout.rectangles import Entry
from megalr.train.models import build_model, config_from_dict, fit_to_text
from megalr.train.ranks import Ranks
from megalr.train.score import parse_score_arguments, score
from tests import known_state
from tests.known_state import flip

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FULL = {"parametrization": {"type": "full"}}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("The sun is warm and the sea is cold.\n" * 40)
    return ["--dataset", str(path), "--sequence-length", "16"]


def exchanged_tokenizer(folder):
    """With as many entries and the same special tokens; two entries are exchanged."""
    content = json.loads(EMBEDDED_TOKENIZER.read_text(encoding="utf-8"))
    entries = content["model"]["vocab"]
    entries["a"], entries["e"] = entries["e"], entries["a"]
    path = folder / "exchanged.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def model_of(vocabulary=4096, seed=0):
    config = config_from_dict({**SHAPE, "vocab_size": vocabulary, "max_position_embeddings": 64})
    fit_to_text(config, load_tokenizer(None), 16)
    return build_model(config, seed=seed)


def save(run, updates, model, data=None, **required):
    settings = {"model": model.config.to_dict(), "megalr.parametrization": FULL["parametrization"], **required}
    document = known_state.document(updates) | {
        "client": {
            "run": {"step": updates, "tokens": updates, "required": settings, "settings": {}},
            "data": data or {},
        },
        "config": {"megalr": FULL},
        "model": json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]},
    }
    entries = {f"weights/{name}": Entry.of(p.detach()) for name, p in model.named_parameters()}
    write_entries(run / "checkpoints", f"step{updates}", document, entries, {}, keep=None, asynchronous=False)


@pytest.fixture
def run(tmp_path, text):
    """With three checkpoints, of other weights each."""
    folder = tmp_path / "run"
    for updates in (1, 2, 3):
        save(folder, updates, model_of(seed=updates))
    settings = {
        "command": "pretrain.py",
        "deepspeed": {"train_micro_batch_size_per_gpu": 4, "megalr": FULL},
        "model": model_of().config.to_dict(),
        "data": {"dataset": text[1], "tokenizer": None, "sequence_length": 16, "pack": True},
    }
    (folder / "run.json").write_text(json.dumps(settings, default=str))
    return folder


@pytest.fixture
def export(tmp_path):
    """Of a model, with its tokenizer."""
    model_of().save_pretrained(tmp_path / "export")
    load_tokenizer(None).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def scored(capsys, *words):
    score(parse_score_arguments([str(word) for word in words]), ALONE)
    return capsys.readouterr().out


def perplexity(output):
    return re.search("held-out perplexity ([0-9,.]+) ", output).group(1)


def change_settings(run, section, **values):
    path = run / "run.json"
    content = json.loads(path.read_text())
    content[section] |= values
    path.write_text(json.dumps(content))


def damage(run, tag):
    flip(run / "checkpoints" / tag / "rank-00000.safetensors", -8)


def test_the_newest_checkpoint_is_named(run, capsys):
    output = scored(capsys, run)
    assert f"{run / 'checkpoints' / 'step3'} (3 updates)" in output
    assert perplexity(output) == perplexity(scored(capsys, run / "checkpoints" / "step3"))
    assert perplexity(output) != perplexity(scored(capsys, run / "checkpoints" / "step2"))


def test_a_score_shows_how_far_it_is(run, capsys):
    score(parse_score_arguments([str(run)]), ALONE)
    printed = capsys.readouterr()
    tokens = re.search(r", ([\d,]+) tokens\)", printed.out).group(1).replace(",", "")
    assert re.search(rf"100%\|.*\| {tokens}/{tokens} \[", printed.err)


def test_damaged_weights_are_not_scored(run, capsys):
    damage(run, "step2")
    with pytest.raises(
        UserError, match=r"other values of .*\nNothing was scored; .* newest that is whole is \"step3\""
    ):
        scored(capsys, run / "checkpoints" / "step2")
    assert "passed over" not in scored(capsys, run)  # nothing newer is


@pytest.mark.parametrize("how", ["data", "manifest"])
def test_an_older_checkpoint_is_scored_by_its_name_alone(run, capsys, how):
    if how == "data":
        damage(run, "step3")
    else:
        (run / "checkpoints" / "step3" / "manifest.json").write_text("{")
    with pytest.raises(UserError) as error:
        scored(capsys, run)
    assert "the newest checkpoint of" in str(error.value) and "step3" in str(error.value)
    assert f"Nothing was scored. The newest that is whole is step2: to have that one scored, name {run}" in str(
        error.value
    )
    assert "step2 (2 updates)" in scored(capsys, run / "checkpoints" / "step2")


def test_what_else_cannot_be_read_is_named(run, capsys):
    (run / "checkpoints" / "app").mkdir()
    (run / "checkpoints" / "app" / "manifest.json").write_text("{}")
    (run / "checkpoints" / "latest").write_text("step4")
    output = scored(capsys, run)
    assert "passed over: " in output and "app/manifest.json" in output
    assert "`latest` names step4, which is not there" in output
    assert "step3 (3 updates)" in output


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", {"hidden_size": 16}, "model.hidden_size: 8 -> 16"),
        ("deepspeed", {"megalr": {"parametrization": {"type": "low_rank", "rank": 4}}}, "megalr.parametrization"),
    ],
)
def test_another_runs_settings_are_refused(run, capsys, section, values, words):
    change_settings(run, section, **values)
    with pytest.raises(UserError, match="run.json is not of the run that has written .*step3") as error:
        scored(capsys, run)
    assert words in str(error.value)


def test_what_is_no_folder(run, capsys):
    for path, words in ((run / "nothing", "No such file"), (run / "run.json", "Not a directory")):
        with pytest.raises(UserError, match=f"{path.name} cannot be read as a folder: {words}"):
            scored(capsys, path)


def test_settings_that_are_cut_are_refused(run, capsys):
    path = run / "run.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"run\.json is not valid JSON.* export .*checkpoints OUT"):
        scored(capsys, run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run, export, capsys, text, value):
    model = model_of()
    model.model.norm.weight.data[3] = value
    save(run, 4, model)
    with pytest.raises(UserError, match="step4 has weights that are not finite: model.norm.weight"):
        scored(capsys, run)
    model.save_pretrained(export)
    with pytest.raises(UserError, match="export has weights that are not finite: model.norm.weight"):
        scored(capsys, export, *text)


def test_an_export_that_is_not_whole_is_refused(export, capsys, text):
    path = export / "model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="export cannot be read as a model .* write the export again"):
        scored(capsys, export, *text)
    first, *others = sorted(weights)
    save_file({name: weights[name] for name in others}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"not those of the model .*missing: {first}"):
        scored(capsys, export, *text)
    save_file({**weights, "model.layers.0.more": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those of the model .*unexpected: model.layers.0.more"):
        scored(capsys, export, *text)
    path.unlink()
    with pytest.raises(UserError, match="export cannot be read as a model"):
        scored(capsys, export, *text)
    path.write_bytes(whole)
    assert "perplexity" in scored(capsys, export, *text)


def test_an_export_without_a_tokenizer_is_scored_with_the_one_that_is_named(export, capsys, text):
    with_it = perplexity(scored(capsys, export, *text))
    for path in export.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="export has no tokenizer .* write --tokenizer"):
        scored(capsys, export, *text)
    assert perplexity(scored(capsys, export, *text, "--tokenizer", EMBEDDED_TOKENIZER)) == with_it


def other_tokenizer(folder, end="</s>", entries=None):
    """The embedded one with another end-of-text token, and perhaps fewer merges."""
    content = json.loads(EMBEDDED_TOKENIZER.read_text())
    if entries is not None:
        content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if v < entries}
        content["model"]["merges"] = []
    if end is not None:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 4096, "content": end})
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def test_an_export_with_another_models_tokenizer_is_refused(export, tmp_path, capsys, text):
    model_of(vocabulary=4200).save_pretrained(export)
    other = other_tokenizer(tmp_path)
    load_tokenizer(str(other)).save_pretrained(export)
    with pytest.raises(UserError, match="has the end-of-text token 0, the tokenizer 4096: .* Write --tokenizer"):
        scored(capsys, export, *text)
    output = scored(capsys, export, *text, "--tokenizer", other)  # whoever names it has it, and is told
    assert "it is not the one that the model was trained with" in output and "perplexity" in output
    model_of(vocabulary=4096).save_pretrained(export)
    with pytest.raises(UserError, match="vocabulary has 4,096 entries, the tokenizer's 4,097"):
        scored(capsys, export, *text, "--tokenizer", other)


def test_a_vocabulary_that_is_much_larger_is_mentioned(export, capsys, text):
    model_of(vocabulary=6000).save_pretrained(export)
    assert "the model's vocabulary has 6,000 entries, the tokenizer's 4,096" in scored(capsys, export, *text)


def test_an_export_takes_the_tokenizer_of_its_run(run, tmp_path, capsys):
    assert tool(["export", str(run / "checkpoints"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "no tokenizer" not in capsys.readouterr().err
    text = ["--dataset", str(tmp_path / "words.txt"), "--sequence-length", "16"]
    assert perplexity(scored(capsys, tmp_path / "out", *text)) == perplexity(scored(capsys, run))
    assert tool(["export", str(run / "checkpoints" / "step2"), str(tmp_path / "one"), "--to", "hf"]) == 0
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    change_settings(run, "data", tokenizer="gone.json")  # and an earlier export's does not stay beside a new model
    assert tool(["export", str(run / "checkpoints"), str(tmp_path / "one"), "--to", "hf", "--overwrite"]) == 0
    assert "no tokenizer is saved" in capsys.readouterr().err
    assert not list((tmp_path / "one").glob("tokenizer*"))


@pytest.mark.parametrize("what", ["moved", "lost", "larger"])
def test_where_the_runs_tokenizer_cannot_be_had_that_is_said(run, tmp_path, capsys, what):
    place = run / "checkpoints"
    if what == "moved":
        place = place.rename(tmp_path / "elsewhere")
    elif what == "lost":
        change_settings(run, "data", tokenizer=str(tmp_path / "gone.json"))
    else:
        change_settings(run, "data", tokenizer=str(other_tokenizer(tmp_path)))
    assert tool(["export", str(place), str(tmp_path / "out"), "--to", "hf"]) == 0
    printed = capsys.readouterr().err
    words = {"moved": "is not of a run", "lost": "gone.json", "larger": "4,097 entries and the model 4,096"}[what]
    assert "no tokenizer is saved with the model" in printed and words in printed and "--tokenizer names one" in printed
    assert not list((tmp_path / "out").glob("tokenizer*"))
    shutil.rmtree(tmp_path / "out")
    named = str(EMBEDDED_TOKENIZER) if what != "larger" else str(tmp_path / "tokenizer.json")
    code = tool(["export", str(place), str(tmp_path / "out"), "--to", "hf", "--tokenizer", named])
    assert code == (2 if what == "larger" else 0)


def test_a_tokenizer_that_has_changed_is_not_scored_with_or_exported(run, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    shutil.copy(EMBEDDED_TOKENIZER, mine)
    change_settings(run, "data", tokenizer=str(mine))
    save(run, 4, model_of(), data={"tokenizer": digest_of_tokenizer(load_tokenizer(str(mine)))})
    right = perplexity(scored(capsys, run))
    shutil.copy(exchanged_tokenizer(tmp_path), mine)
    with pytest.raises(UserError, match=r"mine.json is not the one .* or has changed since. Write --tokenizer"):
        scored(capsys, run)
    assert tool(["export", str(run / "checkpoints"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "no tokenizer is saved with the model" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "has changed since" in scored(capsys, run, "--tokenizer", mine)  # the user's choice
    output = scored(capsys, run, "--tokenizer", EMBEDDED_TOKENIZER)
    assert "has changed since" not in output and perplexity(output) == right


def test_another_tokenizer_than_the_exports_own_is_said(export, tmp_path, text, capsys):
    assert "exchanged.json is not the one" in scored(
        capsys, export, *text, "--tokenizer", exchanged_tokenizer(tmp_path)
    )
    assert "is not the one" not in scored(capsys, export, *text, "--tokenizer", EMBEDDED_TOKENIZER)


@pytest.mark.parametrize("known", ["data", "held_out"])
def test_a_text_that_has_changed_is_scored_if_it_is_named_alone(run, text, capsys, known):
    config = DataConfig(dataset=text[1], sequence_length=16)
    read = load_data(config, load_tokenizer(None), rank=0, barrier=lambda: None)
    digests = {"data": read.train.fingerprint, "held_out": read.evaluation.fingerprint}
    save(run, 4, model_of(), data={known: digests[known]})
    assert "step4 (4 updates)" in scored(capsys, run)
    with Path(text[1]).open("a") as file:
        file.write("The rain is cold and the fire is warm.\n" * 40)
    for flags in (
        [],
        ["--dataset", text[1]],
        ["--sequence-length", "8"],
        ["--max-eval-tokens", "20"],
        ["--test-half"],
        ["--no-pack"],
    ):
        with pytest.raises(UserError, match=rf"not the one that the run in .* names \(dataset {text[1]}.*has changed"):
            scored(capsys, run, *flags)
    other = Path(text[1]).with_name("other.txt")
    other.write_text("The moon is far and the wood is near.\n" * 9)
    assert "step4 (4 updates)" in scored(capsys, run, "--eval-dataset", other)


def numbers(path, seed, count=600):
    path.write_text(" ".join(str((seed + 1) * (at + 7) ** 3 % 997) for at in range(count)))
    return path


@pytest.fixture
def novels(run, tmp_path):
    """Four files, of which the run has been trained on three; it knows them by their digests."""
    (tmp_path / "novels").mkdir()
    for seed in range(4):
        numbers(tmp_path / "novels" / f"{seed}.txt", seed)
    know(run, dataset=str(tmp_path / "novels"))
    return tmp_path / "novels"


def know(run, **text):
    config = DataConfig(**{"sequence_length": 16, **text})
    read = load_data(config, load_tokenizer(None), rank=0, barrier=lambda: None)
    change_settings(run, "data", **text)
    digests = {"data": read.train.fingerprint, "held_out": read.evaluation.fingerprint}
    save(run, 5, model_of(), data={**digests, "tokenizer": digest_of_tokenizer(load_tokenizer(None))})


REFUSED = r"([0-9,]+) of the ([0-9,]+) tokens to be scored are text that the run in .* was trained on.* Leave out "


def refused(capsys, *words):
    with pytest.raises(UserError, match=REFUSED) as error:
        scored(capsys, *words)
    found = re.search(REFUSED, str(error.value))
    return [int(number.replace(",", "")) for number in found.groups()], str(error.value)


def test_what_was_trained_on_is_not_scored_whichever_flags_say_so(run, novels, tmp_path, capsys):
    one = novels / "1.txt"
    know(run, dataset=str(one), max_eval_tokens=40)
    right = perplexity(scored(capsys, run))
    (trained, of), message = refused(capsys, run, "--max-eval-tokens", "90")
    assert (trained, of) == (50, 90) and "Leave out --max-eval-tokens for the 40 tokens that" in message
    (trained, of), message = refused(capsys, run, "--max-train-tokens", "1000")
    assert (trained, of) == (40, 40) and "Leave out --max-train-tokens for" in message
    assert perplexity(scored(capsys, run, "--max-eval-tokens", "40", "--micro-batch-size", "2")) == right
    for flags in (["--max-eval-tokens", "30"], ["--sequence-length", "32"], ["--test-half"], ["--no-pack"]):
        assert "perplexity" in scored(capsys, run, *flags)
    moved = one.rename(tmp_path / "moved.txt")
    new = numbers(tmp_path / "new.txt", 7)
    for flags in ([], ["--eval-dataset", new]):
        with pytest.raises(
            UserError, match=r"trained on cannot be read: there is no file.*--dataset and any other text"
        ):
            scored(capsys, run, *flags)
    output = scored(capsys, run, "--dataset", novels / "2.txt", "--eval-dataset", new)  # as the message says
    assert "WARNING: the text that the run was trained on cannot be read" in output and "perplexity" in output
    assert perplexity(scored(capsys, run, "--dataset", moved)) == right
    refused(capsys, run, "--dataset", moved, "--max-eval-tokens", "90")
    output = scored(capsys, run, "--dataset", novels / "2.txt")
    assert "WARNING: the text that the run was trained on cannot be read (there is no file" in output


def test_files_of_the_training_text_and_their_copies_are_not_scored(run, novels, tmp_path, capsys):
    held_out = perplexity(scored(capsys, run))
    copy = shutil.copy(novels / "1.txt", tmp_path / "copy.txt")
    for file in (novels / "1.txt", copy):
        (trained, of), message = refused(capsys, run, "--dataset", file)
        assert trained == of and "Leave out --dataset for" in message
        with pytest.raises(UserError, match=r"both in the training|byte for byte"):
            scored(capsys, run, "--eval-dataset", file)
    assert "perplexity" in scored(capsys, run, "--dataset", numbers(tmp_path / "new.txt", 8))
    assert "perplexity" in scored(capsys, run, "--dataset", novels / "3.txt")  # which is held out
    assert perplexity(scored(capsys, run, "--eval-dataset", numbers(tmp_path / "more.txt", 9))) != held_out
    rows = tmp_path / "rows.jsonl"  # another file, with documents of the training text
    rows.write_text(json.dumps({"text": (novels / "0.txt").read_text()}) + '\n{"text": "one two"}\n')
    assert re.search(
        "WARNING: [0-9,]+ of the [0-9,]+ held-out tokens are in documents that are in the training text",
        scored(capsys, run, "--eval-dataset", rows),
    )


def test_a_hub_datasets_part_is_refused_of_local_text(run, capsys):
    with pytest.raises(UserError, match="--dataset-config en is for a dataset of the hub, .*words.txt: leave it out"):
        scored(capsys, run, "--dataset-config", "en")


def test_a_checkpoint_that_is_replaced_while_it_is_scored_is_refused(run, capsys, monkeypatch):
    load = Weights.state_dict

    def load_and_replace(weights):
        found = load(weights)
        save(run, 3, model_of(seed=7))
        return found

    monkeypatch.setattr(Weights, "state_dict", load_and_replace)
    for folder in (run, run / "checkpoints" / "step3"):
        with pytest.raises(UserError, match="step3 was replaced by another save while it was read: run again"):
            scored(capsys, folder)
