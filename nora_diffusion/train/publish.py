"""``output.push_to_hub``: a finished run as a Hugging Face repository."""

from __future__ import annotations

import shlex
from pathlib import Path

from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.settings import quote

LEFT_OUT = ("checkpoints/*", "tensorboard/*", "wandb/*", "class_images/*", ".*")
"""What is of use to the run alone; ``*`` goes through folders."""


def check_upload(cfg: DreamboothConfig) -> None:
    """See to it, before training, that a finished run could be uploaded.

    Raises:
        UserError: when the repository's name is none, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo = cfg.output.push_to_hub
    if repo is None:
        return
    try:
        validate_repo_id(repo)
        named = repo.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UserError(f"output.push_to_hub = {quote(repo)}: give USER/NAME, as in anna/my-dog")
    if get_token() is None:
        raise UserError(
            f"output.push_to_hub = {quote(repo)}: there is no Hugging Face token to upload with; "
            "run: hf auth login, or set HF_TOKEN, or leave the key out"
        )


def push_to_hub(run: Path, repo: str) -> str:
    """Upload a run folder, without checkpoints and logs; returns the repository's address.

    Raises:
        UserError: when that fails; it says how to try again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=run, ignore_patterns=list(LEFT_OUT))
    except Exception as error:  # network, permission, quota, ...: the run itself is done
        raise UserError(
            f"output.push_to_hub = {quote(repo)}: the run is finished and everything is in {run}, "
            f"but the upload failed ({str(error).strip() or type(error).__name__}); "
            f"try again with: {retry_command(run, repo)}"
        ) from error
    return str(address)


def retry_command(run: Path, repo: str) -> str:
    """The shell command that uploads the same."""
    left_out = [word for pattern in LEFT_OUT for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo, str(run), ".", "--private", *left_out])
