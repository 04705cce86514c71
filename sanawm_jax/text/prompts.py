"""From prompts to the hidden states that condition the DiT.

Axis letters: B batch, L text tokens, C width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.gemma import Tower
from sanawm_jax.text.tokenizer import Tokenizer

MAX_LENGTH = 300  # text tokens of the released models

# The instruction before every caption. The released models were trained with exactly this string,
# so it must not change by a single character.
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
    """Computes the hidden states of captions that follow the chi prompt.

    The text encoder reads the chi prompt and the caption together. Only BOS and the last L - 1
    positions are kept. With the released tokenizers these positions start at the first word of the
    caption, because the last character of the chi prompt, a space, becomes a part of that token.

    Args:
      tower: see `gemma.text_tower`.
      texts: B captions.
      max_length: L, including BOS; longer captions are truncated at the end.
      chi_prompt: the lines of the chi prompt; if it is empty, the captions are read without it.

    Returns:
      hidden states (B, L, C) and mask (B, L) int32, which is 0 on padding.

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
    # A gather of these rows is one program, while slicing and joining them would be three.
    rows = np.r_[0, total - max_length + 1 : total]
    return _rows(hidden, rows), jax.device_put(mask[:, rows])


@jax.jit
def _rows(states: jax.Array, rows: np.ndarray) -> jax.Array:
    """Returns the states (B, L, C) at the given positions."""
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
    """Encodes prompt and negative prompt of one video; the negative one has no chi prompt.

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
    note_if_cut(tokenizer, prompt, max_length, "\n".join(chi_prompt))
    note_if_cut(tokenizer, negative_prompt, max_length)
    cond, cond_mask = encode_texts(
        tower, tokenizer, [prompt], max_length=max_length, chi_prompt=chi_prompt
    )
    negative, negative_mask = encode_texts(
        tower, tokenizer, [negative_prompt], max_length=max_length, chi_prompt=()
    )
    return cond, cond_mask, negative, negative_mask


def note_if_cut(tokenizer: Tokenizer, prompt: str, max_length: int, before: str = "") -> None:
    """Warns of a prompt of which only a part is read.

    Args:
      tokenizer, prompt: what is read.
      max_length: L, tokens of the prompt with its special tokens.
      before: a text that precedes the prompt and has tokens of its own.
    """
    room = max_length + (len(tokenizer.encode(before)) - 2 if before else 0)
    surplus = len(tokenizer.encode(before + prompt)) - room
    if surplus > 0:
        warnings.warn(
            f"the prompt is cut: {surplus} of its tokens come after the {max_length} that are "
            "read; shorten it",
            stacklevel=2,
        )


def read_prompt(text_or_path: str) -> str:
    """Returns the prompt, or the stripped contents of the UTF-8 file that it names.

    Raises:
      InputError: the file is empty or not UTF-8, a file `something.txt` does not exist, or the text
        has invalid characters because the command line uses another encoding.
    """
    path = Path(text_or_path)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a path, or with characters that no path has
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
