"""Model cards: what an author wrote stays byte for byte, and two calls change only what changed."""

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratools.hub.card import CardFacts, table, updated
from loratools.hub.front_matter import split, values_of
from loratools_formats.disk.errors import AdapterError

KEYS = {
    "base_model": "me/base",
    "base_model_relation": "adapter",
    "library_name": "peft",
    "license": "apache-2.0",
    "tags": ["lora", "base_model:adapter:me/base"],
}
FACTS = CardFacts("small", KEYS, ["## How it was made", table(["a"], [["1"]])])

AUTHORS = {
    "none": b"# Mine\n\nText.\n",
    "no end of line": b"# Mine",
    "empty": b"",
    "comments": b"---\n# of mine\nlanguage: en  # English\n\nlicense: mit\n---\n# Mine\n",
    "block list": b"---\ntags:   # these\n  - 'lora'\n  -   mine\n\nlicense: mit\n---\nText\n",
    "flow list": b"---\ntags: [mine, \"two words\"]  # these\n---\nText\n",
    "empty list": b"---\ntags: []\n---\nText\n",
    "one tag": b"---\ntags: mine\n---\nText\n",
    "one tag, quoted": b"---\ntags: 'two words'  # mine\nlicense: mit\n---\nText\n",
    "one number": b"---\ntags: 2024\n---\nText\n",
    "flow list of lines": b"---\ntags: [mine,\n  other]  # these\n---\nText\n",
    "flow list, open": b"---\ntags: [mine, other,]\n---\nText\n",
    "null": b"---\ntags:\nlicense: ~\n---\nText\n",
    "other base": b"---\nbase_model: other/base\n---\nText\n",
    "nested": b"---\nwidget:\n- text: x\n  output:\n  - task: {type: t}\n---\nText\n",
    "windows": b"---\r\nlicense: mit\r\ntags:\r\n- mine\r\n---\r\n# Mine\r\n\r\nText\r\n",
    "unicode": "---\nlicense: mit\n---\n# Größe — 中文\n".encode(),
    "rule in the text": b"---\nlicense: mit\n---\nText\n\n---\n\nmore\n---\n",
    "quoted key": b"---\n\"license\": 'mit'\n---\nText\n",
}  # fmt: skip


def is_subsequence(small, large):
    """Return whether lines stand in this order among others."""
    rest = iter(large)
    return all(line in rest for line in small)


@pytest.mark.parametrize("card", AUTHORS.values(), ids=AUTHORS)
def test_the_text_and_keys_of_an_author_stay(card):
    made = updated(card, FACTS)
    before, after = values_of(card), values_of(made)
    for key, value in before.items():
        if value is None or key == "tags":
            continue
        assert after[key] == value
    assert set(KEYS) <= set(after)
    theirs = before.get("tags") or []
    assert after["tags"][: len(theirs) if isinstance(theirs, list) else 1] == (
        theirs if isinstance(theirs, list) else [theirs]
    )
    assert set(KEYS["tags"]) <= set(after["tags"])
    _, front, body = split(card)
    if front and b"tags: " not in front and b"~" not in front:
        assert is_subsequence(front.splitlines(), split(made)[1].splitlines())
    body = body.removeprefix(b"\n").removeprefix(b"\r\n") if front else card
    assert body in made


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (b"tags: x", b"tags:\n- x\n"),
        (b"tags: 'two words'  # mine", b"tags:\n- 'two words'  # mine\n"),
        (b"'tags' : x", b"'tags' :\n- x\n"),
        (b"tags: 2024", b"tags:\n- 2024\n"),
        (b"tags: [a, b,]  # c", b"tags: [a, b, lora, base_model:adapter:me/base]  # c\n"),
        (b"tags: [a,\n  b]", b"tags: [a,\n  b, lora, base_model:adapter:me/base]\n"),
    ],
)
def test_a_tag_keeps_its_spelling_in_the_list_that_it_begins(theirs, ours):
    front = b"---\n# of mine\nlicense: mit  # yes\n" + theirs + b"\nother: [1,  2]\n---\nText\n"
    made = updated(front, FACTS)
    assert b"# of mine\nlicense: mit  # yes\n" + ours in made
    assert b"\nother: [1,  2]\n" in made
    before = values_of(front)["tags"]
    first = before if isinstance(before, list) else [before]
    assert values_of(made)["tags"] == [*first, *KEYS["tags"]]
    assert updated(made, FACTS) == made


