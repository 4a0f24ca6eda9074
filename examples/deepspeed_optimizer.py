"""Muon in a job that calls DeepSpeed itself: torchrun --nproc_per_node 2 examples/deepspeed_optimizer.py"""

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import megalr
from megalr.data import Batches, DataConfig, load_data, load_tokenizer

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "megalr": {"optimizer": {"type": "Muon", "params": {"lr": 1e-2, "adamw": {"lr": 1e-2}}}},
}

deepspeed.init_distributed()
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
text = DataConfig(sequence_length=64, max_train_tokens=200_000, max_eval_tokens=2_000)
examples = load_data(text, load_tokenizer(None), rank=rank, barrier=torch.distributed.barrier).train
batches = Batches(examples, micro_batch_size=4, accumulation_steps=2, rank=rank, world_size=world, seed=0)

torch.manual_seed(0)  # every rank starts with the same weights
shape = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(shape)
engine, *_ = deepspeed.initialize(model=model, optimizer=megalr.build_optimizer(model, CONFIG), config=CONFIG)

for update in range(1, 41):
    for _ in range(engine.gradient_accumulation_steps()):
        batch = {key: value.to(engine.device) for key, value in next(batches).items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
    if rank == 0 and update % 13 == 1:
        print(f"update {update}: loss {loss.item():.3f}", flush=True)
if rank == 0:
    print(f"{engine.basic_optimizer.rule_calls} matrices updated by Muon on this rank")
