# StableGPT-S, 124M parameters [ST, Table 2 and 3a], on nanoGPT's own settings for GPT-2 and 8 A100s of 40 GB.
# torchrun --standalone --nproc_per_node=8 -m nanogpt_patch PATH/TO/nanoGPT/train.py config/train_gpt.py
# The paper: a validation loss of 2.827, and 2.819 with --learning_rate=1.2e-3 --min_lr=1.2e-4 (GPT-2: 2.848).
# What follows it changes it: config/stock.py makes it GPT-2, config/medium.py, large.py and 200.py another size.

out_dir = "out-gpt"
wandb_run_name = "gpt"

norm = "stable"
attention = "stable"
init = "stable"
alpha = 0.475

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40  # 12 x 1,024 x 40 = 491,520 tokens
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
grad_clip = 1.0

eval_interval = 1000
eval_iters = 200
log_interval = 10
monitor_every = 1000
