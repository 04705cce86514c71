"""The small text encoder: its files, and that its features distinguish words."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.gemma import text_tower
from sanawm_jax.text.keys import load_text_encoder
from sanawm_jax.text.prompts import CHI_PROMPT, encode_texts
from sanawm_jax.text.tokenizer import Tokenizer

COLORS = ("red", "teal", "blue", "white", "navy", "black")
KINDS = ("sofa", "table", "lamp", "rug", "crate", "plant")
CAPTIONS = [
    f"{start} room with a {a} {x} beside a {b} {y}, on a striped {c} floor."
    for start in ("A", "Sunny")
    for a, b, c in zip(COLORS[:-2], COLORS[1:-1], COLORS[2:], strict=True)
    for x, y in itertools.pairwise(KINDS)
]
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder's folder, default sizes."""
    root = tmp_path_factory.mktemp("small")
    make_small_text_encoder(CAPTIONS, root)
    return root


def words(text: str) -> list[str]:
    return text.replace(",", " ,").replace(".", " .").split()


def test_files_are_small_and_reproducible(folder: Path, tmp_path: Path) -> None:
    make_small_text_encoder(CAPTIONS, tmp_path)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert [str(f) for f in files] == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file
    assert sum((folder / f).stat().st_size for f in files) < 2_000_000


def test_the_largest_vocabulary_still_fits(tmp_path: Path, rng: np.random.Generator) -> None:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    captions = [" ".join("".join(rng.choice(letters, 7)) for _ in range(9)) for _ in range(200)]
    config = make_small_text_encoder(captions, tmp_path)
    assert config.vocab_size == 2048
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.*")) < 2_000_000


def test_a_word_is_a_token(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "tokenizer")
    chi = "\n".join(CHI_PROMPT)
    before = tokenizer.encode(chi)
    assert len(before) < 1.3 * len(chi.split())
    for caption in CAPTIONS:
        assert len(tokenizer.encode(caption)) == 1 + len(words(caption))
        # the chi prompt's last space is the first word's
        assert tokenizer.encode(chi + caption)[: len(before) - 1] == before[:-1]
        assert len(tokenizer.encode(chi + caption)) == len(before) - 1 + len(words(caption))


def test_other_text_falls_back_to_pieces_and_bytes(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "tokenizer")
    text = "Zwölf 日本 zebras, 2048!"
    ids = tokenizer.encode(text)
    assert tokenizer._tokenizer.token_to_id("<unk>") not in ids
    assert tokenizer._tokenizer.decode(ids) == text


def states(folder: Path, texts: list[str]) -> np.ndarray:
    tower = text_tower(*load_text_encoder(folder / "text_encoder", dtype=np.float32))
    tokenizer = Tokenizer(folder / "tokenizer")
    return np.asarray(encode_texts(tower, tokenizer, texts, max_length=LENGTH)[0])


def test_one_colour_changes_its_word_and_its_noun(folder: Path) -> None:
    a, b = states(folder, [CAPTIONS[0], CAPTIONS[0].replace("red", "black")])
    change = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)
    at = 1 + words(CAPTIONS[0]).index("red")
    assert change[:at].max() == 0
    assert change[at] > 0.9
    assert change[at + 1] > 0.4
    assert change[at + 2 :].max() < change[at]


def test_same_words_in_another_order_differ(folder: Path) -> None:
    caption = CAPTIONS[0]
    swapped = caption.replace("red", "?").replace("teal", "red").replace("?", "teal")
    a, b = states(folder, [caption, swapped])
    for noun in ("sofa", "table"):
        at = 1 + words(caption).index(noun)
        assert np.linalg.norm(a[at] - b[at]) > 0.2 * np.linalg.norm(a[at])


def test_a_colour_is_recognised_in_any_context(folder: Path) -> None:
    """States of one colour word are closer to each other than to those of another colour."""
    contexts = [
        "A {} sofa beside a blue lamp.",
        "A room with a white table, on a striped {} floor.",
        "Sunny room with a black plant beside a {} rug.",
    ]
    texts = [context.format(color) for color in COLORS for context in contexts]
    at = np.array([1 + words(context).index("{}") for context in contexts] * len(COLORS))
    states_at = states(folder, texts)[np.arange(len(texts)), at]
    unit = states_at / np.linalg.norm(states_at, axis=-1, keepdims=True)
    cosine = unit @ unit.T
    color = np.arange(len(texts)) // len(contexts)
    same = color[:, None] == color[None]
    assert cosine[same].min() > 0.6
    assert cosine[~same].max() < 0.45


def test_sizes_are_arguments(tmp_path: Path) -> None:
    config = make_small_text_encoder(["a b"], tmp_path, hidden=64, layers=3, max_vocab=400, seed=7)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 3)
    assert config.vocab_size <= 400
    assert load_text_encoder(tmp_path / "text_encoder")[0] == config
    assert states(tmp_path, ["a b"]).shape == (1, LENGTH, 64)


@pytest.mark.parametrize(
    "captions, options, said",
    [
        ([], {}, "captions"),
        ([" "], {}, "captions"),
        (["a"], dict(hidden=96), "hidden=96"),
        (["a"], dict(max_vocab=300), "max_vocab=300"),
    ],
)
def test_refuses(captions: list[str], options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        make_small_text_encoder(captions, tmp_path, **options)
    assert not any(tmp_path.rglob("*.*"))
