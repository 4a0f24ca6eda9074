"""Faults in going on from a checkpoint, in guards and skipped updates, and in tensor parallelism."""

from __future__ import annotations

from tests.mutants.mutant import mutants

OPTIMIZER = "megalr/optim/optimizer.py"
PORTABLE = "megalr/optim/state.py"
CONTENTS = "megalr/checkpoint/contents.py"
MATRICES = "megalr/optim/matrices.py"
BASES = "megalr/optim/events/bases.py"
ENGINE_STATE = "megalr/optim/engine_state.py"
PROGRESS = "megalr/optim/progress.py"
DEEPSPEED = "megalr/hosts/deepspeed.py"
SWITCHES = "megalr/optim/events/switchlora.py"
GUARD = "megalr/guards/guard.py"
LOSSES = "megalr/guards/losses.py"
EXCHANGE = "megalr/layout/exchange.py"
TENSOR_PARALLEL = "megalr/hosts/tensor_parallel.py"
LOW_RANK = "megalr/layers/low_rank.py"
PROJECTED = "megalr/layers/projected.py"
MESSAGES = "megalr/layers/tensor_parallel/messages.py"
WORLD = "tests/world/test_rules.py tests/world/test_parametrizations.py -k"
SAME = f"{WORLD} 'test_equals_one_plain_process and entries'"
OWN = f"{WORLD} 'test_equals_one_plain_process and state_dict'"
NORM = "tests/deepspeed/test_tensor_parallel.py -k test_the_norm_for_clipping"
LOGITS = "tests/deepspeed/test_tensor_parallel.py -k 'test_logits_loss_and_gradients'"
NEVER_WAS = "tests/deepspeed/test_guards.py -k test_a_bad_update_never_was"
MODEL_CHECK = "megalr/optim/model_check.py"
ADOPTION = "megalr/guards/adoption.py"
MODIFIED = "tests/deepspeed/test_modified_models.py"
POISON = "tests/world/test_skipping.py"

RUNS = [
    *mutants(
        "resume",
        (
            "updates are not counted on from a checkpoint",
            PORTABLE,
            '    optimizer.updates = numbers["updates"]\n',
            "",
            SAME,
        ),
        (
            "a ramp that has begun is forgotten",
            PORTABLE,
            "Clock() if begins_anew else Clock(**clock)",
            'Clock() if begins_anew else Clock(count=clock["count"])',
            SAME,
        ),
        (
            "learning rates stay as they were configured",
            PORTABLE,
            '        group["lr"] = rate\n',
            "",
            "tests/deepspeed/test_checkpoint_jobs.py -k 'learning_rates or schedules'",
        ),
        (
            "DeepSpeed's checkpoints: updates are not counted on",
            ENGINE_STATE,
            '    optimizer.updates = saved["updates"]\n',
            "",
            OWN,
        ),
        (
            "DeepSpeed's checkpoints: clocks begin again",
            ENGINE_STATE,
            '{name: Clock(**values) for name, values in saved["clocks"].items()}',
            '{name: Clock() for name in saved["clocks"]}',
            OWN,
        ),
        (
            "DeepSpeed's checkpoints: a rule's counts are lost",
            ENGINE_STATE,
            "optimizer.matrices.make_room(loaded.matrices, {})",
            "optimizer.matrices.make_room({name: {} for name in loaded.matrices}, {})",
            OWN,
        ),
        (
            "DeepSpeed's checkpoints: what layers keep is lost",
            ENGINE_STATE,
            '    load_event_numbers(optimizer, saved["events"])\n',
            "",
            OWN,
        ),
        (
            "W0's decay since the last refresh is lost",
            BASES,
            'COUNTS = ("refreshes", "count", "decay", "due", "waits")',
            'COUNTS = ("refreshes", "count", "due", "waits")',
            SAME,
        ),
        (
            "a refresh that is due is forgotten",
            BASES,
            'COUNTS = ("refreshes", "count", "decay", "due", "waits")',
            'COUNTS = ("refreshes", "count", "decay", "waits")',
            SAME,
        ),
        (
            "a refresh that waits begins to wait anew",
            BASES,
            'COUNTS = ("refreshes", "count", "decay", "due", "waits")',
            'COUNTS = ("refreshes", "count", "decay", "due")',
            "tests/unit/test_projected_events.py",
        ),
        (
            "waiting rows are read by ranks that do not keep them",
            SWITCHES,
            'if kind == "waiting" and self._keeps(name, int(number)):',
            'if kind == "waiting" and not self._keeps(name, int(number)):',
            SAME,
        ),
        (
            "random numbers go on from where the process was",
            CONTENTS,
            "            set_random_states(self._targets[self._random_key].pieces[0].data)\n",
            "            pass\n",
            "tests/deepspeed/test_checkpoints.py -k 'test_random_states'",
        ),
        (
            "micro-batches are not counted on",
            DEEPSPEED,
            "engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()",
            "engine.micro_steps = engine.global_steps",
            "tests/deepspeed/test_checkpoints.py -k test_moves_to_another_gradient_accumulation",
        ),
    ),
    *mutants(
        "guards",
        (
            "ranks decide by their own losses",
            GUARD,
            "        if dist.get_world_size() > 1:\n            dist.all_reduce(sums)",
            "        if False:\n            dist.all_reduce(sums)",
            NEVER_WAS,
        ),
        (
            "losses of skipped updates are taken into the window",
            GUARD,
            "        self.skipped += 1\n        self.skipped_in_a_row += 1\n",
            "        self._window.accept(self.loss or 0.0)\n"
            "        self.skipped += 1\n        self.skipped_in_a_row += 1\n",
            "tests/deepspeed/test_guards.py -k 'resumed_guard or too_many'",
        ),
        (
            "a skipped update leaves its gradients in the layers",
            "megalr/hosts/deepspeed_watch.py",
            "        optimizer.begin_update()\n        return None",
            "        return None",
            NEVER_WAS,
        ),
        (
            "a skipped update moves the schedule on",
            "megalr/hosts/deepspeed_watch.py",
            "        if self._optimizer.updates > self._before:\n",
            "        if True:\n",
            NEVER_WAS,
        ),
        (
            "losses of the update before are judged again",
            GUARD,
            "        self._losses.clear()\n",
            "",
            NEVER_WAS,
        ),
        (
            "skipped updates in a row are counted over good ones",
            GUARD,
            "    def _accept(self) -> None:\n        self.skipped_in_a_row = 0\n",
            "    def _accept(self) -> None:\n",
            "tests/deepspeed/test_guards.py -k 'too_many or never_was'",
        ),
        (
            "a spike is judged by the deviation of the population",
            LOSSES,
            "for each in self._losses) / (known - 1))",
            "for each in self._losses) / known)",
            "tests/unit/test_guards.py",
        ),
        (
            "fewer losses judge than are needed",
            LOSSES,
            "known < min(LEAST, self._losses.maxlen or LEAST)",
            "known < 2",
            "tests/unit/test_guards.py",
        ),
        (
            "a resumed guard begins with an empty window",
            GUARD,
            '        self._window.load(state["losses"])\n',
            "",
            "tests/deepspeed/test_guards.py -k resumed_guard",
        ),
    ),
    *mutants(
        "clipping",
        (
            "what is cut is not marked: its norm is counted on one rank",
            TENSOR_PARALLEL,
            "parameter.tensor_model_parallel, parameter.partition_dim = True, dim",
            "parameter.partition_dim = dim",
            NORM,
        ),
        (
            "gradients of copies are marked as cut: their norm is counted on every rank",
            TENSOR_PARALLEL,
            "if parameter.grad is not None and is_marked(parameter):",
            "if parameter.grad is not None:",
            NORM,
        ),
        (
            "no gradient is marked",
            TENSOR_PARALLEL,
            "        parameter.grad.tensor_model_parallel = True\n",
            "        pass\n",
            NORM,
        ),
    ),
    *mutants(
        "tensor-parallel layers",
        (
            "a gradient of what all ranks have is not summed",
            MESSAGES,
            "        return _summed(grad, ctx.group), None\n",
            "        return grad, None\n",
            LOGITS,
        ),
        (
            "row-parallel low-rank layers forget their scale",
            LOW_RANK,
            "return functional.linear(latent * self.scale, self.B, self.bias)",
            "return functional.linear(latent, self.B, self.bias)",
            LOGITS,
        ),
        (
            "every rank adds the bias of a row-parallel layer",
            PROJECTED,
            "y = self.split.sum(self._product(x, r, None))\n"
            "        return y if self.bias is None else y + self.bias.to(y.dtype)",
            "y = self.split.sum(self._product(x, r, self.bias))\n        return y",
            "tests/deepspeed/test_tensor_parallel.py -k 'test_biases or test_logits'",
        ),
        (
            "R of a row-parallel layer is summed on the wrong side",
            PROJECTED,
            'r = self.R if self.side == "left" else self.split.sum_gradient(self.R)',
            'r = self.R if self.side == "right" else self.split.sum_gradient(self.R)',
            LOGITS,
        ),
        (
            "gathered outputs give every rank the first part's gradient",
            MESSAGES,
            "return grad.narrow(-1, ctx.first, ctx.width), None, None",
            "return grad.narrow(-1, 0, ctx.width), None, None",
            "tests/deepspeed/test_tensor_parallel.py -k 'test_biases or test_variants'",
        ),
        (
            "copies are counted as one in a joined layout",
            "megalr/layout/tensor_parallel.py",
            "copies += 1 + max(f.copy for f in layout.of(name))",
            "copies += 0",
            "tests/unit/test_joined_layouts.py",
        ),
        (
            "a layer that gets another input uses the first one's latent",
            MESSAGES,
            "        if self._waiting and (is_old or x is not self._x or id(layer) not in self._waiting):",
            "        if self._waiting and (is_old or id(layer) not in self._waiting):",
            "tests/deepspeed/test_tensor_parallel.py -k test_siblings",
        ),
    ),
    *mutants(
        "model check",
        (
            "what was written into a model is not looked for",
            MODEL_CHECK,
            "        if weights:\n            return",
            "        if False:\n            return",
            MODIFIED,
        ),
        (
            "a frozen parameter is not looked for",
            MODEL_CHECK,
            "if p.requires_grad} != self._ids",
            "} != self._ids",
            MODIFIED,
        ),
        (
            "each rank complains on its own",
            MODEL_CHECK,
            "        if self._exchange.vote(not complaint)[0]:",
            "        if not complaint:",
            MODIFIED,
        ),
        (
            "adopted weights take the masters' digits from all",
            ADOPTION,
            "changed = [twin.weight != twin.master.to(twin.weight) for twin in twins]",
            "changed = [twin.weight == twin.weight for twin in twins]",
            MODIFIED,
        ),
        (
            "a checkpoint is written without a look at the model",
            CONTENTS,
            "        self._optimizer.check_model()\n        host",
            "        host",
            MODIFIED,
        ),
    ),
    *mutants(
        "skipping",
        (
            "ranks skip on their own",
            EXCHANGE,
            "        if not self._groups():\n            return mine, True\n",
            "        return mine, True\n",
            POISON,
        ),
        (
            "a rule runs in a skipped update",
            OPTIMIZER,
            "if here and not progress.skipping:",
            'if here and (group["by_rule"] or not progress.skipping):',
            POISON,
        ),
        (
            "a skipped update counts",
            OPTIMIZER,
            "            self.skipped += 1\n            self.begin_update()\n",
            "            self.skipped += 1\n            self.updates += 1\n            self.begin_update()\n",
            POISON,
        ),
        (
            "gradients of other groups are not looked at",
            PROGRESS,
            "for grad in gradients_in(groups) + shard.unseen_gradients() if grad.numel()]",
            "for grad in gradients_in(groups) if grad.numel()]",
            POISON,
        ),
        (
            "fp32 parameters at stage 0 are not looked at",
            "megalr/hosts/plain.py",
            "unseen_gradients=list",
            "unseen_gradients=None",
            "tests/deepspeed/test_skipping.py -k test_infinite",
        ),
        (
            "the update after a skipped one is skipped as well",
            OPTIMIZER,
            "        self._progress.skip_asked = False\n        self._arrivals.forget()\n",
            "        self._arrivals.forget()\n",
            "tests/deepspeed/test_guards.py -k test_a_bad_update_never_was",
        ),
    ),
]
