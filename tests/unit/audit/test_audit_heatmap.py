"""Token heat-maps: values, colours and texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit_case import Drawn
from trajectories import tokenizer

from megatron_opd.audit.heatmap import SHOWN, TokenTexts, advantages, colour_limit, heat, shade, visible
from megatron_opd.audit.read import fetch
from megatron_opd.errors import ModelError


def row(count: int, **changes: object) -> dict:
    """A scored rollout of ``count`` tokens: 0.5, -0.5, 0.5, ... before, all 0.25 more after."""
    gaps = [0.5 if i % 2 == 0 else -0.5 for i in range(count)]
    return {
        "token_ids": [10 + i % 200 for i in range(count)],
        "student_logprobs": [-1.0] * count,
        "teacher_logprobs": [gap - 1.0 for gap in gaps],
        "gaps": gaps,
        "mask": [True] * count,
        "offset": 0.2,
        "outcome_term": 0.05,
    } | changes


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(tokenizer())


def test_after_is_the_gap_plus_all_that_outcomes_add() -> None:
    before, after, mask = advantages(row(2))
    assert before.tolist() == [0.5, -0.5] and after.tolist() == pytest.approx([0.75, -0.25]) and mask.all()


def test_red_is_the_teacher_and_blue_the_student(texts: TokenTexts) -> None:
    tokens = heat(row(4, mask=[True, True, True, False]), texts, limit=1.0).head
    assert [token.before for token in tokens] == ["t7", "s7", "t7", "x"]  # 10 sqrt(0.5) = 7.07
    assert [token.after for token in tokens] == ["t9", "s5", "t9", "x"]
    assert tokens[0].hint == "token 1, id 10 | student -1.000 | teacher -0.500 | gap +0.500 | after +0.750"
    assert tokens[3].hint.endswith("masked: not trained on")


@pytest.mark.parametrize(
    ("value", "style"),
    [(0.0, ""), (0.001, ""), (0.02, "t1"), (-0.02, "s1"), (1.0, "t5"), (-4.0, "s10"), (4.0, "t10"), (99.0, "t10")],
)
def test_the_colour_grows_with_the_root_up_to_the_limit(value: float, style: str) -> None:
    assert shade(value, True, 4.0) == style
    assert shade(value, False, 4.0) == "x"


def test_a_masked_token_may_have_any_gap(texts: TokenTexts) -> None:
    odd = row(2, gaps=[float("nan"), 0.5], teacher_logprobs=[float("-inf"), -0.5], mask=[False, True])
    assert [token.before for token in heat(odd, texts, 1.0).head] == ["x", "t7"]
    assert colour_limit([odd]) == 1.0
    assert colour_limit([row(2, mask=[False, False])]) == colour_limit([]) == 0.5


def test_the_limit_is_the_same_for_all_maps_and_passes_over_outliers() -> None:
    assert colour_limit([row(400), row(400)]) == 1.0
    assert colour_limit([row(400), row(400, gaps=[9.0] * 4 + [0.1] * 396)]) == 1.0
    assert colour_limit([row(400, gaps=[9.0] * 400)]) == 8.0


def test_a_long_response_shows_its_ends(texts: TokenTexts) -> None:
    whole, cut = heat(row(sum(SHOWN)), texts, 1.0), heat(row(5000), texts, 1.0)
    assert (len(whole.head), whole.left_out, len(whole.tail)) == (sum(SHOWN), 0, 0)
    assert (len(cut.head), cut.left_out, len(cut.tail)) == (SHOWN[0], 5000 - sum(SHOWN), SHOWN[1])
    assert cut.head[-1].hint.startswith(f"token {SHOWN[0]},") and cut.tail[-1].hint.startswith("token 5000,")


def test_token_texts_add_up_to_the_response(drawn: Drawn, texts: TokenTexts) -> None:
    chosen = [int(i) for i in (drawn.rollouts.mean_gap > -9).nonzero()[0][:40]]
    for found in fetch(drawn.files, drawn.rollouts, chosen).values():
        shown = "".join(token.text for token in heat(found, texts, 1.0).head)
        decoded = tokenizer().decode(found["token_ids"])
        assert shown == visible(decoded) and (found["finish_reason"] == "length" or "<|im_end|>" in shown)


def test_each_id_is_decoded_once() -> None:
    class Counting:
        calls = 0

        def decode(self, ids: list[int], **_: object) -> str:
            self.calls += 1
            return "word"

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return "\u2581word" if token_id == 1 else "word"

    counting = Counting()
    texts = TokenTexts(counting)
    assert [texts(i) for i in (1, 2, 1, 2, 1)] == [" word", "word", " word", "word", " word"]
    assert counting.calls == 2


def test_what_cannot_be_seen_or_turns_the_line_around_gets_a_mark() -> None:
    assert visible("a\nb") == "a\u21b5\nb" and visible("\t") == "\u2192\t"
    assert visible("\x00\x1b[31m\x7f") == "\u2400\u241b[31m\u2421"
    assert visible("abc \u202edef\u2066") == "abc \u2426def\u2426"
    assert visible("plain <b> \u00e4\u4e2d\U0001f600") == "plain <b> \u00e4\u4e2d\U0001f600"


def test_a_run_without_its_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as missing:
        TokenTexts.load(tmp_path / "tokenizer")
    assert missing.value.where == tmp_path / "tokenizer" and "tokenizer.json" in missing.value.fix
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        TokenTexts.load(tmp_path / "tokenizer")
