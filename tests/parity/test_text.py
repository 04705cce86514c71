"""Text encoder, tokenizer and prompt encoding against transformers and diffusers."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)
from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    GemmaTokenizer,
    GemmaTokenizerFast,
)

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.core.params import apply, build, count, leaves
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.config import GEMMA_2_2B, GemmaConfig
from sanawm_jax.text.gemma import GemmaTower, Tower, text_tower
from sanawm_jax.text.keys import key_table, load_text_encoder
from sanawm_jax.text.prompts import CHI_PROMPT, encode_prompt
from sanawm_jax.text.tokenizer import Tokenizer
from tests.parity.compare import randomise, relative

BASE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=4,
    attn_logit_softcapping=2.0,
)
FULL_FIRST = ["full_attention", "full_attention", "sliding_attention"]
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "no_softcap": dict(attn_logit_softcapping=None),
    "released_softcap": dict(attn_logit_softcapping=50.0),
    "window_of_1": dict(sliding_window=1),
    "window_beyond_text": dict(sliding_window=4096),
    "one_key_head": dict(num_key_value_heads=1),
    "key_head_for_each": dict(num_key_value_heads=4),
    "three_queries_a_key": dict(hidden_size=48, num_attention_heads=6),
    "head_of_10": dict(head_dim=10, query_pre_attn_scalar=7),
    "head_of_2": dict(head_dim=2),
    "full_first": dict(layer_types=FULL_FIRST),
    "all_full": dict(layer_types=["full_attention"] * 3, sliding_window=2),
    "theta_and_eps": dict(
        rms_norm_eps=1e-2, rope_parameters=dict(rope_type="default", rope_theta=37.0)
    ),
    "one_layer": dict(num_hidden_layers=1),
}
CAPTIONS = [
    "A room with a red sofa beside a blue table, on a striped green floor.",
    "A street at dusk: a tall white tower, a navy fence and 24 brown trees.",
]


def reference(cls: type = Gemma2Model, seed: int = 0, **over: Any) -> Any:
    """Returns a random reference model; norms and embeddings have the scale of trained ones."""
    return randomise(cls(Gemma2Config(**{**BASE, **over})), seed)


def tokens(rng: np.random.Generator, length: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Ids and a mask with rows of full, short and one-token texts."""
    ids = rng.integers(0, BASE["vocab_size"], (3, length))
    mask = (np.arange(length) < np.array([[length], [length // 2], [1]])).astype(np.int32)
    return ids * mask, mask


def reference_states(model: Any, ids: np.ndarray, mask: np.ndarray) -> list[torch.Tensor]:
    """Every hidden state of the reference, the last one after its final norm."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            output_hidden_states=True,
        )
    return list(out.hidden_states)


def our_states(folder: Path, ids: np.ndarray, mask: np.ndarray, dtype: Any = None) -> np.ndarray:
    """Every hidden state of ours, through the real loader."""
    config, params = load_text_encoder(folder, dtype=dtype)
    graphdef, _ = build(GemmaTower, config)
    compiled = jax.jit(functools.partial(apply, graphdef, all_states=True))
    states = compiled(params, ids, mask)
    return np.asarray(states.astype(jnp.float32))


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = reference(**CASES[case])
    model.save_pretrained(tmp_path)
    ids, mask = tokens(rng)
    theirs = reference_states(model, ids, mask)
    ours = our_states(tmp_path, ids, mask)
    assert len(ours) == len(theirs) == model.config.num_hidden_layers + 1
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert relative(a, b) <= 1e-5, f"hidden state {i}"


@pytest.mark.parametrize("field", ["sliding_window", "attn_logit_softcapping", "rms_norm_eps"])
def test_cases_depend_on_their_field(field: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The parity tests above would detect a field that our code ignores."""
    reference().save_pretrained(tmp_path)
    ids, mask = tokens(rng)
    before = our_states(tmp_path, ids, mask)[-1]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 3}))
    after = our_states(tmp_path, ids, mask)[-1]
    assert relative(after[mask != 0], before[mask != 0]) > 1e-3


def test_bfloat16_is_no_worse_than_the_reference(tmp_path: Path, rng: np.random.Generator) -> None:
    reference(num_hidden_layers=6).bfloat16().save_pretrained(tmp_path)
    ids, mask = tokens(rng, 24)
    theirs, exact = (
        # not .bfloat16(): that rounds the reference's rotary frequencies, loading does not
        reference_states(Gemma2Model.from_pretrained(tmp_path, dtype=dtype).eval(), ids, mask)
        for dtype in (torch.bfloat16, torch.float32)
    )
    ours = our_states(tmp_path, ids, mask)
    assert relative(ours[0], theirs[0].float()) == 0  # embeddings: the scale is rounded alike
    assert relative(ours[-1], exact[-1]) <= 1.2 * relative(theirs[-1].float(), exact[-1])
    assert relative(our_states(tmp_path, ids, mask, np.float32)[-1], exact[-1]) <= 1e-5


@pytest.mark.parametrize("cls", [Gemma2Model, Gemma2ForCausalLM])
@pytest.mark.parametrize("shard", ["12KB", "1GB"])
def test_published_folders(cls: type, shard: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Both prefixes of names, one file or shards, and a separate head, which is not used."""
    model = reference(cls, tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    is_sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert is_sharded == (shard == "12KB")
    assert ("lm_head.weight" in set(SafetensorsFolder(tmp_path).keys())) == (
        cls is Gemma2ForCausalLM
    )
    ids, mask = tokens(rng)
    theirs = reference_states(model, ids, mask)[-1]
    assert relative(our_states(tmp_path, ids, mask)[-1], theirs) <= 1e-5


def test_older_config_file(tmp_path: Path, rng: np.random.Generator) -> None:
    """Configurations without `rope_parameters` and `layer_types`, as that of the release."""
    model = reference(rope_parameters=dict(rope_type="default", rope_theta=50.0))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    for name in ("rope_parameters", "layer_types", "dtype", "use_bidirectional_attention"):
        del raw[name]
    older = dict(rope_theta=50.0, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
    path.write_text(json.dumps({**raw, **older, "torch_dtype": "float32", "eos_token_id": [1, 7]}))
    ids, mask = tokens(rng)
    theirs = reference_states(Gemma2Model.from_pretrained(tmp_path), ids, mask)[-1]
    assert relative(our_states(tmp_path, ids, mask)[-1], theirs) <= 1e-5


def test_names_and_shapes_of_the_2b(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Gemma2ForCausalLM(Gemma2Config())
    theirs = {k: tuple(v.shape) for k, v in model.model.state_dict(prefix="model.").items()}
    _, abstract = build(GemmaTower, GEMMA_2_2B)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    ours = {}
    for entry in key_table(GEMMA_2_2B, "model."):
        shape = shapes[entry.path][len(entry.index) :]
        ours[entry.source] = shape[::-1] if entry.layout == keymap.LINEAR else shape
    assert ours == theirs
    assert count(abstract) == sum(p.numel() for p in model.model.parameters()) == 2_614_341_888
    Gemma2Config().save_pretrained(tmp_path)
    assert GemmaConfig.from_json(read_config(tmp_path)) == GEMMA_2_2B


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/` and `text_encoder/` of the small text encoder."""
    folder = tmp_path_factory.mktemp("small")
    make_small_text_encoder(CAPTIONS, folder)
    return folder


TEXTS = [
    "",
    CAPTIONS[0],
    "\n".join(CHI_PROMPT) + CAPTIONS[1],
    "  Spaces   before,\tafter \n\n and  2048 digits. ",
    "日本 émigré 🙂 naïve",
    "<bos> twice <eos><pad> inside <mask> <unk>",
    "red▁sofa",
]


@pytest.mark.parametrize("cls", [AutoTokenizer, GemmaTokenizer, GemmaTokenizerFast])
@pytest.mark.parametrize("max_length", [2, 7, 300])
def test_token_ids(cls: Any, max_length: int, small: Path) -> None:
    theirs = cls.from_pretrained(small / "tokenizer")
    ours = Tokenizer(small / "tokenizer")
    check_ids(ours, theirs, max_length)
    assert ours.vocab_size == len(theirs)
    assert ours.pad_id == theirs.pad_token_id == 0


def check_ids(ours: Tokenizer, theirs: Any, max_length: int) -> None:
    """The call in the reference pipeline."""
    expected = theirs(
        TEXTS,
        max_length=max_length,
        padding="max_length",
        padding_side="right",
        truncation=True,
        return_tensors="np",
    )
    ids, mask = ours(TEXTS, max_length)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


# name -> (changes to tokenizer.json, changes to tokenizer_config.json)
TOKENIZER_FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flags_do_not_overrule_the_file": ({}, dict(add_bos_token=False, add_eos_token=True)),
    "no_post_processor": (dict(post_processor=None), {}),
    "pad_as_object": ({}, dict(pad_token={"__type": "AddedToken", "content": "<eos>"})),
    "cut_on_the_left": ({}, dict(truncation_side="left")),
    "left_padding_by_default": ({}, dict(padding_side="left")),
    "baked_truncation_and_padding": (
        dict(
            truncation=dict(direction="Left", max_length=3, strategy="LongestFirst", stride=0),
            padding=dict(
                strategy={"Fixed": 9},
                direction="Left",
                pad_to_multiple_of=None,
                pad_id=0,
                pad_type_id=0,
                pad_token="<pad>",
            ),
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", TOKENIZER_FILES)
def test_token_ids_follow_the_files(case: str, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "tokenizer", tmp_path, dirs_exist_ok=True)
    files = ("tokenizer.json", "tokenizer_config.json")
    for name, change in zip(files, TOKENIZER_FILES[case], strict=True):
        raw = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**raw, **change}))
    check_ids(Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path), 6)


