"""Format conversations as text, with the chat template in the tokenizer's folder.

The template is `chat_template.jinja` or the key `chat_template` of `tokenizer_config.json`, as
Hugging Face writes them. Our tokenizers encode the names of special tokens as plain text, so a
template that contains such names logs a warning.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lingua.errors import UserError, import_optional
from lingua.tokenizer import CONFIG_NAME, TokenizerArgs, find_tokenizer_file, read_json_object

logger = logging.getLogger(__name__)


class ChatTemplate:
    """A Jinja template; `source` is the file that it comes from."""

    def __init__(self, text: str, source: Path | str):
        self._jinja2 = import_optional("jinja2", extra="eval", needed_by="apply_chat_template")
        sandbox = import_optional("jinja2.sandbox", extra="eval", needed_by="apply_chat_template")
        self.text, self.source = text, source
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(text)
        except self._jinja2.TemplateError as error:
            raise UserError(f"{source}: not a chat template: {error}") from None
        if "<|" in text or "[INST]" in text:
            logger.warning("%s: special tokens in the template are encoded as plain text", source)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token="",  # the tokenizer adds it
                eos_token="",
            )
        except UserError:
            raise
        except Exception as error:  # a template can raise any error
            raise UserError(
                f"{self.source}: the chat template cannot format this conversation: {error}; "
                "replace chat_template.jinja, or set apply_chat_template=false"
            ) from None


def find_chat_template(tokenizer: TokenizerArgs) -> ChatTemplate:
    """Find the template in the folder of the tokenizer's file. UserError if missing."""
    if (found := read_chat_template(tokenizer)) is not None:
        return ChatTemplate(*found)
    file = find_tokenizer_file(tokenizer.name, tokenizer.path)
    place = file.parent if file is not None else f"the tokenizer {tokenizer.name} (it has no file)"
    raise UserError(
        f"harness.apply_chat_template=true: no chat template in {place}; add a "
        "chat_template.jinja, or set false"
    )


def read_chat_template(tokenizer: TokenizerArgs) -> tuple[str, Path] | None:
    """Return the text of the template and its file, or None without a template."""
    file = find_tokenizer_file(tokenizer.name, tokenizer.path)
    if file is None:
        return None
    jinja = file.with_name("chat_template.jinja")
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8"), jinja
    config = file.with_name(CONFIG_NAME)
    text = read_json_object(config).get("chat_template")
    if isinstance(text, list):  # several templates by name
        text = next((named["template"] for named in text if named["name"] == "default"), None)
    return (text, config) if isinstance(text, str) else None


def _raise_exception(message: str) -> None:
    raise UserError(f"the chat template rejects this conversation: {message}")
