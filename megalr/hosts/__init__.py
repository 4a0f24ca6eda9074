"""The engines that step the optimizer. What megalr has to know of their internals is known here alone.

``base.py`` is the protocol, and ``choice.py`` says which host answers. An engine is a file, with the readers that it
needs beside it: ``plain.py`` for an ordinary torch job, ``deepspeed.py`` and ``deepspeed_pipeline.py``.
"""

from megalr.hosts.choice import (
    check_config,
    copies,
    gather,
    held,
    host_of,
    is_left_out,
    is_partitioned,
    is_replicated,
    logical_shape,
    read,
    watch,
    write,
)

__all__ = [
    "check_config",
    "copies",
    "gather",
    "held",
    "host_of",
    "is_left_out",
    "is_partitioned",
    "is_replicated",
    "logical_shape",
    "read",
    "watch",
    "write",
]
