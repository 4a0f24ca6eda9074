"""Pretrain a LLaMA with low-rank weights under DeepSpeed ZeRO; ``--help`` lists the flags.

deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2_lowrank.json
torchrun --nproc_per_node 2 launchers/pretrain.py --deepspeed ds_configs/zero2_lowrank.json
python launchers/pretrain.py --deepspeed ds_configs/zero2_lowrank.json
"""

import sys

from megalr.pretrain import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
