"""Download a tokenizer's file, for `data.tokenizer.path`.

    python setup/download_tokenizer.py llama3 tokenizer --api_key <HUGGINGFACE_TOKEN>

saves the file under its path in the repository (tokenizer/original/tokenizer.model for llama3) and
prints the options for a recipe. Llama and Gemma are licensed: accept the terms on their pages
first. Without --api_key, the token comes from HF_TOKEN or `hf auth login`. cl100k_base needs no
token: it is an encoding of tiktoken with Llama 3's split rule, saved in the same format.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lingua

from lingua.config.cli import OneLineParser
from lingua.errors import UserError, first_line, import_optional, run_cli
from lingua.files.atomic import write_atomic
from lingua.prepare.network import HUB, call_online


@dataclass(frozen=True)
class HubFile:
    repo_id: str
    file: str
    kind: str  # data.tokenizer.name


TOKENIZERS = {
    "llama2": HubFile("meta-llama/Llama-2-7b", "tokenizer.model", "sp"),
    "llama3": HubFile("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model", "tiktoken"),
    "gemma": HubFile("google/gemma-2b", "tokenizer.model", "sp"),
}

# data.tokenizer.name=tiktoken splits text by Llama 3's rule, which this encoding shares. With the
# ranks of another encoding it would silently give other tokens.
CL100K = "cl100k_base"
TIKTOKEN = "https://openaipublic.blob.core.windows.net"  # where tiktoken has its encodings


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("name", help=f"{', '.join(TOKENIZERS)} or {CL100K}")
    add("path_to_save", type=Path, help="output folder")
    add("--api_key", help="Hugging Face token; never printed or stored")
    return parser.parse_args(argv)


def download_from_hub(wanted: HubFile, folder: Path, api_key: str | None) -> Path:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it logs each of its retries
    hub = import_optional("huggingface_hub", extra="data", needed_by="downloading a tokenizer")
    what = f"{wanted.file} of {wanted.repo_id}"
    download = partial(
        hub.hf_hub_download, wanted.repo_id, filename=wanted.file, local_dir=folder, token=api_key
    )
    try:
        return Path(call_online(download, HUB, what))
    except UserError:
        raise
    except Exception as error:  # from the hub, its HTTP library, the network or the disk
        problem = f"{what} could not be downloaded: {first_line(error)}"
        if api_key:
            problem = problem.replace(api_key, "<api_key>")
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            problem += f"; accept its terms at {HUB}/{wanted.repo_id} and give --api_key"
        raise UserError(problem) from None


def save_tiktoken(name: str, folder: Path) -> Path:
    """Save the ranks of an encoding in tiktoken's format: lines of base64 and rank."""
    if name != CL100K:
        raise UserError(
            f"name={name} must be one of {', '.join([*TOKENIZERS, CL100K])}; for other tokenizers "
            "use their tokenizer.json with data.tokenizer.name=hf"
        )
    tiktoken = import_optional("tiktoken", extra="", needed_by=name)
    try:
        ranks = call_online(lambda: tiktoken.get_encoding(name), TIKTOKEN, name)._mergeable_ranks
    except UserError:
        raise
    except Exception as error:  # from its HTTP library or the network
        raise UserError(f"{name} could not be downloaded: {first_line(error)}") from None
    lines = (
        base64.b64encode(token) + f" {rank}\n".encode()
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tiktoken"
    write_atomic(path, b"".join(lines))
    return path


def main(argv: Sequence[str]) -> None:
    given = parse_options(argv)
    if given.path_to_save.exists() and not given.path_to_save.is_dir():
        raise UserError(f"path_to_save={given.path_to_save} is a file; give a folder")
    wanted = TOKENIZERS.get(given.name)
    if wanted is None:
        path, kind = save_tiktoken(given.name, given.path_to_save), "tiktoken"
    else:
        path = download_from_hub(wanted, given.path_to_save, given.api_key)
        kind = wanted.kind
    print(f"data.tokenizer.name={kind} data.tokenizer.path={path}")


if __name__ == "__main__":
    run_cli(main)
