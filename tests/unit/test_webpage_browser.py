"""The web page in a real browser: it is seen, loads nothing, complains of nothing, and answers a pointer and keys."""

import json

import numpy as np
import pytest

from megalr.webpage.build import write_comparison, write_page
from tests.browser import MISSING, PROGRAM, browser
from tests.unit.web_runs import write_run

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
    # There is no group: a process is alone, as torch says each time.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
LOSS = "document.querySelector('#loss .plot')"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page, and one that compares two runs."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / name, finished=name == "a run") for name in ("a run", "other")]
    write_page(runs[0], folder / "one.html")
    write_comparison(runs, folder / "two.html")
    return folder / "one.html", folder / "two.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def place(tab, share, height=0.5):
    """A place in the window, by its share of the width and the height of the loss chart."""
    box = json.loads(tab.value(f"JSON.stringify({LOSS}.getBoundingClientRect())"))
    return box["x"] + share * box["width"], box["y"] + height * box["height"]


@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_seen_in_light_and_dark(tab, pages, width):
    for page in pages:
        lightness = []
        for dark in (False, True):
            tab.open(page, width=width, dark=dark)
            picture = tab.screenshot()[..., :3]
            assert tab.complaints == [] and tab.loaded == [page.as_uri()]
            # Nothing is cut off at the right; lines in the colors of the palette are there.
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert (np.ptp(picture, axis=2) > 0.25).mean() > 0.001
            lightness.append(float(np.median(picture)))
        assert lightness[0] > 0.9 and lightness[1] < 0.2


def test_charts_are_drawn_without_a_script(tab, pages):
    tab.open(pages[0])
    with_script = tab.screenshot()
    tab.open(pages[0], script=False)
    without = tab.screenshot()
    assert tab.complaints == []
    top, hint = 380, 26  # pixels: how to use the script is said only where there is one, above the first section
    assert np.abs(with_script[top + hint :] - without[top:-hint]).mean() < 1e-3


def test_labels_do_not_overlap(tab, pages):
    for width in (1280, 400):
        tab.open(pages[0], width=width)
        overlaps = """(() => {
          let count = 0;
          for (const labels of document.querySelectorAll('.labels'))
            for (const kind of ['x', 'y', 'r']) {
              const boxes = [...labels.querySelectorAll('.' + kind)].map(each => each.getBoundingClientRect());
              boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
                if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) count += 1;
              }));
            }
          return count;
        })()"""
        assert tab.value(overlaps) == 0
        assert tab.value("document.querySelectorAll('.labels span').length") > 100


def test_the_pointer_shows_values_and_zooms(tab, pages):
    tab.open(pages[0])
    ticks = f"[...{LOSS}.querySelectorAll('.x')].map(each => each.textContent).join()"
    before = tab.value(ticks)
    tab.pointer("move", *place(tab, 0.5))
    shown = tab.value("[...document.querySelectorAll('.tip:not([hidden])')].map(each => each.innerText).join()")
    assert shown.startswith("10,000 training tokens") and "held-out loss: 5.5, perplexity 244.69" in shown
    assert "refactorization" in shown
    assert tab.value("document.querySelectorAll('.hair:not([hidden])').length") > 5  # in the charts of the same axis
    tab.pointer("press", *place(tab, 0.25), clicks=1)
    tab.pointer("move", *place(tab, 0.4), clicks=1)
    tab.pointer("release", *place(tab, 0.5), clicks=1)
    # The axis reaches one percent beyond both ends of 0 to 20,000.
    assert tab.value(ticks) == "5k,6k,7k,8k,9k,10k" and before != tab.value(ticks)
    assert tab.value("document.querySelector('#perplexity .view').getAttribute('transform')").startswith("matrix(4 ")
    assert tab.value("document.querySelector('#spectrum-0 .view').getAttribute('transform')") is None
    tab.value(f"{LOSS}.focus()")
    tab.key("Escape")
    assert tab.value(ticks) == before
    tab.key("ArrowRight")
    tab.key("ArrowRight")
    assert "200 training tokens" in tab.value(f"{LOSS}.querySelector('.tip').innerText")
    assert tab.complaints == []
