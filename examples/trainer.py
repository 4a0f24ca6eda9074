"""GaLore in transformers' Trainer under ZeRO-3: deepspeed --num_accelerators 2 examples/trainer.py"""

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import megalr
from megalr.data import DataConfig, load_data, load_tokenizer

CONFIG = {  # or the path of such a JSON
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3},
    "megalr": {"optimizer": {"type": "GaLoreAdamW", "params": {"lr": "auto", "rank": 16, "update_proj_gap": 20}}},
}

deepspeed.init_distributed()  # on a CPU transformers leaves this out, and stage 3 needs it for the model
schedule = {"learning_rate": 1e-2, "max_steps": 40, "warmup_steps": 2, "gradient_accumulation_steps": 2}
output = {"output_dir": "runs/trainer", "save_strategy": "no", "logging_steps": 10, "report_to": "none"}
on_cpu = not torch.cuda.is_available()
args = TrainingArguments(deepspeed=CONFIG, per_device_train_batch_size=4, use_cpu=on_cpu, **schedule, **output)

text = DataConfig(sequence_length=64, max_train_tokens=200_000, max_eval_tokens=8_192)
data = load_data(text, load_tokenizer(None), rank=args.process_index, barrier=torch.distributed.barrier)
train, held_out = ([torch.from_numpy(row).long() for row, _ in part] for part in (data.train, data.evaluation))
train, held_out = ([{"input_ids": row, "labels": row} for row in rows] for rows in (train, held_out))

shape = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM._from_config(shape)  # or from_pretrained; both are cut by ZeRO-3 as they are made
optimizer = megalr.trainer_optimizer(args)
trainer = Trainer(model, args, train_dataset=train, eval_dataset=held_out, optimizer_cls_and_kwargs=optimizer)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
if args.process_index == 0:
    calls = trainer.model_wrapped.basic_optimizer.rule_calls
    print(f"\nheld-out loss {loss:.3f}\n{calls} matrices updated by GaLore on this rank")
