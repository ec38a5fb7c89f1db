# 200 blocks of width 768: the paper's 200-layer runs are ViTs (Figure 13), and this is the small GPT with their depth.
# No figure of the paper's; the learning rate is the large one's.
n_layer = 200
batch_size = 3
gradient_accumulation_steps = 160  # 3 x 1,024 x 160 = 491,520 tokens
learning_rate = 2.5e-4
min_lr = 2.5e-5
