"""The web page of a run: what it shows is what the folder holds, and nothing in the folder becomes markup."""

import json
import math
import os
import re
import socket
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from megalr.errors import UserError
from megalr.locks import FolderLock
from megalr.train.loss_curve import read_history as read_curve
from megalr.webpage import spectra
from megalr.webpage.__main__ import main
from megalr.webpage.axes import Axis, even_ticks, log_ticks, span
from megalr.webpage.build import page_of, write_comparison, write_page
from megalr.webpage.comparing import MOST_RUNS
from megalr.webpage.curves import DASHES, averaged, dash, smoothed, thinned
from megalr.webpage.history import read_history
from megalr.webpage.run import read_run
from megalr.webpage.spectra import effective_rank, product_values, read_spectra, singular_values
from megalr.webpage.style import CSS
from tests.unit import web_runs
from tests.unit.web_runs import evaluation, history, sample, tensors, update, write_checkpoint, write_rows, write_run

# There is no group: a process is alone, as torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MOST_BYTES = 2_000_000
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Parsed(HTMLParser):
    """Elements of a page with their attributes, the JSON of its charts, and its visible text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.data, self.words, self._in = [], [], [], []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self._in and self._in.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self._in[-1] if self._in else ("", {})
        if tag == "script":
            self.data += [json.loads(data)] if attributes.get("type") == "application/json" else []
        elif tag != "style":
            self.words.append(data)

    def tags(self):
        return {tag for tag, _ in self.elements}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def page(folder):
    return Parsed(page_of(read_run(folder)))


def points(page, chart, curve):
    """The points that a chart draws of a curve, in its own units, from the coordinates of its SVG."""
    svg = next(i for i, (tag, a) in enumerate(page.elements) if a.get("data-chart") == chart) + 1
    axes = page.elements[svg][1]
    (x0, x1), (y0, y1) = ([float(word) for word in axes[f"data-{axis}"].split()] for axis in "xy")
    logarithmic = axes["data-y-log"] == "1"
    line = next(a["d"] for _, a in page.elements[svg:] if a.get("data-curve") == curve)
    found = np.array([[float(word) for word in pair.split(",")] for pair in re.findall(r"[ML]([-\d.]+,[-\d.]+)", line)])
    share = 1 - found[:, 1] / 1000
    y = np.exp(math.log(y0) + share * math.log(y1 / y0)) if logarithmic else y0 + share * (y1 - y0)
    return x0 + found[:, 0] / 1000 * (x1 - x0), y


def column(rows, name):
    return np.array([row[name] for row in rows if row.get(name) is not None], dtype=float)


def test_the_curves_are_those_of_the_metrics(folder, page):
    rows = history()
    losses = [row for row in rows if row.get("loss") is not None]
    x, y = points(page, "loss", "training loss, each update")
    np.testing.assert_allclose(x, column(losses, "tokens"), atol=0.3)
    np.testing.assert_allclose(y, column(losses, "loss"), atol=1e-3)
    held_out = [row for row in rows if "eval_loss" in row]
    x, y = points(page, "loss", "held-out loss")
    np.testing.assert_allclose(x, column(held_out, "tokens"), atol=0.3)
    np.testing.assert_allclose(y, column(held_out, "eval_loss"), atol=1e-3)
    _, y = points(page, "perplexity", "held-out perplexity")
    np.testing.assert_allclose(y, column(held_out, "eval_perplexity"), rtol=1e-3)
    x, y = points(page, "rates", "embeddings")
    np.testing.assert_allclose(y, 0.01 / np.arange(1, 201), atol=1e-6)
    assert points(page, "rates", "factors, trunk")[1] == pytest.approx(np.full(200, 0.003), abs=1e-6)
    _, y = points(page, "gradients", "each update")
    np.testing.assert_allclose(y, column(rows, "grad_norm"), rtol=1e-3)
    _, y = points(page, "memory-time", "in use")
    np.testing.assert_allclose(y, column(rows, "memory_bytes"), rtol=1e-3)


def test_the_script_has_the_same_numbers(page):
    loss = next(each for each in page.data if each["losses"])
    curve = loss["curves"][0]
    assert curve["x"][:2] == [100, 200]
    assert curve["y"][0] == pytest.approx(update(1)["loss"], rel=1e-7) and curve["y"][76] is None
    assert {mark["name"]: mark["x"] for mark in loss["marks"]} == {
        "refactorization": [5000, 10000, 15000, 20000],
        "momentum reset": [5000, 10000, 15000, 20000],
        "skipped update": [7700],
    }


def test_everything_of_a_whole_run_is_there(page):
    for words in (
        "a run ✓ finished",
        "LlamaForCausalLM · low_rank layers, rank 4 · AdamW · ZeRO stage 2 · 2 processes on cpu",
        "held-out perplexity 88.43 unigram model 663.03",
        "updates 200 of 400",
        "training tokens 20k 1.50 epochs",
        "parameters 1.365M 1M trained",
        "step tokens reason 77 7,700 the loss is nan",
        "Roy and Vetterli, 2007",
        "Tokens per second per rank",
        "Model FLOP utilization",
        "Time of an update",
        "Memory of rank 0",
        "one rank 12.0 MB",
        "200 20,000 2.000 5.0000 best 148.41",
        "started 2026-01-02 03:04:05",
        '"gradient_clipping": 1.0',
    ):
        assert words in page.text, words
    widths = [a["style"] for _, a in page.elements if a.get("class", "").startswith("piece")][:4]
    assert widths == [f"width:{share}%" for share in ("33.333", "16.667", "16.667", "33.333")]


def test_a_run_that_was_resumed_tells_its_lives(tmp_path):
    first = {"started": "in May", "processes": 4, "from_update": 0, "to_update": 7, "ended": "SIGTERM <b>"}
    last = {"started": "in June", "processes": 1, "from_update": 7, "to_update": None, "ended": None}
    folder = write_run(tmp_path / "resumed", finished=False)
    settings = json.loads((folder / "run.json").read_text())
    assert "Lives" not in page_of(read_run(folder))
    settings["deepspeed"]["tensor_parallel"] = {"autotp_size": 2}
    command = "pretrain.py --local_rank=0 --steps 9"
    (folder / "run.json").write_text(json.dumps({**settings, "command": command, "lives": [first, last]}))
    text = page_of(read_run(folder))
    assert "<h3>Lives of the run</h3>" in text and "in May" in text and "SIGTERM &lt;b&gt;" in text
    assert "after update 7" in text
    assert "processes on cpu · tensor-parallel size 2 · started 2 times" in text
    assert "local_rank" not in text and "pretrain.py --steps 9" in text


def test_secrets_are_not_shown(folder, tmp_path):
    for text in (page_of(read_run(folder)), (write_two(folder, tmp_path)).read_text()):
        assert not [secret for secret in ("do-not-show", "hunter22", "q7!") if secret in text]
    assert "--api-key=[hidden]" in page_of(read_run(folder))


def write_two(folder, tmp_path):
    other = write_run(tmp_path / "other", finished=False)
    settings = json.loads((other / "run.json").read_text())
    settings["deepspeed"]["optimizer"]["params"]["lr"] = 0.5
    settings["deepspeed"]["wandb"]["api_key"] = "another do-not-show"
    settings["data"] = {"dataset": "https://another:hunter22@example.org/text.txt"}
    (other / "run.json").write_text(json.dumps(settings))
    out = tmp_path / "two.html"
    write_comparison([folder, other], out)
    return out


def test_several_runs_are_compared(folder, tmp_path):
    page = Parsed(write_two(folder, tmp_path).read_text())
    assert "deepspeed.optimizer.params.lr 0.003 0.5" in page.text
    assert "https://another:[hidden]@example.org/text.txt" in page.text
    assert "best 88.43" in page.text and "■ stopped" in page.text
    for name in ("a run", "other"):
        x, _ = points(page, "held-out", name)
        assert len(x) == 5
    with pytest.raises(UserError, match="named twice"):
        write_comparison([folder, folder.parent / "x" / ".." / folder.name], tmp_path / "no.html")


def test_the_page_loads_nothing(folder, page):
    links = [a[name] for _, a in page.elements for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert links and all(link.startswith("#") for link in links)
    assert page.tags().isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    text = page_of(read_run(folder))
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names)) and {link[1:] for link in links} <= set(names)


def test_text_of_others_is_no_markup(tmp_path):
    folder = tmp_path / EVIL.replace("/", "\\").replace("(", "[")
    rows = [
        update(1, events=[EVIL, "skipped"], skipped=EVIL, learning_rates={EVIL: 1.0, "b": 2.0}, seconds={EVIL: 1.0}),
        update(2, events=["</script>"], learning_rates={EVIL: 1.0, "b": 2.0}, seconds={EVIL: 2.0}),
        evaluation(2, 3.0),
    ]
    write_rows(folder, rows)
    settings = {
        "command": EVIL,
        "processes": EVIL,
        "device": EVIL,
        "arguments": {EVIL: EVIL},
        "versions": {EVIL: EVIL},
        "deepspeed": {
            EVIL: EVIL,
            "optimizer": {"type": EVIL},
            "megalr": {"parametrization": {"type": EVIL, "rank": EVIL}},
        },
        "model": {"architectures": [EVIL]},
    }
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(json.dumps({"perplexity": EVIL, "bytes_per_rank": {EVIL: 1, "weights": EVIL}}))
    name = "model.layers.0.<img src=x onerror=alert[3]>"
    write_checkpoint(folder, {f"{name}.weight": torch.eye(4)}, None)
    (folder / "checkpoints" / "<img src=y>").mkdir()
    (folder / "checkpoints" / "<img src=y>" / "manifest.json").write_text(EVIL)
    other = write_run(tmp_path / "plain")
    write_comparison([folder, other], tmp_path / "two.html")
    for text in (page_of(read_run(folder)), (tmp_path / "two.html").read_text()):
        page = Parsed(text)
        assert page.tags().isdisjoint({"img", "iframe"})
        scripts = [a for tag, a in page.elements if tag == "script"]
        assert [a for a in scripts if a != {"type": "application/json"}] == [{}]  # the page's own
        assert len(scripts) == len(page.data) + 1
        assert not [a for _, a in page.elements for key in a if key.startswith("on")]
        assert text.count("<img") == 0 and "alert(1)</script>" not in text
        assert '"><script>alert' in page.text or "&quot;" in text


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "others", "checkpoint", "all checkpoints"])
def test_what_is_no_run_is_refused(folder, tmp_path, kind):
    place, words = tmp_path / "x", "holds no run"
    if kind == "nothing":
        words = "there is no"
    elif kind == "file":
        place.write_text("")
        words = "is a file"
    elif kind in ("empty", "others"):
        place.mkdir()
    if kind == "others":
        (place / "run.json").write_text('{"scripts": {}}')
        (place / "metrics.jsonl").write_text("not\nours\n{}\n")
        (place / "checkpoints").mkdir()
    if "checkpoint" in kind:
        place, words = folder / "checkpoints", f"holds no run: its run is {folder}"
    if kind == "checkpoint":
        place /= "step200"
    with pytest.raises(UserError, match=re.escape(words)):
        write_page(place, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_states(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    assert read_run(folder).state == "stopped"
    with FolderLock() as lock:
        lock.take(folder)
        assert read_run(folder).state == "running"
        text = Parsed(page_of(read_run(folder))).text
        assert "▶ running" in text and "held-out perplexity so far 148.41" in text
    holder = {"host": "elsewhere", "pid": 1, "started": 1.0}
    (folder / ".writer.json").write_text(json.dumps(holder))
    assert read_run(folder).state == "running"  # its last row is fresh
    os.utime(folder / "metrics.jsonl", (1e9, 1e9))
    assert read_run(folder).state == "stopped"
    host = json.dumps(socket.gethostname())
    for text in (
        "[",
        f'{{"host": {host}, "pid": -7, "started": 1}}',
        f'{{"host": {host}, "pid": 1e999, "started": 1}}',
    ):
        (folder / ".writer.json").write_text(text)
        assert read_run(folder).state == "stopped"


def test_what_is_missing_or_damaged_is_said(folder, tmp_path):
    only_rows = tmp_path / "rows"
    write_rows(only_rows, history(20, new=False), end='{"step": 21, "tok')
    text = Parsed(page_of(read_run(only_rows))).text
    assert "run.json is missing." in text and "no checkpoint yet" in text and "■ stopped" in text
    assert "Learning rate " in text and "Throughput" in text and "Settings" not in text

    only_settings = tmp_path / "settings"
    only_settings.mkdir()
    (only_settings / "run.json").write_text(json.dumps(web_runs.SETTINGS))
    text = Parsed(page_of(read_run(only_settings))).text
    assert "there is no metrics.jsonl." in text and "held-out perplexity so far –" in text and "Settings" in text

    damaged = write_run(tmp_path / "damaged")
    (damaged / "run.json").write_text('{"deepspeed": {')
    (damaged / "summary.json").write_text("[1, 2]")
    (damaged / "metrics.jsonl").unlink()
    (damaged / "metrics.jsonl").symlink_to(folder / "metrics.jsonl")
    text = Parsed(page_of(read_run(damaged))).text
    assert "run.json is damaged" in text and "summary.json holds no JSON object." in text
    assert "metrics.jsonl cannot be read: it is a link" in text and "Ranks" in text
    data = next((damaged / "checkpoints" / "step200").glob("rank-*"))
    data.write_bytes(data.read_bytes()[:-1])
    (damaged / "run.json").write_text(json.dumps(web_runs.SETTINGS))
    text = Parsed(page_of(read_run(damaged))).text
    assert "Checkpoint step200 was passed over: rank-00000.safetensors has" in text and "Ranks" not in text
    (data.parent / "manifest.json").write_text("{")
    text = Parsed(page_of(read_run(damaged))).text
    assert "manifest.json is damaged" in text and "no checkpoint that can be read" in text


@pytest.mark.parametrize("text", ["1", "-0.5", "null", "true", "false", '"x"', "NaN"])
def test_settings_and_results_that_are_one_value(tmp_path, text):
    write_rows(tmp_path, history(3, new=False))
    for name in ("run.json", "summary.json"):
        (tmp_path / name).write_text(text)
    page = Parsed(page_of(read_run(tmp_path))).text
    assert "run.json holds no JSON object." in page and "summary.json holds no JSON object." in page


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("run.json", "summary.json", "metrics.jsonl", ".writer.json"):
        os.mkfifo(tmp_path / name)
    write_checkpoint(tmp_path, tensors(), None)
    run = read_run(tmp_path)
    assert run.history.is_empty and run.state == "stopped" and "it is a pipe" in run.notes[0]
    assert "Spectra of weights" in page_of(run)


def test_rows_that_a_resumed_run_wrote_again(tmp_path):
    rows = [update(s, loss=8.0 - s, events=["momentum_reset"] if s == 4 else []) for s in range(1, 6)]
    again = [
        evaluation(2, 6.5),
        update(3, loss=5.1, events=["skipped"], skipped="x"),
        update(4, loss=4.1),
        evaluation(4, 4.2),
    ]
    write_rows(tmp_path, [*rows[:4], evaluation(4, 4.6), rows[4], *again])
    found, expected = read_history(tmp_path), read_curve(tmp_path / "metrics.jsonl")
    assert found.training["tokens"].tolist() == expected.tokens.tolist()
    assert found.training["loss"].tolist() == expected.losses.tolist() == [7.0, 6.0, 5.1, 4.1]
    assert found.evaluations["eval_loss"].tolist() == expected.eval_losses.tolist() == [6.5, 4.2]
    assert found.events == {"skipped": [2]} and found.reasons == {2: "x"}


def test_samples_of_the_held_out_text_are_told_from_the_whole(tmp_path):
    rows = [evaluation(0, 8.0), update(1), sample(1, 7.0), update(2), sample(2, 6.0), update(3)]
    write_rows(tmp_path, [*rows, sample(3, 1.0), sample(2, 5.5), update(3), sample(3, 5.0)])  # from step 2 on again
    run = read_run(tmp_path)
    assert run.history.samples["eval_loss"].tolist() == [7.0, 5.5, 5.0]
    page = Parsed(page_of(run))
    assert "so far 148.41 of a sample" in page.text and "3 300 0.030 5.0000 best 148.41 a sample" in page.text
    assert points(page, "loss", "held-out loss, of a sample")[1] == pytest.approx([7, 5.5, 5], abs=0.01)
    write_rows(tmp_path, [*rows, sample(3, 1.0), evaluation(3, 4.0)])
    run = read_run(tmp_path)
    assert run.perplexity == pytest.approx(math.exp(4)) and not run.is_of_a_sample
    page = Parsed(page_of(run))
    assert "3 300 0.030 4.0000 best 54.60 whole text" in page.text  # a sample is no rival
    assert points(page, "loss", "held-out loss")[1] == pytest.approx([8, 4], abs=0.01)


def test_several_runs_tell_samples_from_the_whole(tmp_path):
    rows = [evaluation(0, 8.0), update(1), sample(1, 7.0), update(2), sample(2, 3.0), update(3)]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    write_rows(stopped, rows)
    write_rows(whole, [*rows, sample(3, 2.5), evaluation(3, 4.0)])
    write_comparison([stopped, whole], tmp_path / "two.html")
    page = Parsed((tmp_path / "two.html").read_text())
    assert points(page, "held-out", "whole, of a sample")[1] == pytest.approx([7, 3, 2.5], abs=0.01)
    assert points(page, "held-out", "whole")[1][-1] == pytest.approx(4, abs=0.01)
    kinds = [(a["data-curve"], "points" in a["class"]) for _, a in page.elements if "data-curve" in a]
    assert ("whole", True) in kinds and ("whole, of a sample", False) in kinds
    assert ("whole, of a sample", True) not in kinds
    assert "best 54.60" in page.text and page.text.count("best") == 1  # and not a sample's 20.09
    write_rows(whole, [*rows, sample(3, 2.5)])
    write_comparison([stopped, whole], tmp_path / "two.html")
    assert "best 12.18 of a sample" in Parsed((tmp_path / "two.html").read_text()).text


@pytest.mark.parametrize("tokens", [(-1e308, 1e308), (-1e308, -1e308), (1e308, 1e308)])
def test_tokens_at_the_end_of_what_a_float_is(tmp_path, tokens):
    write_rows(tmp_path, [{**update(step), "tokens": each} for step, each in enumerate(tokens, 1)])
    assert "training loss" in page_of(read_run(tmp_path))


def test_any_rows(tmp_path):
    rows = [
        update(1, loss=math.inf),
        update(2, loss=math.nan, lr="high", grad_norm=True, mfu=[1], learning_rates=[1], seconds={"forward": None}),
        update(3, loss=1e308, tokens=1 << 62, exchange_bytes=-5, tokens_per_second=-1e300),
        update(4, loss=-1e308, events=[]),
        {"step": 10**400, "tokens": 1, "loss": 1.0},
        {"step": 5, "tokens": None, "loss": 1.0},
        {"step": 6, "tokens": -(10**9), "loss": 0.0, "learning_rates": {str(i): float(i) for i in range(500)}},
        {"step": 7, "tokens": 700, "eval_loss": math.inf, "eval_perplexity": math.inf},
        {"step": 8, "tokens": 800, "eval_loss": 1e200, "eval_perplexity": -1.0},
        *(update(10 + i, events=[f"event {i}"]) for i in range(60)),
    ]
    write_rows(tmp_path, rows)
    text = page_of(read_run(tmp_path))
    page = Parsed(text)
    assert "infinite loss 1" in page.text and "other events 36" in page.text
    assert "nan" not in "".join(a.get("d", "") for _, a in page.elements) and len(text) < MOST_BYTES


def test_spikes_leave_the_curve_legible(tmp_path):
    write_rows(tmp_path, [update(step, loss=1e9 if step == 150 else 4.0 + 0.1 * (step % 7)) for step in range(1, 300)])
    page = Parsed(page_of(read_run(tmp_path)))
    loss = next(each for each in page.data if each["losses"])
    assert loss["y"]["high"] < 6 and "1 losses lie above the chart" in page.text


def test_old_runs_have_no_empty_charts(tmp_path):
    text = Parsed(page_of(read_run(write_run(tmp_path / "old", new=False)))).text
    for words in ("utilization", "TFLOP", "per rank ", "Time of an update", "Memory of rank 0", "Learning rates"):
        assert words not in text.replace("bytes per rank", ""), words


def make_long(folder, updates):
    """A run of so many updates, with an event in each."""
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, updates + 1):
            events = ["refactorization", "momentum_reset"] if step % 2 else ["skipped"]
            row = update(step, events=events, skipped="the loss stands out", **web_runs.measured(step))
            file.write(json.dumps(row) + "\n")
            if step % 10 == 0:
                file.write(json.dumps(evaluation(step, 4.0 + 1 / step)) + "\n")
    return folder


@pytest.mark.parametrize("updates", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_page_of_a_long_run_is_small(tmp_path, updates):
    out = tmp_path / "out.html"
    write_page(make_long(tmp_path / "run", updates), out)
    assert out.stat().st_size < MOST_BYTES
    x, y = points(Parsed(out.read_text()), "loss", "training loss, each update")
    assert 1000 < len(x) < 2000 and x[-1] == pytest.approx(100 * updates, rel=1e-3)
    assert y.min() == pytest.approx(min(update(s)["loss"] for s in range(updates - 99, updates + 1)), abs=1e-3)


def test_thinning_keeps_extremes_and_gaps():
    x, y = np.arange(10_000.0), np.sin(np.arange(10_000) / 50)
    y[5000], y[6000], y[7000:7200] = 9.0, -9.0, np.nan
    few_x, few_y = thinned(x, y, 400)
    assert len(few_x) <= 402 and np.nanmax(few_y) == 9 and np.nanmin(few_y) == -9
    assert few_x[0] == 0 and few_x[-1] == 9999 and (np.diff(few_x) > 0).all()
    assert np.isnan(few_y[(few_x > 7020) & (few_x < 7180)]).all()
    kept = ~np.isnan(few_y)
    assert (y[few_x[kept].astype(int)] == few_y[kept]).all()
    mean_x, mean_y = averaged(x, np.where(np.isnan(y), np.nan, 3.0), 100)
    assert len(mean_x) == 100 and np.nanmax(np.abs(mean_y - 3)) == 0


def test_smoothing_is_a_centered_mean():
    values = np.arange(100.0)
    np.testing.assert_allclose(smoothed(values), values)  # also near both ends
    noisy = np.array([1e12, *[1.0] * 50, np.nan, np.inf, *[3.0] * 50])
    found = smoothed(noisy)
    assert found[30] == pytest.approx(1.0, abs=1e-3) and found[90] == pytest.approx(3.0, abs=1e-3)
    assert np.isfinite(found).all() and np.isnan(smoothed(np.full(20, np.nan))).all()


def test_lines_differ_by_more_than_their_color():
    looks = {(index % DASHES, dash(index)) for index in range(MOST_RUNS)}
    assert len(looks) == MOST_RUNS and all(f".d{number} {{" in CSS for number in range(1, DASHES))


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_colors_have_enough_contrast():
    schemes = [dict(re.findall(r"--([\w]+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", CSS)]
    assert [len(colors) for colors in schemes] == [18, 18, 18]  # light, dark, print
    for colors in schemes:
        for name in ("ink", "soft", "good", "warn", "busy", *(f"c{i}" for i in range(8))):
            for ground in ("paper", "card"):
                light, dark = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground, colors)


def test_axes_and_ticks():
    assert even_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(80, 5000, 5) == [100, 300, 1000, 3000]
    assert all(1e-9 <= tick <= 1e9 for tick in log_ticks(1e-9, 1e9, 5)) and len(log_ticks(1e-9, 1e9, 5)) <= 8
    axis = span([np.array([1.0, 100.0])], log=True)
    assert axis.place(np.array([10.0]))[0] == pytest.approx(0.5) and np.isnan(axis.place(np.array([0.0]))[0])
    for nothing in (span([]), span([np.array([np.nan])]), span([np.zeros(3)], log=True), span([np.full(2, 7.0)])):
        assert nothing.low < nothing.high and nothing.ticks()
    assert Axis(1, 4, form="whole").ticks(8) == [1, 2, 3, 4]


def test_spectra_are_those_of_the_weights(folder):
    found, weights = read_spectra(folder), tensors()
    assert found.checkpoint == "step200" and found.updates == 200 and found.notes == []
    kinds = {(one.kind, one.block) for one in found.found}
    assert kinds == {(kind, b) for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.router") for b in (0, 2, 4)}
    for one in found.found:
        name = f"model.layers.{one.block}.{one.kind}"
        scale = web_runs.ALPHA / web_runs.RANK
        dense = weights.get(f"{name}.weight")
        dense = dense if dense is not None else scale * weights[f"{name}.B"] @ weights[f"{name}.A"]
        expected = torch.linalg.svdvals(dense.double())[: len(one.values)]
        np.testing.assert_allclose(one.values, expected, rtol=1e-5)
        assert one.stable_rank == pytest.approx(float(dense.norm() ** 2 / expected[0] ** 2), rel=1e-5)
        shares = expected / expected.sum()
        assert one.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-5)


def test_effective_rank_of_known_matrices():
    assert effective_rank(singular_values(torch.eye(7))[0]) == pytest.approx(7)
    assert effective_rank(singular_values(torch.outer(torch.arange(5.0), torch.ones(3)))[0]) == pytest.approx(1)
    assert effective_rank(np.zeros(4)) == 0
    b, a = torch.randn(30, 4), torch.randn(4, 20)
    expected = torch.linalg.svdvals((2.5 * b @ a).double())[:4]
    np.testing.assert_allclose(product_values(b, a, -2.5), expected, rtol=1e-5)


def test_large_matrices_take_bounded_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(spectra, "LARGEST_EXACT", 20)
    monkeypatch.setattr(spectra, "LEADING", 6)
    monkeypatch.setattr(spectra, "OVERSAMPLING", 8)
    scale = torch.logspace(0, -3, 30)
    matrix = torch.linalg.qr(torch.randn(40, 30)).Q * scale
    values, is_whole = singular_values(matrix)
    assert not is_whole
    np.testing.assert_allclose(values, scale[:6], rtol=1e-3)
    monkeypatch.setattr(spectra, "LARGEST_EXACT", 8)
    text = Parsed(page_of(read_run(folder))).text
    assert "The effective rank needs all values and is not shown" in text and "mlp.router 0 – –" in text
    monkeypatch.setattr(spectra, "LARGEST", 200)
    found = read_spectra(folder)
    assert {one.kind for one in found.found} == {"self_attn.q_proj", "mlp.up_proj"}
    assert "model.layers.0.mlp.router" in found.notes[0]
    wide = {"model.layers.0.mlp.B": torch.ones(1 << 14, 1), "model.layers.0.mlp.A": torch.ones(1, 1 << 14)}
    write_checkpoint(tmp_path, wide, {"type": "loro", "rank": 1})  # its product has a thousand times the elements
    monkeypatch.setattr(spectra, "LARGEST", 1 << 20)
    assert read_spectra(tmp_path).notes == ["Left out, because of more than 1,048,576 elements: model.layers.0.mlp."]
    monkeypatch.setattr(spectra, "SECONDS", -1.0)
    assert read_spectra(folder).notes == ["9 further matrices were left out after -1 seconds."]


def test_weights_without_a_spectrum_are_named(tmp_path):
    weights = tensors()
    weights["model.layers.0.self_attn.q_proj.B"][0, 0] = math.nan
    weights["model.layers.2.mlp.router.weight"][0, 0] = math.inf
    write_checkpoint(tmp_path / "nan", weights, web_runs.SETTINGS["deepspeed"]["megalr"]["parametrization"])
    found = read_spectra(tmp_path / "nan")
    assert len(found.found) == 7
    assert all("finite" in note for note in found.notes) and len(found.notes) == 2
    write_checkpoint(tmp_path / "cola", tensors(), {"type": "cola", "rank": web_runs.RANK})
    assert "no single matrix" in read_spectra(tmp_path / "cola").notes[0]
    write_checkpoint(tmp_path / "plugin", tensors(), {"type": "strange"})
    assert "strange" in read_spectra(tmp_path / "plugin").notes[0]
    write_checkpoint(tmp_path / "flat", {"weight": torch.eye(3)}, None)
    assert "no matrices in numbered blocks" in read_spectra(tmp_path / "flat").notes[0]


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    mine = write_run(tmp_path / "mine")
    before = sorted(mine.rglob("*"))
    assert main([str(mine)]) == 0
    assert capsys.readouterr().out == f"{mine / 'report.html'}\n"
    assert set(mine.rglob("*")) - set(before) == {mine / "report.html"}
    monkeypatch.chdir(tmp_path)
    assert main([str(mine), str(folder)]) == 0 and (tmp_path / "comparison.html").exists()
    assert main([str(tmp_path / "no"), "--output", "x.html"]) == 2
    assert f"error: there is no {tmp_path / 'no'}" in capsys.readouterr().err


def test_the_file_is_replaced_whole(folder, tmp_path):
    target, out = tmp_path / "precious", tmp_path / "out.html"
    target.write_text("precious")
    out.symlink_to(target)
    write_page(folder, out)
    assert target.read_text() == "precious" and not out.is_symlink()
    (tmp_path / "plain").write_text("")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UserError, match="is a folder"):
        write_page(folder, tmp_path)
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_page(folder, tmp_path / "no" / "out.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "plain", "precious"]
