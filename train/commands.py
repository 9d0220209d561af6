"""What the commands of `train` share. Nothing here imports jax: a command may have to say first on what it will run."""

import argparse
from typing import Any


def parser(module: str, about: str | None, **settings: Any) -> argparse.ArgumentParser:
    """The parser of `python -m module`, without options so far.

    Args:
        about: the module's docstring, printed as it is.
        settings: more of `argparse.ArgumentParser`.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )
