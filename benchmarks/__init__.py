"""What `launchers/benchmark.py` measures, one module a benchmark: `add_arguments(parser)` and `run(arguments)`."""
