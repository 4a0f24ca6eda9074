"""All kinds of inputs, in the order of the table."""

from __future__ import annotations

from tests.soak import calls, data_files, environment, flags, folders, json_files, json_values, no_files
from tests.soak.trial import Kind

KINDS = (
    Kind("JSON: values", json_values.wrong_values),
    Kind("JSON: names", json_values.wrong_names),
    Kind("JSON: files", json_files.damaged_json),
    Kind("model shapes", json_files.wrong_models),
    Kind("flags", flags.wrong_flags),
    Kind("environment", environment.wrong_variables),
    Kind("texts", data_files.bad_texts),
    Kind("tokenizers", data_files.bad_tokenizers),
    Kind("folders of runs", folders.bad_runs),
    Kind("no files", no_files.no_files),
    Kind("manifests", folders.bad_manifests),
    Kind("checkpoints, random damage", folders.damaged_bytes),
    Kind("exports", folders.bad_exports),
    Kind("calls", calls.wrong_calls),
)
