"""Pretrain a LLaMA with low-rank weights under DeepSpeed ZeRO; ``--help`` lists the flags.

deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2_lowrank.json
torchrun --nproc_per_node 2 launchers/pretrain.py --deepspeed ds_configs/zero2_lowrank.json
python launchers/pretrain.py --deepspeed ds_configs/zero2_lowrank.json
"""

import sys
from pathlib import Path

# Python puts this folder first, so that tasks which import the package evaluate would get evaluate.py instead.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

from megalr.pretrain import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
