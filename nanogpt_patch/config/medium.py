# 350M parameters [ST, Table 2 and 3a]. The paper: a validation loss of 2.569 (GPT-2 medium: 2.579).
n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 6
gradient_accumulation_steps = 80  # 6 x 1,024 x 80 = 491,520 tokens
learning_rate = 3e-4
min_lr = 3e-5
