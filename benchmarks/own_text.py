"""Options of the commands that calibrate on windows which the model wrote, beside those of a text."""

import argparse
from pathlib import Path

from vllm_wkvquant.config import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """--own-text and --own-samples."""
    parser.add_argument("--own-text", type=Path, metavar="FILE", help="what `wkvquant write-text` wrote with MODEL")
    parser.add_argument("--own-samples", type=int, default=0, help="windows of it beside the others (%(default)s)")


def check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError unless both are there or none."""
    if bool(args.own_text) != bool(args.own_samples):
        raise ConfigError("--own-text and --own-samples belong together; give both or none")
