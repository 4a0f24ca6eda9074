"""All faults, and the daily tests of each area: those that run when the few that should notice a fault have not."""

from __future__ import annotations

from tests.mutants.events import EVENTS
from tests.mutants.layout import LAYOUTS
from tests.mutants.mutant import Mutant
from tests.mutants.rules import RULES
from tests.mutants.runs import RUNS

MUTANTS: list[Mutant] = [*LAYOUTS, *RULES, *EVENTS, *RUNS]
D, U, W = "tests/deepspeed", "tests/unit", "tests/world"
AREAS: dict[str, str] = {
    "exchange": f"{W}/test_rules.py {W}/test_parametrizations.py {D}/test_exchange.py {D}/test_rules.py "
    f"{D}/test_updating.py {D}/test_tensor_parallel.py",
    "placement": f"{U}/test_layout.py {U}/test_placement.py {W}/test_rules.py {W}/test_state.py "
    f"{D}/test_updating.py {D}/test_rules.py",
    "layout reading": f"{U}/test_layout.py {U}/test_joined_layouts.py {W}/test_rules.py {D}/test_rules.py "
    f"{D}/test_training.py {D}/test_projected.py",
    "rectangles": f"{U}/test_rectangles.py {U}/test_joined_layouts.py {D}/test_checkpoints.py "
    f"{D}/test_checkpoint_jobs.py {D}/test_old_checkpoints.py {D}/test_checkpoint_tool.py",
    "rules": f"{U}/test_rules.py {U}/test_spam.py {U}/test_bases.py {U}/test_quantization.py {U}/test_galore_torch.py "
    f"{U}/test_rules_external.py {W}/test_rules.py {D}/test_rules.py",
    "refactorization": f"{U}/test_refactorize.py tests/kernels/test_refactorize_op.py {W}/test_parametrizations.py "
    f"{D}/test_training.py {D}/test_factors.py "
    f"{D}/test_updating.py",
    "momentum reset": f"{W}/test_parametrizations.py {D}/test_training.py {D}/test_factors.py {D}/test_factor_rules.py",
    "projected refresh": f"{U}/test_projected_events.py {U}/test_projected_layer.py {W}/test_parametrizations.py "
    f"{D}/test_projected.py",
    "merges and switches": f"{U}/test_frozen_weights.py {U}/test_lora.py {U}/test_loro.py {U}/test_switchlora.py "
    f"{W}/test_parametrizations.py {D}/test_factors.py",
    "resume": f"{W}/test_rules.py {W}/test_parametrizations.py {D}/test_old_checkpoints.py {D}/test_checkpoints.py "
    f"{D}/test_checkpoint_jobs.py {D}/test_training.py {D}/test_projected.py {D}/test_factors.py {D}/test_ways_in.py",
    "guards": f"{U}/test_guards.py {D}/test_guards.py",
    "model check": f"{U}/test_model_check.py {W}/test_modified_models.py {D}/test_modified_models.py",
    "clipping": f"{D}/test_tensor_parallel.py",
    "tensor-parallel layers": f"{U}/test_tensor_parallel.py {U}/test_joined_layouts.py {W}/test_cutting.py "
    f"{D}/test_tensor_parallel.py",
    "skipping": f"{W}/test_skipping.py {D}/test_skipping.py {D}/test_guards.py {D}/test_projected.py "
    f"{D}/test_tensor_parallel.py",
}
