"""A translation model that fairseq trained, as a folder that transformers loads: weights, tokenizer and how to generate.

fairseq is imported where it is needed, not with this file; fairseq_sigma, by the user's --user-dir, as in fairseq's commands.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from stable_core.checkpoint_file import read_checkpoint
from stable_core.options import Options

from .configuration_sigma_transformer import SigmaTransformerConfig
from .conversion import check_equal, from_pretrained_whole
from .exporting import export
from .modeling_sigma_transformer import SigmaTransformerForConditionalGeneration
from .tokenization_sigma_transformer import SigmaTransformerTokenizer

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new", "tanh": "tanh",
               "linear": "linear"}  # fmt: skip
REFUSED = (
    "encoder_learned_pos", "decoder_learned_pos", "no_token_positional_embeddings", "no_scale_embedding",
    "layernorm_embedding", "adaptive_input", "adaptive_softmax_cutoff", "merge_src_tgt_embed", "char_inputs",
    "cross_self_attention", "no_cross_attention", "no_decoder_final_norm", "base_layers", "quant_noise_pq",
    "quant_noise_scalar", "scale_attn", "scale_fc", "scale_heads", "scale_resids",
)  # fmt: skip


def convert_fairseq(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    bpe_codes: str | Path | None = None,
    moses: bool = False,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> float:
    """Writes a fairseq checkpoint as a model and a tokenizer of transformers; returns by how much their logits differ.

    Every arch of fairseq_sigma, and of fairseq's own `transformer`. Weights, gammas and the u of σReparam stay as they
    are. Generation is fairseq-generate's by default: beam 5, scores divided by the length, at most 200 tokens and the end.
    (Where the end is forced after 200, fairseq counts its log-probability and transformers does not: it may choose another
    of the five.)

    Args:
        checkpoint: written by fairseq-train.
        data: fairseq's data folder, or any that has the two `dict.<language>.txt`.
        out: the folder to write.
        bpe_codes: those of `subword-nmt`, if the text was segmented with them.
        moses: whether the text was tokenised with Moses, as recipes/wmt17_en_de does.
        source_lang, target_lang: left out, those of the checkpoint, or of the files in `data`, as fairseq-train finds them.

    Raises:
        ValueError: it is no checkpoint of such a model; an option of it is not known here; a dictionary is missing; or the
            logits differ by more than 1e-4. Nothing is written then.
    """
    model, task = load(Path(checkpoint), Path(data), source_lang, target_lang)
    config = convert_config(model.cfg, len(task.source_dictionary), len(task.target_dictionary))
    state = {convert_name(name): tensor for name, tensor in model.state_dict().items() if not is_bookkeeping(name)}
    ours = from_pretrained_whole(
        SigmaTransformerForConditionalGeneration, None, name=str(checkpoint), config=config, state_dict=state
    )
    difference = compare(model, ours, str(checkpoint))
    languages = task.cfg.source_lang, task.cfg.target_lang
    tokenizer = SigmaTransformerTokenizer(
        *(dictionary(data, language) for language in languages),
        bpe_codes,
        *languages,
        moses=moses,
        model_max_length=config.max_position_embeddings,
    )
    ours.generation_config = GenerationConfig(
        num_beams=5,
        early_stopping=True,
        length_penalty=1.0,
        min_new_tokens=1,
        max_length=min(202, config.max_position_embeddings + 1),  # with what it starts from
        forced_eos_token_id=config.eos_token_id,
        suppress_tokens=[config.pad_token_id],
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    export(ours, out, processors=(tokenizer,))
    return difference


def load(path: Path, data: Path, source_lang: str | None, target_lang: str | None):
    """fairseq's model, in evaluation mode, and its task; raises ValueError as `convert_fairseq` does."""
    from fairseq import checkpoint_utils
    from fairseq.data import data_utils
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY

    # Again: timm, once it has loaded a checkpoint, takes it off torch's list.
    torch.serialization.add_safe_globals([argparse.Namespace])
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("model"), dict) or not (checkpoint.get("cfg") or checkpoint.get("args")):
        raise ValueError(f"{path}: no checkpoint of fairseq: allowed are those that fairseq-train writes")
    options = {
        part: as_dict((checkpoint.get("cfg") or {}).get(part) or checkpoint.get("args") or {})
        for part in ("model", "task")
    }
    arch = options["model"].get("arch") or options["model"].get("_name")
    if ARCH_MODEL_NAME_REGISTRY.get(arch) not in ("transformer", "sigma_transformer"):
        raise ValueError(f"{path}: arch = {arch!r}: allowed are those of fairseq's transformer and of fairseq_sigma")
    task_name = options["task"].get("task") or options["task"].get("_name")
    if task_name != "translation":
        raise ValueError(f"{path}: task = {task_name!r}: allowed is 'translation'")
    languages = [
        given or options["task"].get(side)
        for side, given in (("source_lang", source_lang), ("target_lang", target_lang))
    ]
    if None in languages:
        languages = data_utils.infer_language_pair(str(data))
    if None in languages:
        raise ValueError(
            f"data = {str(data)!r}: its files do not say which languages they are; give source_lang and target_lang"
        )
    for language in languages:
        dictionary(data, language)
    overrides = {"data": str(data), "source_lang": languages[0], "target_lang": languages[1]}
    try:
        (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
    except RuntimeError as error:  # torch lists every key
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}...") from error
    return model.eval(), task


def as_dict(options) -> dict:
    return vars(options) if isinstance(options, argparse.Namespace) else dict(options)


