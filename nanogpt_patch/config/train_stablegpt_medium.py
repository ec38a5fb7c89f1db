# StableGPT-M, 350M parameters [ST, Table 2 and 3a].
# torchrun --standalone --nproc_per_node=8 -m nanogpt_patch PATH/TO/nanoGPT/train.py config/train_stablegpt_medium.py
# The paper: a validation loss of 2.569 (GPT-2 medium: 2.579).

out_dir = "out-stablegpt-medium"
wandb_run_name = "stablegpt-medium"

norm = "stable"
attention = "stable"
init = "stable"
alpha = 0.475

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 6
block_size = 1024
gradient_accumulation_steps = 80  # 6 x 1,024 x 80 = 491,520 tokens
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 3e-4
min_lr = 3e-5
weight_decay = 0.1
grad_clip = 1.0

eval_interval = 1000
eval_iters = 200
log_interval = 10
monitor_every = 1000
