"""Faults in what happens between updates: refactorization, resets, refreshes, merges, switches, exact steps."""

from __future__ import annotations

from tests.mutants.mutant import mutants

OPTIMIZER = "megalr/optim/optimizer.py"
CLOCK = "megalr/optim/clock.py"
REFACTORIZE = "megalr/ops/refactorization.py"
PROJECTION = "megalr/optim/events/projected.py"
MERGING = "megalr/optim/frozen_weights.py"
MERGES = "megalr/optim/events/relora.py"
SWITCHES = "megalr/optim/events/switchlora.py"
LORO = "megalr/optim/events/loro.py"
PARAMETRIZATIONS = "tests/world/test_parametrizations.py"
REFACTORIZATION = "megalr/optim/events/refactorization.py"
RESET = "megalr/optim/events/momentum_reset.py"
BASES = "megalr/optim/events/bases.py"
REFRESH = "megalr/optim/events/refresh.py"
TRAINING = f"{PARAMETRIZATIONS} -k 'low-rank and (test_equals_one_plain_process or reset)'"
PROJECTED = f"{PARAMETRIZATIONS} -k 'projected and (test_equals_one_plain_process or test_settings)'"


def factors(case: str) -> str:
    """Runs of one parametrization against one plain process."""
    return f"{PARAMETRIZATIONS} -k 'test_equals_one_plain_process and {case}'"


