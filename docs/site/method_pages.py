"""The site's page of each method: when to take it, what it costs, equation, slow reference code, evidence."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "recipes/lr_sensitivity/README.md"
WHEN_NOT = "docs/when_not_to_use.md"


@dataclass(frozen=True)
class Method:
    """A page.

    Attributes:
        option: how it is asked for in every stack.
        public: what the docstring at the top is of; without it the reference code's says the equation.
        reference: functions of stable_core/reference.py.
        evidence: pages, from the root.
    """

    title: str
    option: str
    public: str | None
    reference: tuple[str, ...]
    when: str
    cost: str
    evidence: tuple[str, ...]


METHODS = {
    "sigma_reparam": Method(
        "σReparam",
        "reparam=sigma, or `sigma_reparam(model)`",
        "stable_core.sigma_reparam.sigma_reparam",
        ("spectral_norm", "effective_weight", "power_iteration"),
        "A run has collapsed, or you start anew and do not know the rate. At its best rate it loses nothing in a GPT, "
        "and is best in a translation. Not for the first updates of a small ViT, nor with Muon.",
        "A step takes 1.01 to 1.14 of the plain one; weights take one copy more, or none after `recompute`. Folded, nothing.",
        (SWEEP, "recipes/rescue/README.md", "docs/scaling.md", WHEN_NOT),
    ),
    "stable_norm": Method(
        "StableNorm",
        "norm=stable",
        "stable_core.stable_norm.StableNorm",
        ("stable_norm",),
        "Together with StableAtten and StableInit, for a wide range of rates without warm-up. Alone it helps a little.",
        "That of torch's fused RMSNorm.",
        (SWEEP, "recipes/gpt/README.md"),
    ),
    "stable_attention": Method(
        "StableAtten",
        "attention=stable",
        "stable_core.attentions.stable_qk_norms",
        ("stable_logits",),
        "Logits are to be bounded by construction, for good. Of Stable-Transformer's parts it helps most.",
        "Two norms an attention, in training and to serve.",
        (SWEEP, "recipes/evidence/README.md"),
    ),
    "stable_init": Method(
        "StableInit",
        "init=stable",
        "stable_core.stable_init.stable_init_",
        ("stable_init_std",),
        "Together with StableNorm and StableAtten. Alone it costs loss in a small GPT.",
        "Nothing.",
        (SWEEP, "recipes/gpt/README.md"),
    ),
    "deepnorm": Method(
        "DeepNorm",
        "residual=deepnorm",
        "stable_core.deepnorm.deepnorm_scales",
        ("deepnorm", "deepnorm_scales"),
        "Deep post-LN does not begin to learn.",
        "Nothing.",
        ("recipes/number_words/README.md", "recipes/evidence/README.md", SWEEP),
    ),
    "qk_norm": Method(
        "QK-norm",
        "attention=qknorm",
        None,
        ("qk_norm_logits",),
        "You train with Muon, or a ViT at high rates. Not to be put into a trained model, which it breaks.",
        "Two norms an attention, in training and to serve.",
        (SWEEP, "docs/which_remedy.md"),
    ),
    "qk_clip": Method(
        "QK-clip",
        "`QKClip(model, threshold, optimizer=optimizer)`",
        "stable_core.qk_clip.clip_factors",
        ("qk_clip",),
        "Logits grow in a model that is not to be changed.",
        "A step takes 1.00 to 1.20; to serve, nothing.",
        ("docs/qk_clip.md", SWEEP),
    ),
    "z_loss": Method(
        "z-loss",
        "`loss + z_loss(logits)`; `--z-loss` in fairseq, `z_loss` in Hugging Face and nanoGPT",
        "stable_core.z_loss.z_loss",
        ("z_loss",),
        "The logits of the output drift (PaLM). It did nothing in our three stacks, where it is attention's logits that grow.",
        "A logsumexp of the output's logits.",
        (SWEEP,),
    ),
    "baselines": Method(
        "Spectral norm, weight norm, L2 attention",
        "reparam=spectral, reparam=weight, attention=l2 or l2_tied",
        "stable_core.sigma_reparam.SigmaReparamConfig",
        ("spectral_norm", "weight_norm", "l2_logits"),
        "To compare with, as the papers do. Spectral norm costs accuracy.",
        "That of σReparam; L2 attention does not run on flash attention.",
        (SWEEP, "recipes/evidence/README.md", WHEN_NOT),
    ),
}


def reference_code(names: tuple[str, ...]) -> str:
    text = (ROOT / "stable_core" / "reference.py").read_text(encoding="utf-8")
    found = {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node, "name")}
    return "\n\n\n".join(found[name] for name in names)


def link(path: str) -> str:
    """To a page, by its title."""
    title = (ROOT / path).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return f"- [{title}](../{path})"


def page(method: Method) -> str:
    """In Markdown, for a folder below the root."""
    parts = [
        f"# {method.title}\nAsked for by: {method.option}. [Every option](../docs/methods.md).",
        f"## When\n{method.when} [Which remedy](../docs/which_remedy.md).",
        f"## Cost\n{method.cost}",
        f"::: {method.public}" if method.public else "",
        f"## Reference code\nOurs is faster, and tested equal to this.\n```python\n{reference_code(method.reference)}\n```",
        "## Evidence\n" + "\n".join(map(link, method.evidence)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
