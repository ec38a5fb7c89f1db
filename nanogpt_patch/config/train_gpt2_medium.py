# GPT-2 medium, the baseline of StableGPT-M.
# torchrun --standalone --nproc_per_node=8 -m nanogpt_patch PATH/TO/nanoGPT/train.py config/train_gpt2_medium.py
# The paper: a validation loss of 2.579.

out_dir = "out-gpt2-medium"
wandb_run_name = "gpt2-medium"

norm = "layernorm"
attention = "dot"
init = "stock"

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