def dictionary(data: str | Path, language: str) -> Path:
    """Its path; raises ValueError where there is none."""
    path = Path(data) / f"dict.{language}.txt"
    if not path.is_file():
        raise ValueError(f"data = {str(data)!r}: allowed is a folder that has {path.name}")
    return path


def convert_config(cfg, src_vocab_size: int, vocab_size: int) -> SigmaTransformerConfig:
    """fairseq's TransformerConfig -> ours; raises ValueError for an option that ours has not."""
    for option in REFUSED:
        if value := getattr(cfg, option, None):
            raise ValueError(f"{option} = {value!r}: allowed is a model without")
    d_model, before = cfg.encoder.embed_dim, cfg.encoder.normalize_before
    for option in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
        if getattr(cfg, option) != d_model:
            raise ValueError(f"{option} = {getattr(cfg, option)}: allowed is encoder_embed_dim = {d_model}")
    if cfg.decoder.normalize_before != before:
        raise ValueError(f"decoder_normalize_before = {not before}: allowed is encoder_normalize_before = {before}")
    if cfg.activation_fn not in ACTIVATIONS:
        raise ValueError(f"activation_fn = {cfg.activation_fn!r}: allowed are {', '.join(map(repr, ACTIVATIONS))}")
    blocks = getattr(cfg, "blocks", None)  # of fairseq_sigma
    options = Options(residual="pre-ln" if before else "post-ln") if blocks is None else blocks.options
    if options.attention == "stable" and cfg.max_target_positions != cfg.max_source_positions:
        raise ValueError(
            f"max_target_positions = {cfg.max_target_positions}: allowed with attention = 'stable', whose tau counts them, is "
            f"max_source_positions = {cfg.max_source_positions}"
        )
    return SigmaTransformerConfig(
        vocab_size=vocab_size,
        src_vocab_size=src_vocab_size,
        d_model=d_model,
        **{f"{side}_layers": getattr(cfg, side).layers for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": getattr(cfg, side).attention_heads for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": getattr(cfg, side).ffn_embed_dim for side in ("encoder", "decoder")},
        init_std=blocks and blocks.init_std,
        activation_function=ACTIVATIONS[cfg.activation_fn],
        dropout=cfg.dropout,
        attention_dropout=cfg.attention_dropout,
        activation_dropout=cfg.activation_dropout or cfg.relu_dropout,
        max_position_embeddings=max(cfg.max_source_positions, cfg.max_target_positions),
        tie_word_embeddings=cfg.share_decoder_input_output_embed,
        share_all_embeddings=cfg.share_all_embeddings,
        **vars(options),
    )


def is_bookkeeping(name: str) -> bool:
    return name.endswith((".version", ".embed_positions._float_tensor"))


def convert_name(name: str) -> str:
    return "lm_head.weight" if name == "decoder.output_projection.weight" else f"model.{name}"


@torch.no_grad()
def compare(theirs: nn.Module, ours: SigmaTransformerForConditionalGeneration, name: str) -> float:
    """The largest difference of two models' logits for random sentences of three lengths, padded; at most 1e-4."""
    config, generator = ours.config, torch.Generator().manual_seed(0)
    end, pad, most = config.eos_token_id, config.pad_token_id, min(12, config.max_position_embeddings - 1)

    def batch(vocab_size: int) -> Tensor:
        tokens = torch.randint(end + 1, vocab_size, (3, most), generator=generator)
        for row, length in enumerate((most, most // 2, 1)):
            tokens[row, length:] = pad
        return tokens

    source, target = batch(config.source_vocab_size), batch(config.vocab_size)
    ends = nn.functional.one_hot(source.ne(pad).sum(1), most + 1).bool()
    source = nn.functional.pad(source, (0, 1), value=pad).masked_fill(ends, end)
    target = nn.functional.pad(target[:, :-1], (1, 0), value=end)
    expected, _ = theirs(source, source.ne(pad).sum(1), target)
    logits = ours.eval()(source, source.ne(pad).long(), target).logits
    return check_equal(logits[target.ne(pad)], expected[target.ne(pad)], name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `run`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="written by fairseq-train")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--data", type=Path, required=True, help="fairseq's data folder, which has dict.<language>.txt")
    parser.add_argument("--user-dir", type=Path, help="fairseq's, for any checkpoint, as it lets torch read them "
                        "(default: fairseq_sigma's)")  # fmt: skip
    parser.add_argument("--bpe-codes", type=Path, help="codes of subword-nmt, if the text was segmented with them")
    for side in ("source", "target"):
        parser.add_argument(f"--{side}-lang", help="default: the checkpoint's, or that of the files in --data")
    parser.add_argument("--moses", action="store_true", help="the text was tokenised with Moses, by sacremoses")


def run(args: argparse.Namespace) -> Path:
    from fairseq.utils import import_user_module

    if args.user_dir is None:
        found = find_spec("fairseq_sigma")
        if found is None:
            raise ValueError("user_dir = None: fairseq_sigma is not installed; give --user-dir plugins/fairseq_sigma")
        args.user_dir = Path(found.origin).parent
    if not args.user_dir.is_dir():
        raise ValueError(f"user_dir = {str(args.user_dir)!r}: allowed is a folder, plugins/fairseq_sigma")
    import_user_module(args)
    difference = convert_fairseq(
        args.checkpoint, args.data, args.out, args.bpe_codes, args.moses, args.source_lang, args.target_lang
    )
    print(f"the logits differ by {difference:.1e}")
    return args.out
