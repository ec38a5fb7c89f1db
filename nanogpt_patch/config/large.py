# 774M parameters [ST, Table 2 and 3a, App. K]. The paper shows its loss curve (Figure 11), below GPT-2 large's.
n_layer = 36
n_head = 20
n_embd = 1280
batch_size = 3
gradient_accumulation_steps = 160  # 3 x 1,024 x 160 = 491,520 tokens
learning_rate = 2.5e-4
min_lr = 2.5e-5