EVENTS = [
    *mutants(
        "refactorization",
        (
            "moments of refactorized factors stay",
            REFACTORIZATION,
            'return {"factors"} if self._config.moments == "reset" and self.due(updates) else set()',
            "return set()",
            TRAINING,
        ),
        (
            "it comes one update late",
            REFACTORIZATION,
            "        if not self.due(updates):\n            return []\n        zeroed",
            "        if not self.due(updates - 1):\n            return []\n        zeroed",
            TRAINING,
        ),
        (
            "Muon's momentum is carried by the other factor's map",
            REFACTORIZATION,
            "first_b[:rank].clone(), first_a[:, :rank].clone()",
            "first_b[:rank].clone(), first_b[:rank].T.clone()",
            factors("momentum"),
        ),
        (
            "Muon's momentum stays where it was",
            REFACTORIZATION,
            "        if turns is not None and by_rule is not None:\n",
            "        if False:\n",
            factors("momentum"),
        ),
        (
            "singular values are split unevenly",
            REFACTORIZE,
            "    root = s.sqrt()\n",
            "    root = s**0.4\n",
            "tests/unit/test_refactorize.py",
        ),
        (
            "a product of lower rank is balanced all the same",
            REFACTORIZE,
            "if not (s[-1] > _SMALLEST_RATIO * s[0] and s[-1] > _SMALLEST_OF_FACTORS * factors):",
            "if not s[-1] > 0:",
            "tests/unit/test_refactorize.py",
        ),
        (
            "second moments are carried with the map, not its square",
            REFACTORIZE,
            'old["exp_avg_sq_B"] @ new.map_B.square()',
            'old["exp_avg_sq_B"] @ new.map_B.abs()',
            "tests/unit/test_refactorize.py",
        ),
        (
            "moments of a pair are handed over in the wrong order",
            "megalr/optim/events/refactorization.py",
            "for pair in names for name in pair for moment in whole[name][1:]]",
            "for pair in names for name in pair for moment in whole[name][:0:-1]]",
            "tests/unit/test_refactorize.py",
        ),
        (
            "the new factors are not published",
            REFACTORIZATION,
            "        return self._buffers\n",
            "        return []\n",
            "tests/deepspeed/test_training.py -k 'test_refactorization_changes or test_refactorization_of_bf16'",
        ),
    ),
    *mutants(
        "momentum reset",
        (
            "the moments' count goes on",
            OPTIMIZER,
            "        for name in zeroed:\n            self.clocks[name].count = 0\n",
            "",
            TRAINING,
        ),
        (
            "the ramp begins one step up",
            CLOCK,
            "(1 - RAMP_START) * self.since_reset / warmup_steps",
            "(1 - RAMP_START) * (self.since_reset + 1) / warmup_steps",
            TRAINING,
        ),
        (
            "a reset of the factors resets all",
            RESET,
            '{"factors", "dense"} if config.scope == "all" else {"factors"}',
            '{"factors", "dense"}',
            TRAINING,
        ),
        (
            "a reset of all has the factors' learning rate alone warm up",
            RESET,
            "return self.resets_due(updates)",
            'return self.resets_due(updates) & {"factors"}',
            TRAINING,
        ),
        (
            "a rule's moments are not reset",
            OPTIMIZER,
            "        if self.matrices is not None:\n            self.matrices.reset(",
            "        if False:\n            self.matrices.reset(",
            f"{PARAMETRIZATIONS} -k 'test_settings and low-rank'",
        ),
        (
            "the moments' zeros come one update late",
            OPTIMIZER,
            "reset=name in self._resets_due(self.updates + 1)",
            "reset=name in self._resets_due(self.updates)",
            TRAINING,
        ),
    ),
    *mutants(
        "projected refresh",
        (
            "W0 takes R with the new basis",
            PROJECTION,
            "learned = r @ old.T if right else old @ r",
            "learned = r @ new.T if right else new @ r",
            PROJECTED,
        ),
        (
            "W0 does not decay",
            PROJECTION,
            "            basis.decay *= self._kept\n",
            "",
            PROJECTED,
        ),
        (
            "the gradient in the new basis is not scaled",
            PROJECTION,
            "self._low(summed.whole, new, basis.side).mul_(scale)",
            "self._low(summed.whole, new, basis.side)",
            PROJECTED,
        ),
        (
            "bases are refreshed one update late",
            BASES,
            "basis.due |= updates % self._config.update_proj_gap == basis.phase",
            "basis.due |= (updates - 1) % self._config.update_proj_gap == basis.phase",
            PROJECTED,
        ),
        (
            "moments turn the other way",
            PROJECTION,
            "self._carry_moments(name, own, turn, left=not right)",
            "self._carry_moments(name, own, turn.T, left=not right)",
            PROJECTED,
        ),
        (
            "moments that are reset keep their count",
            BASES,
            "        self.count = 0 if resets_moments else self.count\n",
            "",
            PROJECTED,
        ),
        (
            "the gradient of a skipped update stays",
            BASES,
            "layer.full_gradient = FullGradientSum() if self.due else None",
            "layer.full_gradient = (layer.full_gradient or FullGradientSum()) if self.due else None",
            "tests/world/test_skipping.py -k projected",
        ),
        (
            "a gradient that is delivered in the old basis is turned back",
            PROJECTION,
            'new = low @ turn.T if side == "right" else turn @ low',
            'new = low @ turn if side == "right" else turn.T @ low',
            "tests/unit/test_projected_events.py",
        ),
        (
            "a shared basis comes from the first layer's gradient alone",
            REFRESH,
            "    stack = _stack([each.whole for each in due.gradients])\n",
            "    stack = due.gradients[0].whole\n",
            "tests/world/test_parametrizations.py -k 'test_equals_one_plain_process and shared and projected'",
        ),
    ),
    *mutants(
        "merges and switches",
        (
            "ReLoRA: every merge draws the same A",
            MERGES,
            "draw_a_(a, self._seed, name, self._merges)",
            "draw_a_(a, self._seed, name, 1)",
            factors("relora"),
        ),
        (
            "ReLoRA: the second moment is pruned by itself",
            MERGES,
            '            kept["exp_avg"] &= kept["exp_avg_sq"]\n',
            "",
            factors("magnitude"),
        ),
        (
            "SwitchLoRA: the switched row's own moments are zeroed",
            SWITCHES,
            """                for fragment, run in self._runs(switch.other, range(row, row + 1)):
                    for field in moments:""",
            """                for fragment, run in self._runs(switch.factor, range(row, row + 1)):
                    for field in moments:""",
            factors("switchlora"),
        ),
        (
            "SwitchLoRA: rows rest one update longer",
            SWITCHES,
            "                if start > step.updates:\n",
            "                if start and start >= step.updates:\n",
            factors("switchlora"),
        ),
        (
            "SwitchLoRA: W0 takes the new rows",
            SWITCHES,
            "lost = (old - new) * layer.scale",
            "lost = (new - old) * layer.scale",
            "tests/unit/test_switchlora.py",
        ),
        (
            "LORO: lazy updates have the whole learning rate",
            LORO,
            "lr=step.lr * scale,",
            "lr=step.lr if scale else 0.0,",
            factors("loro"),
        ),
        (
            "LORO: moments stay after an exact step",
            LORO,
            "                run_of(field, fragment).zero_()\n",
            "                pass\n",
            factors("loro"),
        ),
        (
            "LORO: the core's blocks are exchanged",
            LORO,
            "core[:rank, rank:] = -lr * k1.T",
            "core[:rank, rank:] = -lr * k1",
            "tests/unit/test_loro.py",
        ),
        (
            "a remainder does not take part in the next merge",
            MERGING,
            "            total.add_(self.remainders[name].to(total.device), alpha=decay)\n",
            "            pass\n",
            "tests/unit/test_frozen_weights.py",
        ),
        (
            "stochastic rounding draws the same noise at every merge",
            MERGING,
            'generator(self._seed, name, "merge", count)',
            'generator(self._seed, name, "merge", 0)',
            "tests/unit/test_frozen_weights.py",
        ),
    ),
]
