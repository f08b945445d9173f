"""Prompt templates: which texts they have, how often chance takes each, and what each mistake is told."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderfarm.errors import InvalidJob
from renderfarm.templates import Node, Wildcards, parse


@pytest.fixture
def wildcards(tmp_path: Path) -> Wildcards:
    (tmp_path / "words/animals").mkdir(parents=True)
    (tmp_path / "words/colours.txt").write_text("red\n# a remark\n\n{light|dark} green\n", encoding="utf-8-sig")
    (tmp_path / "words/animals/cats.txt").write_text("a __colours__ cat\n")
    (tmp_path / "words/animals/dogs.txt").write_text("3::a dog\na wolf\n")
    return Wildcards(tmp_path / "words")


def texts(text: str, wildcards: Wildcards, **row: object) -> list[str]:
    node = parse(text, wildcards)
    found = list(node.texts(row))
    assert len(found) == node.count, "what is counted is what comes out"
    return found


# The texts, and their order, are those of dynamicprompts 0.31's CombinatorialPromptGenerator, but for the lines marked.
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain, (weighted:1.2) [text] \\(as it is\\)", ["plain, (weighted:1.2) [text] \\(as it is\\)"]),
        ("{a|b}", ["a", "b"]),
        ("{2$$a|b|c}", ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{-2$$a|b}", ["a", "b", "a,b", "b,a"]),
        ("{2-$$a|b}", ["a,b", "b,a"]),
        ("{0-1$$a|b}", ["", "a", "b"]),
        ("{3$$a|b}", ["a,b", "b,a"]),
        ("{0.5::x|y}", ["x", "y"]),
        ("{a|}", ["a", ""]),
        ("{a|a}", ["a"]),
        ("x {a|{b|c}} {d|e}", ["x a d", "x a e", "x b d", "x b e", "x c d", "x c e"]),
        ("{ very |}big", ["very big", "big"]),
        ("a|b", ["a|b"]),
        ("a_b __ c __ d", ["a_b __ c __ d"]),
        ("\\{a\\|b\\}", ["{a|b}"]),  # there the signs keep their backslash
        ("__colours__", ["red", "light green", "dark green"]),  # there in the alphabet's order
        ("{2$$__animals/dogs__}", ["a dog,a wolf", "a wolf,a dog"]),  # there `3::` is painted
        ("__animals/*__", ["a red cat", "a light green cat", "a dark green cat", "a dog", "a wolf"]),
        ("{a ${style} cat|a dog}", ["a wooden cat", "a dog"]),  # there ${…} is a variable of its own
    ],
)
def test_a_template_has_these_texts_in_this_order(template: str, expected: list[str], wildcards: Wildcards) -> None:
    assert texts(template, wildcards, style="wooden") == expected


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("a {b|c", "character 3: a { that nothing closes; write \\{ for the sign itself"),
        ("a b}", "character 4: a } that closes nothing; write \\} for the sign itself"),
        ("{$$a|b}", "$$ without a number before it"),
        ("{3-2$$a|b}", "from 3 to 2 is nothing; write the smaller number first"),
        ("{0::a|0::b}", "every choice has the weight 0"),
        ("{@a|b}", "the job says it, in prompts.templates"),
        ("{" * 60 + "a" + "}" * 60, "more than 50 braces within each other"),
        ("__colour__", "no colour.txt in"),
        ("__colour__", "did you mean __colours__?"),
        ("__animals/../../secret__", "leads out of"),
    ],
)
def test_what_is_no_template_is_told_what_and_where(template: str, told: str, wildcards: Wildcards) -> None:
    with pytest.raises(InvalidJob) as caught:
        parse(template, wildcards)
    assert told in str(caught.value)


def test_a_column_that_a_row_lacks_is_named_with_the_nearest(wildcards: Wildcards) -> None:
    with pytest.raises(InvalidJob, match=r"\$\{stile\}: the row has no such column; did you mean 'style'\?"):
        texts("a ${stile} cat", wildcards, style="x")


def test_no_link_leads_out_of_the_folder(wildcards: Wildcards, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("password\n")
    (wildcards.folder / "innocent.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InvalidJob, match="is a link out of"):
        parse("__innocent__", wildcards)


def test_mistakes_in_a_list_of_words_are_named_with_their_line(wildcards: Wildcards) -> None:
    (wildcards.folder / "bad.txt").write_text("fine\n{never closed\n")
    with pytest.raises(InvalidJob, match=r"words/bad\.txt, line 2: .*nothing closes"):
        parse("__bad__", wildcards)
    (wildcards.folder / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(InvalidJob, match=r"latin\.txt, line 2: not UTF-8"):
        parse("__latin__", wildcards)
    (wildcards.folder / "empty.txt").write_text("# nothing yet\n")
    with pytest.raises(InvalidJob, match="no line in it to choose from"):
        parse("__empty__", wildcards)


def test_lists_that_name_each_other_are_no_endless_text(wildcards: Wildcards) -> None:
    (wildcards.folder / "one.txt").write_text("__two__\n")
    (wildcards.folder / "two.txt").write_text("a __one__\n")
    with pytest.raises(InvalidJob, match="one → two → one"):
        parse("__one__", wildcards)
    (wildcards.folder / "w0.txt").write_text("0123456789\n")
    for level in range(1, 15):
        (wildcards.folder / f"w{level}.txt").write_text(f"__w{level - 1}__ __w{level - 1}__\n")
    with pytest.raises(InvalidJob, match=r"the limit is 100,000"):
        parse("__w14__", wildcards)


def test_chance_takes_each_as_often_as_its_weight_says(wildcards: Wildcards) -> None:
    def drawn(template: str) -> Counter[str]:
        chance, node = random.Random(1), parse(template, wildcards)
        return Counter(node.draw({}, chance) for _ in range(6000))

    def near(found: Counter[str], shares: dict[str, float]) -> bool:
        return found.keys() == shares.keys() and all(abs(found[text] / 6000 - share) < 0.03 for text, share in shares.items())

    assert near(drawn("{3::a|b}"), {"a": 0.75, "b": 0.25})
    assert near(drawn("{0::a|b|c}"), {"b": 0.5, "c": 0.5})
    assert near(drawn("__animals/dogs__"), {"a dog": 0.75, "a wolf": 0.25})
    assert near(drawn("{2$$ $$a|b|c}"), dict.fromkeys(["a b", "a c", "b a", "b c", "c a", "c b"], 1 / 6))
    assert near(drawn("{0-1$$a}"), {"": 0.5, "a": 0.5})


def test_the_same_seed_draws_the_same_text_in_every_version(wildcards: Wildcards) -> None:
    node, chance = parse("{a|b|c|d} {2$$e|f|g} __colours__", wildcards), random.Random(7)
    assert [node.draw({}, chance) for _ in range(3)] == ["a e,g red", "a e,f light green", "d f,g light green"]


WORDS = st.text("ab ,", max_size=3)
TEMPLATES = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: "{" + "|".join(options) + "}"),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: "{1-2$$+$$" + "|".join(options) + "}"),
    ),
    max_leaves=6,
)


@given(TEMPLATES, st.integers(0, 99))
def test_what_is_drawn_is_one_of_the_texts_and_all_are_counted(template: str, seed: int) -> None:
    node: Node = parse(template, Wildcards(Path("nowhere")))
    if node.count < 5000:
        every = list(node.texts({}))
        assert len(every) == node.count
        assert node.draw({}, random.Random(seed)) in every
        assert max(map(len, every)) <= node.longest
