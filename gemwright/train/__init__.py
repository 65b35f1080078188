"""Training: one loop, many losses.

trainer.py      the loop
options.py      the options that every algorithm shares
optimizer.py    AdamW over fp32 masters, learning-rate schedules
distributed.py  the processes that train together: FSDP2, sharded state
state.py        checkpoints: complete, atomic, resumed bit for bit
export.py       trained weights to a Hugging Face folder or PEFT files
progress.py     bar, log.jsonl, TensorBoard, wandb, the picture of the losses
speed.py        compiled blocks, recomputed activations, the work of a batch and the device's peak
sft.py pretrain.py  an algorithm each: its options, its data, its loss, what it saves;  card.py  the model card
"""
