"""``pconv eval``: evaluates networks and baselines by class of masks."""

import argparse

from pconv_jax.cli import config_options
from pconv_jax.cli._cache import add_cache, use_cache
from pconv_jax.cli._options import Subparsers, expand

_DESCRIPTION = """\
Evaluates a trained network on classes of masks: six ranges of hole ratio, with and
without holes at the border, and thin and wide holes. Compares it with methods that need
no network.

All methods get the same images and masks. The results go to evaluation/ in the workdir,
those of --weights NAME.safetensors to runs/NAME-evaluation/, or to --out: report.html,
a page with tables, plots and images; results.json, results.md and examples.csv;
timing.json; pictures.png and worst.png. If it is interrupted, the same command resumes
it.
"""

_EXAMPLES = """\
examples:
  pconv eval --workdir runs/pconv-quickstart
  pconv eval --weights places.safetensors --images photos/ --masks nvidia/test/
  pconv eval --workdir runs/a --methods=network,b=runs/b,telea,patchmatch
"""


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "eval",
        help="compare a network with other networks and baselines",
        usage="%(prog)s (--workdir DIR | --weights FILE) [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_network(command)
    _add_examples(command)
    _add_metrics(command)
    command.add_argument(
        "--out",
        metavar="DIR",
        type=expand,
        help="folder of the results (default: evaluation/ in the workdir; for weights, "
        "runs/NAME-evaluation/)",
    )
    add_cache(command)
    config_options.add_config_options(command, required=False)
    command.set_defaults(run=_run)


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", metavar="DIR", type=expand, help="folder of a training run"
    )
    command.add_argument(
        "--weights",
        metavar="NAME_OR_PATH",
        type=expand,
        help="a weights file, or the name of a bundled one, instead of a run",
    )
    command.add_argument(
        "--step",
        metavar="N",
        type=int,
        help="step of the checkpoint (default: the newest)",
    )
    command.add_argument(
        "--methods",
        type=_words,
        default=None,
        metavar="NAME,...",
        help="what to compare: network; repair, the network and the search for detail; "
        "sharp, the same with pieces of the image in wide holes; mean, telea, "
        "navier_stokes, biharmonic, patchmatch; NAME=PATH for another network, by its "
        "workdir or weights file; or all, for the network and the baselines (default: "
        "network,mean,telea,navier_stokes)",
    )
    command.add_argument(
        "--time-budget",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="longest time of a baseline for an image (default: 60)",
    )
    command.add_argument(
        "--device-batch",
        type=int,
        default=1,
        metavar="N",
        help="images that a device computes at a time; accelerators are faster with "
        "more, but only with 1 are results the same on any number of devices "
        "(default: 1)",
    )


def _add_examples(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--examples", metavar="N", type=int, help="examples of each class of masks"
    )
    command.add_argument(
        "--images",
        metavar="PATH",
        type=expand,
        help="folder or tar file of other images",
    )
    command.add_argument(
        "--masks", metavar="DIR", type=expand, help="folder of mask images"
    )
    command.add_argument(
        "--classes",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="classes of the drawn masks: bins, the twelve of the paper; thin; wide "
        "(default: bins,thin,wide)",
    )
    command.add_argument(
        "--hole-color",
        choices=("white", "black"),
        default="white",
        help="color of the holes in --masks (default: white)",
    )
    command.add_argument(
        "--image-size", metavar="N", type=int, help="side of the images, in pixels"
    )
    command.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of masks and intervals (default: 0)",
    )


def _add_metrics(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--learned",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute LPIPS, FID, Inception Score and a distance by VGG16, whose "
        "weights are downloaded once, about 340 MB (default: compute those whose "
        "weights are there or can be downloaded)",
    )
    command.add_argument(
        "--nolearned", dest="learned", action="store_false", help=argparse.SUPPRESS
    )
    command.add_argument(
        "--vgg",
        metavar="FILE",
        type=expand,
        help="weights file of another VGG for the distance",
    )


def _words(text: str) -> list[str]:
    """Split a list; ``NAME=PATH`` may have a path with a leading ``~``."""
    pairs = (word.partition("=") for word in text.split(","))
    return ["".join([name, equals, expand(path)]) for name, equals, path in pairs]


def _run(arguments: argparse.Namespace) -> None:
    with config_options.importing_training():
        from pconv_jax.evaluate import runner
        from pconv_jax.runs import logs

    use_cache(arguments)
    logs.log_to_stderr()
    evaluation = runner.evaluate_run(
        arguments.workdir,
        weights=arguments.weights,
        config=config_options.read_config(arguments),
        step=arguments.step,
        methods=arguments.methods or runner.DEFAULT_METHODS,
        data=runner.EvalData(
            images=arguments.images,
            masks=arguments.masks,
            hole_color=arguments.hole_color,
            image_size=arguments.image_size,
            examples=arguments.examples,
            seed=arguments.seed,
            classes=arguments.classes,
        ),
        time_budget=arguments.time_budget,
        learned=arguments.learned,
        vgg=arguments.vgg,
        device_batch=arguments.device_batch,
        out=arguments.out,
    )
    print(evaluation)
