"""Messages: what is read, what is refused, and that nothing else happens."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm_jax.live import protocol
from sanawm_jax.live.protocol import ProtocolError, parse

ROOT = Path(__file__).parents[3]
GOOD = {
    "hello": '{"type":"hello","version":1,"session":"abc"}',
    "control": '{"type":"control","number":7,"at":1.5,"keys":"wd","stick":[0,1,-1,0.5],'
    '"look":[3,-4],"move":2,"turn":0.5}',
    "pause": '{"type":"pause","on":true}',
    "prompt": '{"type":"prompt","text":"a room"}',
    "go": '{"type":"go","node":3}',
    "reset": '{"type":"reset"}',
    "scene": '{"type":"scene","name":"day"}',
    "path": '{"type":"path","points":[[0,1],[2,3]],"move":1}',
    "stop": '{"type":"stop"}',
    "ping": '{"type":"ping","at":5}',
}


def test_every_message_is_read() -> None:
    assert GOOD.keys() == protocol.FROM_PAGE.keys()
    for name, text in GOOD.items():
        assert type(parse(text)) is protocol.FROM_PAGE[name]
    control = parse(GOOD["control"])
    assert isinstance(control, protocol.Control)
    assert control.keys == frozenset("wd") and control.stick == (0, 1, -1, 0.5)
    assert (control.look, control.move, control.turn) == ((3, -4), 2, 0.5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "bytes"),
        ("[" * 20_000, "not JSON"),
        ("[]", "no known type"),
        ('{"type":["go"]}', "no known type"),
        ('{"type":"welcome"}', "no known type"),
        ('{"type":"go"}', "needs node"),
        ('{"type":"go","node":1,"path":"/etc"}', "not known"),
        ('{"type":"go","node":true}', "go.node must be a whole number"),
        ('{"type":"go","node":-1}', "go.node must be a whole number"),
        ('{"type":"go","node":1e999}', "go.node must be a whole number"),
        ('{"type":"ping","at":NaN}', "ping.at must be a number"),
        ('{"type":"control","number":1,"keys":"q"}', "letters of wasdijkl"),
        ('{"type":"control","number":1,"stick":[0,0,0,2]}', "a number from -1 to 1"),
        ('{"type":"control","number":1,"look":[0]}', "a list of 2 to 2"),
        ('{"type":"control","number":1,"move":0}', "a number from 0.1 to 4"),
        ('{"type":"prompt","text":"  "}', "a text of 1 to"),
        ('{"type":"prompt","text":"a\\u0000b"}', "control characters"),
        ('{"type":"prompt","text":"\\ud800"}', "control characters"),
        ('{"type":"path","points":[[0,0]],"move":1}', "a list of 2 to"),
        ('{"type":"path","points":[[0,0],[1e9,0]],"move":1}', "a number from"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(reason)) as caught:
        parse(text)
    assert caught.value.code in protocol.CODES


def test_the_largest_messages_are_read() -> None:
    points = [[0.123456789 * i, -1.0] for i in range(protocol.MAX_POINTS)]
    assert parse(json.dumps({"type": "path", "points": points}))
    assert parse(json.dumps({"type": "prompt", "text": "\U0001f600" * protocol.MAX_PROMPT}))


def damaged(seed: int) -> str:
    """A message with a few random changes."""
    rng = random.Random(seed)
    text = list(rng.choice(list(GOOD.values())))
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(text))
        change = rng.randrange(3)
        letter = rng.choice(['"', "{", "}", "[", "1", "e9", "null", "\\", "\x00", "-", "\ud800"])
        text[at : at + (change > 0)] = [letter] * (change < 2)
        text = text or ["{"]
    return "".join(text)


def test_damaged_messages_are_read_or_refused() -> None:
    read = 0
    for seed in range(12_000):
        try:
            read += dataclasses.is_dataclass(parse(damaged(seed)))
        except ProtocolError as error:
            assert error.code in protocol.CODES
    assert 100 < read < 11_000


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_any_value_of_a_field_is_read_or_refused(name: str, data: st.DataObject) -> None:
    message = json.loads(GOOD[name])
    message[data.draw(st.sampled_from(sorted(message)))] = data.draw(json_values)
    try:
        parse(json.dumps(message))
    except ProtocolError as error:
        assert len(str(error)) < 200


def test_pictures() -> None:
    picture = protocol.Picture(protocol.FRAME, 3, 4, 5, 6, 7.5, 8.5, 1.0, -2.0, 0.5)
    message = picture.pack(9.5) + b"jpeg"
    assert protocol.unpack(message) == (picture, 9.5, b"jpeg")
    assert protocol.HEADER.size == 52  # the page reads the JPEG from there on
    with pytest.raises(ProtocolError):
        protocol.unpack(bytes([1, 99]) + message[2:])


def test_the_page_and_the_documentation_know_every_message() -> None:
    page = (ROOT / "sanawm_jax/live/page/app.js").read_text()
    page += (ROOT / "sanawm_jax/live/page/input.js").read_text()
    docs = (ROOT / "docs/live.md").read_text()
    for name in protocol.FROM_PAGE:
        assert f'type: "{name}"' in page and f"`{name}`" in docs, name
    for name, cls in protocol.FROM_SERVER.items():
        assert re.search(rf"\b{name}\b[:,]", page) and f"`{name}`" in docs, name
        for field in dataclasses.fields(cls):
            assert field.name in docs, (name, field.name)
    assert f"const VERSION = {protocol.VERSION};" in page
    for code, number in protocol.CODES.items():
        assert f"`{code}`" in docs and str(number) in docs
