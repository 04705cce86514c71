"""Prompts to the hidden states that condition the DiT.

Axis letters: B batch, L text tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.gemma import Tower
from sanawm_jax.text.tokenizer import Tokenizer

MAX_LENGTH = 300  # text tokens of the released models

# The instruction that precedes every caption. The released models were trained with exactly this
# string, so it is data: a changed character changes what they see.
CHI_PROMPT: tuple[str, ...] = (
    (
        'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual '
        "descriptions suitable for image generation. Evaluate the level of detail in the user "
        "prompt:"
    ),
    (
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
        "textures, and spatial relationships to create vivid and concrete scenes."
    ),
    (
        "- If the prompt is already detailed, refine and enhance the existing details slightly "
        "without overcomplicating."
    ),
    "Here are examples of how to transform or refine prompts:",
    (
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a "
        "round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of "
        "blooming red flowers."
    ),
    (
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
        "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
        "double-decker bus passing by towering glass skyscrapers."
    ),
    (
        "Please generate only the enhanced description for the prompt below and avoid including"
        " any additional commentary or evaluations:"
    ),
    "User Prompt: ",
)


def encode_texts(
    tower: Tower,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int = MAX_LENGTH,
    chi_prompt: Sequence[str] = CHI_PROMPT,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states of captions after the chi prompt, cut back to the captions.

    The tower reads chi prompt and caption together; BOS and the last L - 1 positions are kept.
    With the released tokenizers those start at the caption's first word, because the chi prompt's
    last token, a space, melts into it.

    Args:
      tower: see `gemma.text_tower`.
      texts: B captions.
      max_length: L, BOS included; longer captions lose their end.
      chi_prompt: its lines; empty reads the captions alone.

    Returns:
      hidden states (B, L, C) and mask (B, L) int32, 0 on padding.

    Raises:
      InputError: max_length is below 2.
    """
    if max_length < 2:
        raise InputError(f"text length {max_length} is too short; use 2 or more")
    chi = "\n".join(chi_prompt)
    total = len(tokenizer.encode(chi)) + max_length - 2 if chi else max_length
    ids, mask = tokenizer([chi + text for text in texts], total)
    hidden = tower(ids, mask)

    if total == max_length:
        return hidden, jax.device_put(mask)
    # XLA's gather of a few rows is one program, where cutting and joining them were three
    rows = np.r_[0, total - max_length + 1 : total]
    return _rows(hidden, rows), jax.device_put(mask[:, rows])


@jax.jit
def _rows(states: jax.Array, rows: np.ndarray) -> jax.Array:
    """States (B, L, C) at some positions."""
    return states[:, rows]


def encode_prompt(
    tower: Tower,
    tokenizer: Tokenizer,
    prompt: str,
    negative_prompt: str = "",
    *,
    max_length: int = MAX_LENGTH,
    chi_prompt: Sequence[str] = CHI_PROMPT,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Conditions of one video; the negative prompt is read without the chi prompt.

    Reference: diffusers `SanaWMPipeline.encode_prompt`.

    Args:
      tower: see `gemma.text_tower`.
      max_length: L.
      chi_prompt: see `encode_texts`.

    Returns:
      cond (1, L, C), its mask (1, L), negative (1, L, C), its mask (1, L); masks are int32.

    Raises:
      InputError: see `encode_texts`.
    """
    cond, cond_mask = encode_texts(
        tower, tokenizer, [prompt], max_length=max_length, chi_prompt=chi_prompt
    )
    negative, negative_mask = encode_texts(
        tower, tokenizer, [negative_prompt], max_length=max_length, chi_prompt=()
    )
    return cond, cond_mask, negative, negative_mask


def read_prompt(text_or_path: str) -> str:
    """The prompt itself, or the contents of the UTF-8 file that it names, stripped.

    Raises:
      InputError: the file is empty or not UTF-8, `something.txt` does not exist, or the text holds
        half characters, as a command line in another encoding gives.
    """
    path = Path(text_or_path)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long, or characters that no path has
        is_file = False
    if not is_file:
        if path.suffix == ".txt" and len(text_or_path.split()) == 1:
            raise InputError(f"prompt file {text_or_path} does not exist")
        try:
            text_or_path.encode()
        except UnicodeEncodeError:
            raise InputError("the prompt is not UTF-8 text; give it as a UTF-8 file") from None
        return text_or_path
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text ({error.reason})") from None
    if not text:
        raise InputError(f"prompt file {path} is empty")
    return text
