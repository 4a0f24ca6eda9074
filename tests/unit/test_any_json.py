"""Any text, bytes or values for the JSON give a configuration or a sentence, and soon."""

import json
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalr.config.reading import ONLY_WITH_A_RULE, SECTIONS
from megalr.config.settings import MegalrConfig, read_json
from megalr.config.values import VALUES
from megalr.errors import UserError
from megalr.hosts.features import children
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.rules.registry import RULES

SECONDS = 1.0
PROPERTY = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = st.sampled_from(
    sorted({*children(""), *(key for place in VALUES for key in place.split(".")), *SECTIONS, *ONLY_WITH_A_RULE})
    + ["type", "rank", "params", "lr", "betas", "parametrization", "interval", "moments", "plugins"]
)
WORDS = st.sampled_from([*RULES, *PARAMETRIZATIONS, "auto", "true", "", "reset", "svd"])
LEAVES = st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text() | WORDS
VALUE = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner, max_size=5)
)
PARAMS = st.sampled_from(
    ["lr", "betas", "eps", "weight_decay", "rank", "scale", "target_modules", "embedding", "adamw"]
)
# What gets past the names: objects where objects are expected.
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "optimizer": st.fixed_dictionaries(
            {"type": WORDS, "params": st.dictionaries(PARAMS, LEAVES | VALUE, max_size=3)}
        )
        | VALUE,
        "megalr": st.fixed_dictionaries(
            {},
            optional={
                "parametrization": st.fixed_dictionaries({"type": WORDS}, optional={"rank": LEAVES, "alpha": LEAVES}),
                **{name: st.dictionaries(NAMES, LEAVES, max_size=2) for name in SECTIONS},
                "seed": LEAVES,
                "tp_update": LEAVES,
            },
        ),
        "scheduler": VALUE,
        "zero_optimization": VALUE,
        "gradient_clipping": LEAVES,
    },
)


def answered(config):
    """A configuration, or a sentence, within a second."""
    began = time.monotonic()
    try:
        MegalrConfig.from_json(read_json(config))
    except UserError as error:
        assert str(error).strip()
    assert time.monotonic() - began < SECONDS


@PROPERTY
@given(st.dictionaries(NAMES | st.text(), VALUE, max_size=6) | SHAPED)
def test_any_values(content):
    answered(content)


@PROPERTY
@given(VALUE)
def test_any_argument(content):
    answered(content)


@PROPERTY
@given(data=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "any.json"
    path.write_bytes(data)
    answered(path)


@PROPERTY
@given(content=SHAPED, place=st.floats(0, 1), between=st.binary(max_size=3), cut=st.integers(0, 4))
def test_a_file_with_some_bytes_changed(tmp_path, content, place, between, cut):
    data = json.dumps(content).encode()
    at = int(place * len(data))
    path = tmp_path / "any.json"
    path.write_bytes(data[:at] + between + data[at + cut :])
    answered(path)
