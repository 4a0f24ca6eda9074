"""Programs without an engine answer a wrong flag with exit code 2 and one sentence."""

import pytest

from megalr.comparison import compare
from megalr.data import train_tokenizer
from megalr.memory import table
from megalr.train.models import empty_model, read_model_config
from tests.processes import ROOT

MODELS = ROOT / "launchers" / "models"
RECIPE = str(ROOT / "launchers" / "recipes" / "paper_tiny.yaml")


def plan(words):
    return table.main(words, lambda name: empty_model(read_model_config(name, MODELS)))


def comparison(words):
    return compare.main(["--recipe", RECIPE, *words], models_folder=MODELS)


@pytest.mark.parametrize(
    ("main", "words", "sentence"),
    [
        (plan, ["--models", "tiny", "--ranks", "0"], "--ranks: 0 is not a positive whole number"),
        (plan, ["--models", "tiny", "--ranks", "8", "--processes=--"], "--processes: expected a value, not --"),
        (plan, ["--models", "tiny", "--ranks", "8", "--plugins", "nowhere.py"], "nowhere.py"),
        (plan, ["--models", "tiny"], "1 models, but 3 ranks"),
        (comparison, ["--output", "new", "--jobs", "none"], "--jobs: invalid positive value"),
        (comparison, ["--output", "new", "--dataset", "nowhere.txt"], "nowhere.txt"),
        (comparison, ["--output", "text.txt/new", "--dataset", "text.txt"], "Not a directory: "),
        (comparison, ["--output", ""], "--output: expected a name, found an empty one"),
        (train_tokenizer.main, ["text.txt", "--output", "text.txt"], "text.txt is one of the texts"),
        (train_tokenizer.main, ["text.txt", "--output", "nowhere/new.json"], "--output: nowhere/new.json is a folder"),
        (train_tokenizer.main, ["text.txt", "--output", "new.json", "--vocabulary", "9"], "--vocabulary: 9 is less"),
        (train_tokenizer.main, ["blank.txt", "--output", "new.json"], "blank.txt holds no text"),
    ],
)
def test_programs_answer_with_a_sentence(tmp_path, monkeypatch, capsys, main, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text of some words.")
    (tmp_path / "blank.txt").write_text(" \n")
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and sentence in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.txt", "text.txt"]
    assert (tmp_path / "text.txt").read_text() == "A text of some words."


def test_a_tokenizer_replaces_a_tokenizer_alone_and_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words and some more words\n" * 9)
    train = ["text.txt", "--vocabulary", "260", "--output"]
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "link.json").hardlink_to(tmp_path / "text.txt")
    for name in ("notes.json", "link.json"):
        assert train_tokenizer.main([*train, name]) == 2
        assert f"{name} is there, and is no tokenizer" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "text.txt").read_text().startswith("some words")
    assert train_tokenizer.main([*train, "new.json"]) == train_tokenizer.main([*train, "new.json"]) == 0

    def full(path, text):
        path.write_text(text[:9])
        raise OSError(28, "No space left on device")

    before = (tmp_path / "new.json").read_text()
    monkeypatch.setattr(train_tokenizer, "write_and_sync", full)
    assert train_tokenizer.main([*train, "new.json"]) == 2
    assert (tmp_path / "new.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"link.json", "new.json", "notes.json", "text.txt"}
