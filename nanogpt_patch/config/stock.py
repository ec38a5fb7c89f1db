# GPT-2, which the paper's models are held against: nanoGPT's own model.
norm = "layernorm"
attention = "dot"
init = "stock"
