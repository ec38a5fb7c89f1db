"""Build time of a σReparam ViT, ViT-H if nothing is said, against timm's plain one: `python -m benchmarks.build`.

One process; in every round timm's model and then ours is built anew and deleted.
"""

import gc

import timm
import torch

import timm_stable  # noqa: F401  registers the models
from benchmarks.paired import Report, arguments, interleave


def main() -> None:
    parser = arguments("build", __doc__, rounds=10)
    parser.add_argument("--size", default="huge_patch14", help="of the ViT, as timm names it (default: %(default)s)")
    args = parser.parse_args()

    def build(model: str) -> None:
        with torch.device(args.device):
            timm.create_model(model)
        gc.collect()  # parametrised modules are in reference cycles, and models of 2.5 GB would pile up

    models = [f"{family}_{args.size}_224" for family in ("vit", "sigma_vit")]
    work = {model: lambda model=model: build(model) for model in models}
    report = Report("build", args.device)
    report.add(args.size, interleave(work, args.rounds, args.device, "building", warm_up=0), models[:1], "s", 1)
    report.save(args.out)


if __name__ == "__main__":
    main()