@pytest.fixture(scope="module")
def pipeline(small: Path, tmp_path_factory: pytest.TempPathFactory) -> SanaWMPipeline:
    """A tiny pipeline folder of the reference's classes, loaded as a published one is."""
    folder = tmp_path_factory.mktemp("pipeline")
    width = json.loads((small / "text_encoder" / "config.json").read_text())["hidden_size"]
    SanaWMPipeline(
        tokenizer=GemmaTokenizer.from_pretrained(small / "tokenizer"),
        text_encoder=Gemma2Model.from_pretrained(small / "text_encoder"),
        vae=AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
        ),
        transformer=SanaWMTransformer3DModel(
            num_layers=4,
            hidden_size=48,
            num_attention_heads=2,
            linear_head_dim=24,
            in_channels=8,
            caption_channels=width,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "GemmaTokenizer"]
    assert index["text_encoder"] == ["transformers", "Gemma2Model"]
    for name in ("tokenizer", "text_encoder"):  # our files in place of what the reference saved
        shutil.rmtree(folder / name)
        shutil.copytree(small / name, folder / name)
    return SanaWMPipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tower(small: Path) -> Tower:
    """Our text encoder of the same folder."""
    return text_tower(*load_text_encoder(small / "text_encoder", dtype=np.float32))


