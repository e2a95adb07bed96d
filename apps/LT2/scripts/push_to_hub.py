"""Upload an exported Hugging Face folder to the Hub.

    python -m apps.LT2.scripts.push_to_hub demo-hf repo=USER/NAME dry_run=true
    python -m apps.LT2.scripts.push_to_hub demo-hf repo=USER/NAME

The token is that of `hf auth login`, or of the environment variable HF_TOKEN. A new repository is
private. After an interruption, the same command uploads what is missing.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lingua.args import parse_args
from lingua.errors import MachineFault, UserError, first_line, import_optional, run_cli

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"


@dataclass(kw_only=True)
class PushArgs:
    POSITIONAL: ClassVar = "folder"

    folder: str  # made by export_weights format=hf
    repo: str  # USER/NAME or ORGANIZATION/NAME; it is created if missing
    private: bool = True  # only its owners see the repository; false = everybody does
    message: str = "Upload model"  # of the commit
    dry_run: bool = False  # print what would be sent, and send nothing


def push(args: PushArgs) -> None:
    hub = import_optional("huggingface_hub", extra="hub", needed_by="push_to_hub")
    for module in ("errors", "utils"):  # the package imports them on demand
        importlib.import_module(f"huggingface_hub.{module}")
    files = find_files(args.folder)
    check_repo(hub, args.repo)
    visibility = "private" if args.private else "public"
    print(f"{args.folder} -> {args.repo} ({visibility})")
    sizes = {file.name: file.stat().st_size for file in files}
    for name, size in [*sizes.items(), (f"{len(sizes)} files", sum(sizes.values()))]:
        print(f"{size:>16,} bytes  {name}")
    if args.dry_run:
        print("dry_run=true: nothing was sent")
        return
    token = hub.get_token()
    if not token:
        raise UserError("no Hugging Face token; run `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi(token=token)
    with hub_errors(hub, args.repo):
        api.create_repo(args.repo, private=args.private, exist_ok=True)
        if args.private and not api.repo_info(args.repo).private:
            raise UserError(
                f"repo={args.repo} exists and is public; set private=false, or name another"
            )
        done = api.upload_folder(
            folder_path=args.folder,
            repo_id=args.repo,
            commit_message=args.message,
            allow_patterns=list(sizes),
        )
    print(f"sent: {done.commit_url}")


def find_files(folder: str) -> list[Path]:
    """Return the files to send, sorted by name. UserError if `folder` is not a complete export."""
    root = Path(folder)
    remedy = "make it with python -m apps.LT2.scripts.export_weights format=hf"
    if not root.is_dir():
        raise UserError(f"folder={folder} is not a folder (seen from {Path.cwd()})")
    try:
        is_model = "model_type" in json.loads((root / CONFIG).read_text(encoding="utf-8"))
        index = root / INDEX
        needed = {WEIGHTS}
        if index.is_file():
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_model, needed = False, set()
    if not is_model:
        raise UserError(f"folder={folder} has no valid {CONFIG}; {remedy}")
    if missing := sorted(name for name in needed if not (root / name).is_file()):
        raise UserError(f"folder={folder} lacks {', '.join(missing)}; {remedy}")
    files = [path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(files)


def check_repo(hub: Any, repo: str) -> None:
    try:
        hub.utils.validate_repo_id(repo)
        is_valid = "/" in repo
    except hub.errors.HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(
            f"repo={repo} must be USER/NAME: letters, digits, '-', '_' and '.', without '--' and "
            "'..', and not ending in '.git'"
        )


@contextmanager
def hub_errors(hub: Any, repo: str) -> Iterator[None]:
    """Turn an error of the Hub or the network into one line."""
    again = "the same command uploads what is missing"
    try:
        yield
    except UserError:
        raise
    except hub.errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"repo={repo}: the Hub answered {status}: {_reason(error)}"
        if status in (401, 403):
            raise UserError(f"{reason}; use a token that may write to {repo}") from None
        raise MachineFault(f"{reason}; {again}") from None
    except (hub.errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise MachineFault(
            f"repo={repo}: the upload failed: {first_line(error)}; {again}"
        ) from None


def _reason(error: Any) -> str:
    return " ".join((error.server_message or error.response.reason_phrase).split())


def main(argv: list[str]) -> None:
    push(parse_args(PushArgs, argv, prog="python -m apps.LT2.scripts.push_to_hub", doc=__doc__))


if __name__ == "__main__":
    run_cli(main)
