# GPT-2 small as StableGPT-S is held against it: nanoGPT's own settings.
# torchrun --standalone --nproc_per_node=8 -m nanogpt_patch PATH/TO/nanoGPT/train.py config/train_gpt2_small.py
# The paper: a validation loss of 2.848.

out_dir = "out-gpt2-small"
wandb_run_name = "gpt2-small"

norm = "layernorm"
attention = "dot"
init = "stock"

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
