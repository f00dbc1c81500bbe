"""Nothing that commands print makes a terminal obey: every output goes through one function."""

import contextlib
import io
import json

import pytest

from loratools.cli.output import print_json, print_table, say

ODD = "a\x1b[31mred\x07\x9b31m\u202e\u200b\x7f\ud800é 😀×…"


class Terminal(io.TextIOWrapper):
    """A stream of some encoding, whose bytes can be looked at."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="backslashreplace")

    @property
    def text(self):
        self.flush()
        # click writes UTF-8 where a stream claims to be ASCII.
        return self.buffer.getvalue().decode(self.encoding.replace("ascii", "utf-8"))


@pytest.fixture(params=["utf-8", "latin-1", "ascii"])
def terminal(request):
    return Terminal(request.param)


def harmless(text):
    return all(character.isprintable() or character == "\n" for character in text)


def test_text(terminal):
    with contextlib.redirect_stdout(terminal):
        say(ODD)
        print_table(["name"], "<", [[ODD]])
    assert harmless(terminal.text)
    assert terminal.text.startswith(r"a\x1b[31mred\x07\x9b31m\u202e\u200b\x7f\ud800")


def test_json(terminal):
    value = {ODD: [ODD, 1.5]}
    with contextlib.redirect_stdout(terminal):
        print_json(value)
    assert harmless(terminal.text)
    assert json.loads(terminal.text) == value
    assert ("é" in terminal.text) == (terminal.encoding != "ascii")