def test_a_flow_mapping_is_refused_with_a_step_that_works():
    with pytest.raises(AdapterError, match="without a guess") as caught:
        updated(b"---\n{tags: x}\n---\nText\n", FACTS)
    assert "no_card" in (caught.value.hint or "")
    told = "".join(f"{key}: {value}\n" for key, value in KEYS.items())
    assert updated(f"---\n{told}---\nText\n".encode(), FACTS).endswith(b"loratools:end -->\n")


@pytest.mark.parametrize("card", AUTHORS.values(), ids=AUTHORS)
def test_the_second_call_changes_nothing(card):
    made = updated(card, FACTS)
    assert updated(made, FACTS) == made


@pytest.mark.parametrize("card", AUTHORS.values(), ids=AUTHORS)
def test_the_library_reads_it(card):
    made = updated(card, FACTS).decode()
    data = ModelCard(made).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == yaml.safe_load(split(made.encode())[1])["base_model"]
    assert ModelCard(str(ModelCard(made))).data.to_dict() == data


def test_what_changed_changes_and_nothing_else():
    first = updated(AUTHORS["block list"], FACTS)
    other = {**KEYS, "base_model": "me/other", "tags": ["lora", "base_model:adapter:me/other"]}
    del other["base_model_relation"]
    second = updated(first, CardFacts("small", other, FACTS.parts))
    values = values_of(second)
    assert values["base_model"] == "me/other"
    assert values["tags"] == ["lora", "mine", "base_model:adapter:me/other"]
    assert "base_model_relation" not in values
    assert values["license"] == "mit"
    changed = [
        line for line in second.splitlines() if line not in first.splitlines()
    ]  # fmt: skip
    assert all(b"me/other" in line for line in changed)
    assert b"  - 'lora'\n  -   mine\n" in second


def test_a_value_that_the_author_edited_is_the_authors():
    first = updated(None, FACTS)
    edited = first.replace(b"license: apache-2.0", b"license: mit  # I decide")
    second = updated(edited, FACTS)
    assert b"license: mit  # I decide\n" in second
    assert updated(second, FACTS) == second


def test_what_the_author_writes_around_the_section_stays():
    first = updated(None, FACTS)
    head, tail = b"Before.\n\n", b"\nAfter.\n"
    edited = first.replace(b"<!-- loratools:begin", head + b"<!-- loratools:begin") + tail
    second = updated(edited, CardFacts("small", KEYS, ["## Other"]))
    assert head in second
    assert second.endswith(tail)
    assert b"## Other" in second
    assert b"How it was made" not in second


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: mit\n# never ends\n",
        b"---\n{license: mit}\n---\n",
        b"---\n- a\n---\n",
        b"---\na: b: c\n---\n",
        b"---\na: &x 1\nb: *x\n---\n",
        b"<!-- loratools:begin {} -->\n",
        b"<!-- loratools:end -->\n",
        b'<!-- loratools:begin {"keys": 3} --> <!-- loratools:end -->\n',
    ],
)
def test_damaged_cards_are_refused(card):
    with pytest.raises(AdapterError, match=r"README\.md"):
        updated(card, FACTS)


VALUES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(
            VALUES, st.integers(-(10**18), 10**18), st.lists(VALUES, max_size=3), st.booleans()
        ),
        max_size=4,
    ),
    st.sampled_from(["safe", "flow"]),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))),
)
def test_any_front_matter_keeps_its_values(values, style, text):
    written = yaml.safe_dump(values, allow_unicode=True, sort_keys=False,
                             default_flow_style=None if style == "flow" else False)  # fmt: skip
    card = f"---\n{written}---\n{text}".encode()
    try:
        made = updated(card, FACTS)
    except AdapterError:
        assert not values or style == "flow" or "---" in written
        return
    after = values_of(made)
    for key, value in values.items():
        if key != "tags":
            assert after[key] == value
    assert made.count(text.encode()) >= 1
    assert updated(made, FACTS) == made
