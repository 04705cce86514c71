"""A tiny Gemma-style text encoder for small worlds: trained tokenizer, random frozen tower.

The folder it writes has the published layout, so everything that loads a Gemma loads it. The
tower is a featuriser: word embeddings are nearly orthogonal, the first layer sees `WINDOW` words
(a noun gets its adjectives), the second the whole text, and both add less than the word itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sanawm_jax.checkpoints import keymap
from sanawm_jax.core.params import Params, build, from_leaves, leaves
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.config import GEMMA2, GEMMA3, GemmaConfig
from sanawm_jax.text.gemma import GemmaTower
from sanawm_jax.text.keys import key_table
from sanawm_jax.text.prompts import CHI_PROMPT

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0..4, as in Gemma
WINDOW = 4
# Each of the sublayers adds half the embedding's size. More, and a word is lost in its context;
# less, and a noun no longer shows its colour.
POST_NORM_SCALE = -0.5
_ARCHITECTURES = {GEMMA2: "Gemma2Model", GEMMA3: "Gemma3TextModel"}
_PRINTABLE = [chr(c) for c in range(32, 127)]


def make_small_text_encoder(
    captions: Sequence[str],
    folder: str | Path,
    *,
    hidden: int = 128,
    layers: int = 2,
    max_vocab: int = 2048,
    chi_prompt: Sequence[str] = CHI_PROMPT,
    model_type: str = GEMMA2,
    seed: int = 0,
) -> GemmaConfig:
    """Writes `folder/tokenizer/` and `folder/text_encoder/`.

    In a pipeline's model_index.json they are `["transformers", "GemmaTokenizer"]` and
    `["transformers", "Gemma2Model"]`, or `"Gemma3TextModel"`. The same arguments write the same
    bytes.

    Args:
      captions: what the tokenizer is trained on, with the chi prompt; a word of either is one
        token unless `max_vocab` is too small, and any other text falls back to pieces and bytes.
      hidden: width C, a multiple of 64: heads have 32 channels, two query heads share a key.
      layers: sliding and full attention in turn.
      max_vocab: most tokens; special tokens, bytes and printable characters take about 360.
      chi_prompt: its lines, see `prompts.encode_texts`.
      model_type: `config.GEMMA2`, which stage 1 reads, or `config.GEMMA3`, which the refiner does.
      seed: of the tower's weights.

    Raises:
      InputError: no captions, or sizes that do not fit.
    """
    if not any(caption.strip() for caption in captions):
        raise InputError("a small text encoder needs captions to train its tokenizer on")
    if hidden % 64:
        raise InputError(f"hidden={hidden} must be a multiple of 64")
    folder = Path(folder)
    # a caption's first word follows a space after the chi prompt, and none without it
    texts = ["\n".join(chi_prompt), *captions, *(f" {caption}" for caption in captions)]
    vocab_size = write_tokenizer(texts, folder / "tokenizer", max_vocab)
    config = GemmaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        model_type=model_type,
        attn_logit_softcapping=50.0 if model_type == GEMMA2 else None,
    )
    _write_tower(config, folder / "text_encoder", seed)
    return config


def _train(texts: Sequence[str], max_vocab: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair encoding that never joins two words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    fixed = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    alphabet = sorted({*_PRINTABLE, *"".join(texts), "▁", "\n"} - {" "})
    room = max_vocab - len(fixed)
    if room < len(alphabet):
        raise InputError(f"max_vocab={max_vocab} is too small; use {len(fixed) + len(alphabet)}")
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {token: i for i, token in enumerate([*fixed, *pieces])}
    return vocab, [tuple(pair) for pair in model["merges"]]


def write_tokenizer(texts: Sequence[str], folder: Path, max_vocab: int) -> int:
    """Trains a tokenizer on `texts`, writes it to `folder` and returns its number of tokens."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    vocab, merges = _train(texts, max_vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    # the pipeline of the published Gemma tokenizer; no space is left for Split to find
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            **names,
        },
    )
    return len(vocab)


def _random_params(config: GemmaConfig, seed: int) -> Params:
    """Weights drawn by numpy, so that no version of jax changes them."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in leaves(build(GemmaTower, config)[1]):
        if path.endswith(".kernel"):
            value = leaf.shape[-2] ** -0.5 * rng.standard_normal(leaf.shape)
        elif path == "embed_table":
            value = config.hidden_size**-0.5 * rng.standard_normal(leaf.shape)
        else:
            post = path.startswith("layers.post_")
            value = np.full(leaf.shape, POST_NORM_SCALE if post else 0.0)
        # bfloat16 numbers are exact in float32 too: either compute dtype sees the same weights
        flat[path] = value.astype(ml_dtypes.bfloat16)
    return from_leaves(flat)


def _write_tower(config: GemmaConfig, folder: Path, seed: int) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = keymap.export(key_table(config), _random_params(config, seed))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_json(
        folder / "config.json",
        {
            "architectures": [_ARCHITECTURES[config.model_type]],
            "model_type": config.model_type,
            "dtype": "bfloat16",
            "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
            "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
            "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
            "hidden_activation": "gelu_pytorch_tanh",
            **config.to_json(),
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
