"""Train with GaLore under ZeRO-2, from the JSON alone: deepspeed --num_accelerators 2 examples/initialize.py"""

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import megalr
from megalr.data import Batches, DataConfig, load_data, load_tokenizer

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "GaLoreAdamW", "params": {"lr": 1e-2, "rank": 16, "update_proj_gap": 20}},
}

deepspeed.init_distributed()
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
text = DataConfig(sequence_length=64, max_train_tokens=200_000, max_eval_tokens=2_000)
examples = load_data(text, load_tokenizer(None), rank=rank, barrier=torch.distributed.barrier).train
batches = Batches(examples, micro_batch_size=4, accumulation_steps=2, rank=rank, world_size=world, seed=0)

torch.manual_seed(0)  # every rank starts with the same weights
shape = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
engine, *_ = megalr.initialize(model=LlamaForCausalLM(shape), config=CONFIG)

for update in range(1, 41):
    for _ in range(engine.gradient_accumulation_steps()):
        batch = {key: value.to(engine.device) for key, value in next(batches).items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
    if rank == 0 and update % 13 == 1:
        print(f"update {update}: loss {loss.item():.3f}", flush=True)
if rank == 0:
    print(f"{engine.basic_optimizer.rule_calls} matrices updated by GaLore on this rank")
