"""Keys and passwords in the JSON: the services that they are for get them, files and messages of ours do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Of a key's last words; not "tokens", "tokenizer" or "eos_token_id", and no number: those count or choose.
_WORDS = re.compile(
    r"(^|_)((api|access|auth|private|secret)_?keys?|(api|access|auth)_?tokens?|token|pass(word|wd|phrase)s?|secrets?|"
    r"credentials?|authorization)$"
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_secret(key: str, value: Any) -> bool:
    """Whether a value is one that nobody but its service should read, by the name of its key.

    Args:
        key: such as "api_key" or "authToken".
        value: a number, a boolean and null are none.
    """
    words = _HUMP.sub("_", str(key)).lower().replace("-", "_").replace(" ", "_")
    return isinstance(value, str | list | Mapping) and _WORDS.search(words) is not None


def without_secrets(content: Any) -> Any:
    """A copy of JSON without them, which compares equal whatever they are; keys and values are left out together."""
    if isinstance(content, Mapping):
        return {key: without_secrets(value) for key, value in content.items() if not is_secret(key, value)}
    return [without_secrets(each) for each in content] if isinstance(content, list | tuple) else content


def secrets_in(content: Any) -> set[str]:
    """The secrets themselves, to be kept out of what is printed."""
    if isinstance(content, Mapping):
        inner = [_strings(v) if is_secret(k, v) else secrets_in(v) for k, v in content.items()]
    else:
        inner = [secrets_in(each) for each in content] if isinstance(content, list | tuple) else []
    return {secret for found in inner for secret in found if secret}


def _strings(content: Any) -> set[str]:
    if isinstance(content, str):
        return {content}
    values = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return {found for each in values for found in _strings(each)}
