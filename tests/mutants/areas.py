"""All faults, and the daily tests of each area: those that run when the few that should notice a fault have not."""

from __future__ import annotations

from tests.mutants.events import EVENTS
from tests.mutants.layout import LAYOUTS
from tests.mutants.mutant import Mutant
from tests.mutants.rules import RULES
from tests.mutants.runs import RUNS

MUTANTS: list[Mutant] = [*LAYOUTS, *RULES, *EVENTS, *RUNS]
D, U = "tests/deepspeed", "tests/unit"
AREAS: dict[str, str] = {
    "exchange": f"{D}/test_exchange.py {D}/test_rules.py {D}/test_updating.py {D}/test_tensor_parallel.py",
    "placement": f"{U}/test_partition.py {U}/test_placement.py {D}/test_updating.py {D}/test_rules.py",
    "layout reading": f"{U}/test_partition.py {D}/test_rules.py {D}/test_training.py {D}/test_projected.py",
    "rectangles": f"{U}/test_pieces.py {U}/test_joining.py {D}/test_checkpoints.py {D}/test_checkpoint_jobs.py",
    "rules": f"{U}/test_rules.py {U}/test_spam.py {U}/test_bases.py {U}/test_quantization.py {U}/test_galore_torch.py "
    f"{U}/test_rules_external.py {D}/test_rules.py",
    "refactorization": f"{U}/test_refactorize.py {D}/test_training.py {D}/test_factors.py {D}/test_updating.py",
    "momentum reset": f"{D}/test_training.py {D}/test_factors.py {D}/test_factor_rules.py",
    "projected refresh": f"{U}/test_projection.py {U}/test_projected_layer.py {D}/test_projected.py",
    "merges and switches": f"{U}/test_merging.py {U}/test_lora.py {U}/test_loro.py {U}/test_switchlora.py "
    f"{D}/test_factors.py",
    "resume": f"{D}/test_checkpoints.py {D}/test_checkpoint_jobs.py {D}/test_training.py {D}/test_projected.py "
    f"{D}/test_factors.py {D}/test_ways_in.py",
    "guards": f"{U}/test_guards.py {D}/test_guards.py",
    "clipping": f"{D}/test_tensor_parallel.py",
    "tensor-parallel layers": f"{U}/test_tensor_parallel.py {D}/test_tensor_parallel.py",
    "skipping": f"{D}/test_skipping.py {D}/test_guards.py {D}/test_projected.py {D}/test_tensor_parallel.py",
}
