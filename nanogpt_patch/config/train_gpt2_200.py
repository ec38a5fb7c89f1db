# 200 blocks of width 768, the baseline of train_stablegpt_200.py.
# torchrun --standalone --nproc_per_node=8 -m nanogpt_patch PATH/TO/nanoGPT/train.py config/train_gpt2_200.py
# No figure of the paper's.

out_dir = "out-gpt2-200"
wandb_run_name = "gpt2-200"

norm = "layernorm"
attention = "dot"
init = "stock"

n_layer = 200
n_head = 12
n_embd = 768

batch_size = 3
block_size = 1024
gradient_accumulation_steps = 160  # 3 x 1,024 x 160 = 491,520 tokens
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 2.5e-4
min_lr = 2.5e-5
weight_decay = 0.1
grad_clip = 1.0

eval_interval = 1000
eval_iters = 200
log_interval = 10
monitor_every = 1000
