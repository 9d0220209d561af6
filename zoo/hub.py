"""Fetches published weights into the Hugging Face cache."""

import os
import re
from pathlib import Path

from zoo.errors import WeightsError
from zoo.registry import PretrainedCfg

DEFAULT_ENDPOINT = "https://huggingface.co"


def fetch(cfg: PretrainedCfg) -> Path:
    """The file of these weights, from the cache or from the hub.

    The names of `cfg.filenames` are tried in turn. The environment variables of `huggingface_hub` hold:
    `HF_ENDPOINT` for a mirror, `HF_HOME` for the cache, `HF_HUB_OFFLINE`, `HF_TOKEN`.

    Raises:
        ImportError: where `huggingface_hub` is not installed.
        WeightsError: where the weights are not on the hub, or neither reachable nor in the cache; it says which
            file to download from where, and how to pass it.
    """
    if cfg.hub_id is None or cfg.availability != "published":
        raise WeightsError(
            f"{cfg.tag}: these weights cannot be fetched ({cfg.availability}; see {cfg.source}); pass a file as source="
        )
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"fetching {cfg.tag} needs huggingface_hub: pip install 'attention-zoo[hub]', or download"
            f" {_url(cfg, cfg.filenames[0])} by hand and pass it as source="
        ) from error
    unreachable = None
    for filename in cfg.filenames:
        try:
            return Path(hf_hub_download(cfg.hub_id, filename, endpoint=_endpoint()))
        except errors.LocalEntryNotFoundError as error:
            # Another of the names may be in the cache.
            unreachable = unreachable or error
        except errors.EntryNotFoundError:
            continue
        except errors.RepositoryNotFoundError as error:
            raise _not_fetched(cfg, f"there is no public repository {cfg.hub_id}") from error
        except Exception as error:
            # Refused and broken connections, wrong lengths, full disks: every HTTP library and every release of
            # huggingface_hub has classes of its own for them.
            raise _not_fetched(cfg, f"{type(error).__name__}: {error}") from error
    if unreachable is not None:
        raise _not_fetched(cfg, "no connection, or HF_HUB_OFFLINE is set") from unreachable
    raise _not_fetched(cfg, f"{cfg.hub_id} holds no {' or '.join(cfg.filenames)}")


def stated_digest(path: Path) -> str | None:
    """The SHA-256 under which the hub keeps a file of the cache, None where it keeps it under another name."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _not_fetched(cfg: PretrainedCfg, why: str) -> WeightsError:
    model, filename = cfg.tag.partition(".")[0], cfg.filenames[0]
    return WeightsError(
        f"{cfg.tag} is not in the cache and could not be fetched from {_endpoint()}: {why}\n"
        f"  download {_url(cfg, filename)}\n"
        f"  and pass it: zoo.load_pretrained({model!r}, {filename!r})"
    )


def _endpoint() -> str:
    # huggingface_hub reads the variable once, when it is imported.
    return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def _url(cfg: PretrainedCfg, filename: str) -> str:
    return f"{_endpoint()}/{cfg.hub_id}/resolve/main/{filename}"
