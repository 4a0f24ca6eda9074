"""Faults in what moves data between ranks, in who owns what, and in reading where things lie."""

from __future__ import annotations

from tests.mutants.mutant import mutants

EXCHANGE = "megalr/layout/exchange.py"
PLACEMENT = "megalr/layout/placement.py"
LAYOUT = "megalr/layout/layout.py"
PLANNED = "megalr/layout/planned.py"
READING = "megalr/hosts/zero_layouts.py"
PIECES = "megalr/layout/rectangles.py"
JOINING = "megalr/layout/tensor_parallel.py"
TENSOR_PARALLEL = "megalr/hosts/tensor_parallel.py"
ROUND_TRIP = "tests/deepspeed/test_exchange.py"
ROUNDS = "megalr/layout/rounds.py"
OWNERS = "tests/unit/test_layout.py tests/unit/test_placement.py"
RULE_LAYOUTS = "tests/deepspeed/test_rules.py -k 'test_layout_variants or test_bf16'"
RANK_1 = '__import__("torch").distributed.is_initialized() and __import__("torch").distributed.get_rank() == 1'

LAYOUTS = [
    *mutants(
        "exchange",
        (
            "several fields of a fragment are read from the same place",
            EXCHANGE,
            """                    write(k, fragment, received[position : position + fragment.length])
                    position += fragment.length
""",
            """                    write(k, fragment, received[position : position + fragment.length])
                position += fragment.length * count
""",
            ROUND_TRIP,
        ),
        (
            "messages are sent in the items' order, not in the ranks'",
            EXCHANGE,
            "key=lambda move: move[2])",
            "key=lambda move: 0)",
            ROUND_TRIP,
        ),
        (
            "messages are received in the items' order, not in the ranks'",
            EXCHANGE,
            "key=lambda move: move[1])",
            "key=lambda move: 0)",
            ROUND_TRIP,
        ),
        (
            "the last fragment that arrives is lost",
            EXCHANGE,
            "for fragment in plan.incoming:",
            "for fragment in plan.incoming[: max(1, len(plan.incoming) - 1)]:",
            ROUND_TRIP,
        ),
        (
            "a scatter reads at the fragment's place in the buffer",
            EXCHANGE,
            "return flat[fragment.name][k][fragment.start : fragment.start + fragment.length]",
            "return flat[fragment.name][k][fragment.offset : fragment.offset + fragment.length]",
            ROUND_TRIP,
        ),
        (
            "a scatter leaves copies on other ranks as they were",
            EXCHANGE,
            "moves = [(f, owner, f.rank) for name, owner in _owned(units) for f in self.layout.of(name)]",
            "moves = [(f, owner, f.rank) for name, owner in _owned(units) for f in self.layout.cover(name, owner)]",
            ROUND_TRIP,
        ),
        (
            "a broadcast always comes from the first rank",
            EXCHANGE,
            "dist.broadcast(message, group=group, group_src=source)",
            "dist.broadcast(message, group=group, group_src=0)",
            "tests/world/test_rules.py -k 'test_equals_one_plain_process and (-0-2- or -0-3- or -0-4-)'",
        ),
        (
            "a sum over all is one over the own replica",
            EXCHANGE,
            """        self.sum(tensor)
        if self._replicas is not None:
""",
            """        self.sum(tensor)
        if False:
""",
            ROUND_TRIP,
        ),
        (
            "a round holds more than its bound",
            ROUNDS,
            "if load and load + size > limit:",
            "if load and load > limit:",
            "tests/unit/test_layout.py",
        ),
    ),
    *mutants(
        "placement",
        (
            "the second rank breaks ties otherwise than the others",
            PLACEMENT,
            "key=lambda rank: (load[rank], -held[rank], rank))",
            f"key=lambda rank: (load[rank], -held[rank], -rank if {RANK_1} else rank))",
            "tests/world/test_rules.py -k 'test_equals_one_plain_process and (GaLore or Fira or APOLLO)'",
        ),
        (
            "what a rank owns already does not count",
            PLACEMENT,
            "        load[owners[names]] += costs[names]\n",
            "",
            OWNERS,
        ),
        (
            "what lies whole on a rank may go to another",
            PLACEMENT,
            "candidates = homes[names] or range(layout.world_size)",
            "candidates = range(layout.world_size)",
            OWNERS,
        ),
        (
            "a tie goes to the rank that holds least",
            PLACEMENT,
            "key=lambda rank: (load[rank], -held[rank], rank))",
            "key=lambda rank: (load[rank], held[rank], rank))",
            OWNERS,
        ),
        (
            "the cheapest units are placed first",
            PLACEMENT,
            "key=lambda names: -costs[names])",
            "key=lambda names: costs[names])",
            OWNERS,
        ),
        (
            "what does not lie whole is placed before what does",
            PLACEMENT,
            "for names in sorted(largest_first, key=lambda names: len(homes[names]) != 1):",
            "for names in largest_first:",
            OWNERS,
        ),
    ),
    *mutants(
        "layout reading",
        (
            "a matrix of a stack begins where the stack does",
            LAYOUT,
            "offset = f.offset + lower - f.start",
            "offset = f.offset",
            "tests/unit/test_layout.py",
        ),
        (
            "of a parameter's copies the first is taken, not the one that is here",
            LAYOUT,
            "key=lambda copy: (held[copy], -copy)",
            "key=lambda copy: -copy",
            "tests/unit/test_layout.py tests/unit/test_joined_layouts.py",
        ),
        (
            "stage 3: chunks without their padding",
            READING,
            "            offset += chunk\n",
            "            offset += length\n",
            "tests/deepspeed/test_training.py -k test_equals_one_plain_process",
        ),
        (
            "stage 3: every sub-group is published into the first one's weights",
            READING,
            "        weights[buffer].data.copy_(buffers[buffer].data)\n\n    parameters",
            "        weights[0].data.copy_(buffers[buffer].data[: weights[0].numel()])\n\n    parameters",
            "tests/deepspeed/test_training.py -k 'test_layout_variants or test_refactorization_changes'",
        ),
        (
            "stages 1 and 2: parameters lie in the order of the model",
            READING,
            "begin = int(parameter.data.storage_offset())",
            "begin = sum(p.numel() for p in list(named.values())[: list(named).index(name)])",
            RULE_LAYOUTS,
        ),
        (
            "stages 1 and 2: a part begins where the parameter does",
            PLANNED,
            "rank, buffer, lower - rank * part))",
            "rank, buffer, max(0, lower - rank * part - 1)))",
            "tests/unit/test_layout.py",
        ),
        (
            "stages 1 and 2: what has changed is not published",
            READING,
            "            own_weights(fragment).copy_(_master(masters, fragment))\n",
            "            pass\n",
            "tests/deepspeed/test_training.py -k 'test_refactorization_changes or test_refactorization_of_bf16'",
        ),
        (
            "stage 0 in bf16: the call that makes states counts as an update",
            READING,
            "dry_run=True",
            "dry_run=False",
            "tests/deepspeed/test_training.py -k test_updates_are_counted",
        ),
        (
            "planned parts are not padded",
            PLANNED,
            "part = math.ceil(sum(map(math.prod, group.values())) / (PADDING * world_size)) * PADDING",
            "part = math.ceil(sum(map(math.prod, group.values())) / world_size)",
            "tests/unit/test_layout.py",
        ),
        (
            "a frozen parameter's padding is taken for its elements",
            READING,
            "[: max(0, min(chunk, sharded.ds_numel - start))]",
            "[:chunk]",
            "tests/deepspeed/test_projected.py -k 'test_equals_one_plain_process and 3-2-4'",
        ),
        (
            "a frozen parameter's chunk begins one chunk later",
            READING,
            "start = dist.get_rank(sharded.ds_process_group) * chunk",
            "start = (dist.get_rank(sharded.ds_process_group) + 1) * chunk % (chunk * dist.get_world_size())",
            "tests/deepspeed/test_projected.py -k 'test_equals_one_plain_process and 3-'",
        ),
    ),
    *mutants(
        "rectangles",
        (
            "a column block begins at the first column",
            PIECES,
            "begin, column = end, column + width",
            "begin, column = end, width",
            "tests/unit/test_rectangles.py",
        ),
        (
            "a run inside a block is counted from the run's start",
            PIECES,
            "pieces += rectangles((shape[0], width), first - begin, part, (0, column))",
            "pieces += rectangles((shape[0], width), first - start, part, (0, column))",
            "tests/unit/test_rectangles.py",
        ),
        (
            "whole rows behind a begun one start a row too early",
            PIECES,
            "size = min(width - column, left) if column or left < width else left // width * width",
            "size = min(width, left) if column or left < width else left // width * width",
            "tests/unit/test_rectangles.py",
        ),
        (
            "of copies that are cut otherwise every one is written",
            PIECES,
            "if not once or fragment.copy == 0 or (alike and",
            "if True or (alike and",
            "tests/unit/test_rectangles.py",
        ),
        (
            "the part of a frozen parameter begins where the first rank's does",
            TENSOR_PARALLEL,
            "first, size[dim] = sum(parts[: dist.get_rank(group)]), sum(parts)",
            "first, size[dim] = 0, sum(parts)",
            "tests/deepspeed/test_checkpoints.py -k test_frozen_weights_move",
        ),
        (
            "a matrix cut by rows is joined without the rows before",
            JOINING,
            "begin += math.prod(part)",
            "begin += math.prod(parts[0])",
            "tests/unit/test_joined_layouts.py",
        ),
    ),
]
