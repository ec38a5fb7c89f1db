# GPT-2 large, the baseline of StableGPT-L.
# torchrun --standalone --nproc_per_node=8 -m nanogpt_patch PATH/TO/nanoGPT/train.py config/train_gpt2_large.py
# The paper shows its loss curve (Figure 11).

out_dir = "out-gpt2-large"
wandb_run_name = "gpt2-large"

norm = "layernorm"
attention = "dot"
init = "stock"

n_layer = 36
n_head = 20
n_embd = 1280

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
