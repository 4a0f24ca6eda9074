"""A fault in the update of each rule, and in what rules have in common."""

from __future__ import annotations

from tests.mutants.mutant import mutants

RULES_FOLDER = "megalr/rules"
UNIT = "tests/unit/test_rules.py"


def of(name: str) -> str:
    """Tests of one rule against its reference."""
    return f"{UNIT} -k '{name}'"


RULES = [
    *mutants(
        "rules",
        (
            "GaLore: the scale is applied twice where the update is not formed",
            f"{RULES_FOLDER}/galore.py",
            "weight.addmm_(left, right, alpha=-lr)",
            "weight.addmm_(left, right, alpha=-lr * self.scale)",
            of("test_applying"),
        ),
        (
            "GoLore: random bases begin one refresh late",
            f"{RULES_FOLDER}/golore.py",
            '"random" if updates >= self.random_from',
            '"random" if updates > self.random_from',
            of("GoLore"),
        ),
        (
            "Fira: the remainder is taken of the unscaled projection",
            f"{RULES_FOLDER}/fira.py",
            "alpha=-self.scale).mul_(ratio)",
            "alpha=-1.0).mul_(ratio)",
            of("Fira"),
        ),
        (
            "APOLLO: the random projection has the variance of the long side",
            f"{RULES_FOLDER}/apollo.py",
            "drawn.div_(math.sqrt(rank))",
            "drawn.div_(math.sqrt(grad.shape[axis]))",
            of("APOLLO"),
        ),
        (
            "APOLLO-Mini: the scale without its root",
            f"{RULES_FOLDER}/apollo.py",
            "correction * math.sqrt(self.scale)",
            "correction * self.scale",
            of("APOLLOMini"),
        ),
        (
            "APOLLO: the limiter sees the bias correction",
            f"{RULES_FOLDER}/apollo.py",
            '        correction = self._correction(count(state, "step"))\n',
            "        correction = 1.0\n",
            of("APOLLO"),
        ),
        (
            "GoLore: both moments turn",
            f"{RULES_FOLDER}/golore.py",
            'moments: Moments = "transport_first"',
            'moments: Moments = "transport"',
            of("GoLore"),
        ),
        (
            "LDAdam: a square matrix is projected on the right",
            f"{RULES_FOLDER}/ldadam.py",
            'return ("left",) if square else super().sides(shape)',
            "return super().sides(shape)",
            of("LDAdam"),
        ),
        (
            "LDAdam: an old state is taken for a new one",
            f"{RULES_FOLDER}/ldadam.py",
            '"version" not in numbers',
            "False",
            "tests/unit/test_rules_authors.py -k old_ldadam",
        ),
        (
            "FRUGAL: the share of columns is rounded",
            f"{RULES_FOLDER}/frugal.py",
            "int(self.density * shape[1])",
            "round(self.density * shape[1])",
            "tests/unit/test_rules_authors.py -k frugal",
        ),
        (
            "Q-GaLore: the levels of a group need not reach to zero",
            f"{RULES_FOLDER}/quantization.py",
            "groups.amin(1, keepdim=True).clamp_(max=0)",
            "groups.amin(1, keepdim=True)",
            "tests/unit/test_rules_authors.py -k 'q_galore or groups'",
        ),
        (
            "Online Subspace Descent: the basis moves at a constant rate",
            "megalr/optim/optimizer.py",
            "return lr / given if given else 1.0",
            "return 1.0",
            "tests/unit/test_rules_authors.py -k basis_follows",
        ),
        (
            "Muon: small gradients stall",
            f"{RULES_FOLDER}/scaling.py",
            "scaled.div_(norm.clamp_(min=1.0))",
            "matrix / (torch.linalg.vector_norm(matrix, dim=dim, keepdim=True) + 1e-7)",
            "tests/unit/test_rule_scales.py",
        ),
        (
            "LDAdam: what the moments lose is fed back with the wrong weight",
            f"{RULES_FOLDER}/ldadam.py",
            "alpha=self.betas[0] / (1 - self.betas[0])",
            "alpha=self.betas[0]",
            of("LDAdam"),
        ),
        (
            "Online Subspace Descent: the basis counts its moments from the first update",
            f"{RULES_FOLDER}/online_subspace_descent.py",
            'count(state, "step") - 2',
            'count(state, "step") - 1',
            of("OnlineSubspaceDescent"),
        ),
        (
            "Muon: the scale of the transposed matrix",
            f"{RULES_FOLDER}/muon.py",
            "max(1.0, m / n)",
            "max(1.0, n / m)",
            of("muon"),
        ),
        (
            "Muon: momentum without Nesterov's step",
            f"{RULES_FOLDER}/muon.py",
            "grad.lerp(buffer, self.momentum) if self.nesterov",
            "grad.lerp(buffer, self.momentum**2) if self.nesterov",
            of("muon"),
        ),
        (
            "Stable-SPAM: the statistics' count begins again at a reset",
            f"{RULES_FOLDER}/stable_spam.py",
            "clip_steps, gamma1, left = t, self.gamma1,",
            "clip_steps, gamma1, left = k, self.gamma1,",
            "tests/unit/test_spam.py -k stable_spam",
        ),
        (
            "SPAM: spikes are clipped one update too early",
            f"{RULES_FOLDER}/spam.py",
            "step > CLIP_AFTER",
            "step >= CLIP_AFTER",
            "tests/unit/test_spam.py",
        ),
        (
            "SPAM: epsilon inside the root",
            f"{RULES_FOLDER}/spam.py",
            "else (v / bias2).sqrt_().add_(self.eps)",
            "else (v / bias2).add_(self.eps).sqrt_()",
            "tests/unit/test_spam.py",
        ),
        (
            "SCALE: an embedding is normalized by tokens",
            f"{RULES_FOLDER}/scale.py",
            "axis: ClassVar[int] = 0",
            "axis: ClassVar[int] = 1",
            of("scale"),
        ),
        (
            "Adam-mini: the mean square is divided by the rows",
            f"{RULES_FOLDER}/adam_mini.py",
            "div_(grad.shape[1])",
            "div_(grad.shape[0])",
            of("AdamMini or whole"),
        ),
        (
            "CAME: the instability has the second beta",
            f"{RULES_FOLDER}/came.py",
            "add_(self.eps2), self.beta3)",
            "add_(self.eps2), self.betas[1])",
            of("CAME or whole"),
        ),
        (
            "FRUGAL: the signs stay in the columns that Adam has",
            f"{RULES_FOLDER}/frugal.py",
            "update[:, columns] = direction",
            "update[:, columns] += direction",
            of("frugal"),
        ),
        (
            "BAdam: moments stay when a block has two turns in succession",
            f"{RULES_FOLDER}/badam.py",
            'if count(state, "active") == self.switch_interval:',
            'if count(state, "active") > self.switch_interval:',
            of("badam"),
        ),
        (
            "Q-GaLore: the gap grows before the queue is full",
            f"{RULES_FOLDER}/q_galore.py",
            'count(state, "refreshes") > self.queue_size',
            'count(state, "refreshes") >= self.queue_size',
            of("q_galore"),
        ),
        (
            "AdaRankGrad: the rank may grow again",
            f"{RULES_FOLDER}/adarankgrad.py",
            "needed &= tensor(state, side).any(0)",
            "needed |= False",
            of("adarankgrad"),
        ),
        (
            "a square matrix is projected on the other side",
            f"{RULES_FOLDER}/projected.py",
            "tall = shape[0] >= shape[1]",
            "tall = shape[0] > shape[1]",
            of("test_rule_equals_its_reference"),
        ),
        (
            "a basis is refreshed one update late",
            f"{RULES_FOLDER}/projected.py",
            "updates % self.update_proj_gap == phase",
            "updates % self.update_proj_gap == (phase + 1) % self.update_proj_gap",
            of("test_rule_equals_its_reference"),
        ),
        (
            "matrices refresh closer to each other than the gap allows",
            f"{RULES_FOLDER}/projected.py",
            "index * self.update_proj_gap // count if",
            "index * self.update_proj_gap // (count + 1) if",
            "tests/deepspeed/test_rules.py -k 'test_equals_one_plain_process and (GaLore or Fira or APOLLO)'",
        ),
        (
            "moments that are reset at a refresh keep their count",
            f"{RULES_FOLDER}/adam_moments.py",
            '    state["step"] = 0\n',
            "",
            of("frugal or full"),
        ),
        (
            "second moments are carried with the rotation, not its square",
            f"{RULES_FOLDER}/adam_moments.py",
            '("exp_avg_sq", turn.square())',
            '("exp_avg_sq", turn.abs())',
            of("GoLore or full"),
        ),
        (
            "singular vectors take the sign of their largest entry",
            f"{RULES_FOLDER}/bases.py",
            "towards = largest if previous is None else (basis * previous).sum(0)",
            "towards = largest",
            "tests/unit/test_bases.py",
        ),
        (
            "a resting matrix decays",
            "megalr/optim/matrices.py",
            "        if not resting:\n            for buffer in which:",
            "        if True:\n            for buffer in which:",
            "tests/deepspeed/test_rules.py -k 'test_equals_one_plain_process and BAdam'",
        ),
        (
            "AdamW: norms and biases decay",
            "megalr/optim/groups.py",
            "_override(replace(rest, weight_decay=0.0), config.norm)",
            "_override(rest, config.norm)",
            "tests/deepspeed/test_rules.py -k 'test_equals_one_plain_process and AdamW-'",
        ),
        (
            "AdamW: all but the factors have the factors' count",
            "megalr/optim/optimizer.py",
            'return "factors" if group == "factors" else "dense"',
            'return "factors"',
            "tests/deepspeed/test_training.py -k test_equals_one_plain_process",
        ),
    ),
]
