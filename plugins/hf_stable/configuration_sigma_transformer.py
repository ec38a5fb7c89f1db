"""The translation model's configuration."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .configuration_stable import StableConfig, check, check_positive


@strict
class SigmaTransformerConfig(StableConfig):
    r"""
    BART's fields and fairseq's defaults; by default 6L-6L with DeepNorm and σReparam [σ, App. F].

    Attributes:
        vocab_size: of the target.
        src_vocab_size: of the source, vocab_size if left out.
        d_model: width of tokens.
        encoder_layers, decoder_layers: how many.
        encoder_attention_heads, decoder_attention_heads: divisors of d_model.
        encoder_ffn_dim, decoder_ffn_dim: widths of the feed-forward layers.
        residual, reparam: and all else of `stable_core.options.Options`; N of StableAtten's tau is max_position_embeddings, and
            init = "stock" fairseq's. gamma_init left out is the paper's, "one", with reparam = "sigma".
        activation_function: fairseq's "relu".
        dropout, attention_dropout, activation_dropout: of embeddings and residual branches, of the attention matrix, and
            between the feed-forward layers.
        max_position_embeddings: longest sequence, of the source and of the target.
        tie_word_embeddings: one matrix for the decoder's input and output; fairseq's `share_decoder_input_output_embed`, a
            name that works here too.
        share_all_embeddings: the encoder's input as well.
        init_std: of init = "stock", a truncated normal for the blocks' weights; left out, 0.1 where gamma starts at 1, and
            fairseq's own initialisation otherwise.
        initializer_range: of embeddings and output, d_model^(-1/2) if left out.
    """

    model_type = "sigma_transformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "share_decoder_input_output_embed": "tie_word_embeddings",
    }
    auto_classes = {
        "AutoConfig": "configuration_sigma_transformer.SigmaTransformerConfig",
        "AutoModel": "modeling_sigma_transformer.SigmaTransformerModel",
        "AutoModelForSeq2SeqLM": "modeling_sigma_transformer.SigmaTransformerForConditionalGeneration",
    }

    vocab_size: int = 32000
    src_vocab_size: int | None = None
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    residual: str = "deepnorm"
    reparam: str = "sigma"
    gamma_init: str | None = None
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = False
    share_all_embeddings: bool = False
    init_std: float | None = None
    use_cache: bool = True
    is_encoder_decoder: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        if self.gamma_init is None:
            self.gamma_init = "one" if self.reparam in ("sigma", "spectral") else "spectral"
        starts_at_one = self.reparam in ("sigma", "spectral") and self.gamma_init == "one"
        if self.init_std is None and self.init == "stock" and starts_at_one:
            self.init_std = 0.1
        if self.initializer_range is None:
            self.initializer_range = max(self.d_model, 1) ** -0.5
        if self.share_all_embeddings:
            self.tie_word_embeddings = True
        super().__post_init__(**kwargs)

    def check_settings(self) -> None:
        super().check_settings()
        check(self, "activation_function", ACT2FN)
        sides = ("encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")
        heads = ("encoder_attention_heads", "decoder_attention_heads")
        check_positive(
            self, "vocab_size", "source_vocab_size", "d_model", *sides, *heads, "max_position_embeddings", "init_std"
        )
        for field in heads:
            if self.d_model % getattr(self, field):
                raise ValueError(
                    f"{field} = {getattr(self, field)!r}: allowed are divisors of d_model = {self.d_model}"
                )
        if self.d_model < 4:
            raise ValueError(f"d_model = {self.d_model!r}: allowed are whole numbers from 4, for fairseq's positions")
        for field in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)!r}: allowed are numbers from 0 to below 1")
        if self.share_all_embeddings and self.source_vocab_size != self.vocab_size:
            raise ValueError(
                f"share_all_embeddings = True: src_vocab_size = {self.src_vocab_size}, allowed is vocab_size = "
                f"{self.vocab_size}"
            )

    @property
    def source_vocab_size(self) -> int:
        """Not filled in at the start: who sets vocab_size later means both."""
        return self.vocab_size if self.src_vocab_size is None else self.src_vocab_size