@pytest.mark.parametrize("max_length", [2, 12, 300])
@pytest.mark.parametrize("chi_prompt", [CHI_PROMPT, ("Describe:", ""), ()])
def test_encode_prompt(
    chi_prompt: tuple[str, ...],
    max_length: int,
    small: Path,
    tower: Tower,
    pipeline: SanaWMPipeline,
) -> None:
    prompt, negative = CAPTIONS[0], "blurry, gray"
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            prompt, negative, max_sequence_length=max_length, chi_prompt=list(chi_prompt)
        )
    ours = encode_prompt(
        tower,
        Tokenizer(small / "tokenizer"),
        prompt,
        negative,
        max_length=max_length,
        chi_prompt=chi_prompt,
    )
    for i in (0, 2):
        assert ours[i].shape == (1, max_length, pipeline.text_encoder.config.hidden_size)
        assert relative(ours[i], theirs[i][:, 0]) <= 1e-5
        np.testing.assert_array_equal(ours[i + 1], theirs[i + 1])


def test_encode_prompt_defaults(small: Path, tower: Tower, pipeline: SanaWMPipeline) -> None:
    with torch.no_grad():
        theirs = pipeline.encode_prompt(CAPTIONS[1], chi_prompt=DEFAULT_CHI_PROMPT)
    ours = encode_prompt(tower, Tokenizer(small / "tokenizer"), CAPTIONS[1])
    for i in (0, 2):
        assert relative(ours[i], theirs[i][:, 0]) <= 1e-5


def test_chi_prompt_is_the_references() -> None:
    assert list(CHI_PROMPT) == DEFAULT_CHI_PROMPT


def test_small_text_encoder_in_the_reference(small: Path, rng: np.random.Generator) -> None:
    """Both published classes load it and agree with ours in every hidden state."""
    ids, mask = Tokenizer(small / "tokenizer")(CAPTIONS, 24)
    ours = our_states(small / "text_encoder", ids, mask, np.float32)
    for cls in (Gemma2Model, Gemma2ForCausalLM):
        model = cls.from_pretrained(small / "text_encoder", dtype=torch.float32)
        for a, b in zip(ours, reference_states(model.eval(), ids, mask), strict=True):
            assert relative(a, b) <= 1e-5


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(model_type="gemma3_text"), "gemma3_text"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (dict(hidden_activation="silu"), "hidden_activation"),
        (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), "rope"),
        (dict(quantization_config={}), "quantization_config"),
        (dict(num_hidden_layers=2), "layer_types"),
        (dict(vocab_size=65), "embed_tokens"),
    ],
)
def test_refuses_what_it_cannot_run(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=said):
        load_text_encoder(tmp_path)
