"""StableGPT's configuration."""

from huggingface_hub.dataclasses import strict

from .configuration_stable import StableConfig, check_positive


@strict
class StableGPTConfig(StableConfig):
    r"""
    nanoGPT's fields and StableGPT's [ST, Table 2]; HF's names for them work as well. Presets: `StableGPTConfig.preset("M")`.

    Attributes:
        vocab_size: by default that of GPT-2's tokenizer.
        block_size: longest sequence, and N of StableAtten's tau.
        n_layer, n_head, n_embd: by default StableGPT-S.
        norm, attention, init: and all else of `stable_core.options.Options`; init = "stock" is GPT-2's.
        initializer_range: standard deviation of embeddings, and of init = "stock". Left out it is 0.02, and in reparametrised
            layers what has the spectral norm that 0.02 has at GPT-2's widths (`stable_core.init_std`).
        n_inner: width of the MLPs, 4 n_embd if left out.
        activation_function: nanoGPT's "gelu"; OpenAI's GPT-2 has "gelu_new".
        dropout: of embeddings, attention and residual branches.
        bias: of Linear and LayerNorm layers.
    """

    model_type = "stable_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "n_positions": "block_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    }
    auto_classes = {
        "AutoConfig": "configuration_stable_gpt.StableGPTConfig",
        "AutoModel": "modeling_stable_gpt.StableGPTModel",
        "AutoModelForCausalLM": "modeling_stable_gpt.StableGPTForCausalLM",
    }

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None
    activation_function: str = "gelu"
    dropout: float | int = 0.0
    bias: bool = False
    norm: str = "stable"
    attention: str = "stable"
    init: str = "stable"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    @property
    def mlp_width(self) -> int:
        """Not filled in at the start: who sets n_embd later means both."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def check_settings(self) -> None:
        super().check_settings()
        check_positive(self, "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_width")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head = {self.n_head!r}: allowed are divisors of n_embd = {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout!r}: allowed are numbers from 0 to below 1")

    @classmethod
    def preset(cls, size: str, **fields) -> "StableGPTConfig":
        """StableGPT-S, -M or -L: 124M, 350M and 774M parameters [ST, Table 2]; `fields` override it."""
        sizes = {"S": (12, 12, 768), "M": (24, 16, 1024), "L": (36, 20, 1280)}
        if size not in sizes:
            raise ValueError(f"size = {size!r}: allowed are {', '.join(map(repr, sizes))}")
        return cls(**{**dict(zip(("n_layer", "n_head", "n_embd"), sizes[size], strict=True)), **fields})
