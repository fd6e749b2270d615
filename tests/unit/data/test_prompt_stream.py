import numpy as np
import pytest

from megatron_opd.config import LazyConfig
from megatron_opd.data.pass_rates import PassRates
from megatron_opd.data.stream import LazyStream, PromptStream
from megatron_opd.errors import DataError
from megatron_opd.records import Outcome, Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), domain="math", text="q", token_ids=(1,), answer="1") for i in range(count)]


def ids(drawn: list[Prompt]) -> list[int]:
    return [int(prompt.id) for prompt in drawn]


def test_each_epoch_draws_every_prompt_once_and_in_another_order():
    stream = PromptStream(prompts(10), seed=3)
    epochs = [ids(stream.take(10)) for _ in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (stream.position, stream.epoch) == (40, 4)


def test_a_take_may_cross_epochs():
    whole = ids(PromptStream(prompts(5), seed=1).take(15))
    stream = PromptStream(prompts(5), seed=1)
    assert ids(stream.take(3)) + ids(stream.take(9)) + ids(stream.take(0)) + ids(stream.take(3)) == whole


@pytest.mark.parametrize("position", [0, 4, 7, 14, 7000])
def test_resuming_draws_what_the_first_stream_would_have_drawn(position: int):
    first = PromptStream(prompts(7), seed=5)
    first.take(position)
    second = PromptStream(prompts(7), seed=5)
    second.restore(first.state())
    assert ids(second.take(20)) == ids(first.take(20))


def test_going_back_draws_the_same_again():
    stream = PromptStream(prompts(6), seed=0)
    first = ids(stream.take(15))
    stream.restore(PromptStream(prompts(6), seed=0).state())
    assert ids(stream.take(15)) == first


def test_the_seed_decides_the_order():
    orders = {tuple(ids(PromptStream(prompts(20), seed=seed).take(20))) for seed in (0, 1, 2, -1)}
    assert len(orders) == 4


def test_refused():
    with pytest.raises(DataError, match="at least one prompt"):
        PromptStream([], seed=0)
    with pytest.raises(DataError, match="before its beginning"):
        PromptStream(prompts(2), seed=0).restore(PromptStream(prompts(2), seed=0).state() | {"position": np.array(-1)})
    with pytest.raises(DataError, match="cannot be used"):  # the state of other prompts
        PromptStream(prompts(2), seed=0).restore(PromptStream(prompts(3), seed=0).state())


def test_repeats_make_a_prompt_appear_as_often_in_each_epoch():
    repeated = [Prompt(str(i), "math", "q", (1,), "1", repeats=1 + 2 * (i == 1)) for i in range(3)]
    stream = PromptStream(repeated, seed=0)
    for _ in range(3):
        assert sorted(ids(stream.take(5))) == [0, 1, 1, 1, 2]
    assert stream.epoch == 3


def test_outcomes_are_counted_by_prompt_and_unknown_ones_are_not():
    stream = PromptStream(prompts(3), seed=0)
    stream.observe([("1", Outcome.CORRECT), ("1", Outcome.INCORRECT), ("2", Outcome.UNKNOWN), ("1", Outcome.CORRECT)])
    graded, passes = stream.pass_counts()
    assert graded.tolist() == [0, 3, 0] and passes.tolist() == [0, 2, 0]
    stream.observe([])
    again = PromptStream(prompts(3), seed=0)
    again.restore(stream.state())
    assert again.pass_counts()[0].tolist() == [0, 3, 0]


def lazy(count: int, seed: int = 0, known: PassRates | None = None, **options) -> LazyStream:
    return LazyStream(prompts(count), seed, LazyConfig(**options), known)


def shares(stream: LazyStream, draws: int, each: int) -> np.ndarray:
    drawn = np.bincount([number for _ in range(draws) for number in ids(stream.take(each))], minlength=4)
    return drawn / drawn.sum()


def test_a_lazy_draw_follows_the_weights_of_what_was_learned():
    stream = lazy(4)
    learned = {"0": (8, 8), "1": (4, 8), "2": (0, 8)}  # passes of graded; nothing is known of "3"
    for name, (passed, graded) in learned.items():
        stream.observe([(name, Outcome.CORRECT)] * passed + [(name, Outcome.INCORRECT)] * (graded - passed))
    # E[p (1 - p)] under Beta(a, b) is a b / ((a + b) (a + b + 1)).
    weights = np.array([a * b / ((a + b) * (a + b + 1)) for a, b in ((9, 1), (5, 5), (1, 9), (1, 1))])
    assert shares(stream, 4000, 1) == pytest.approx(weights / weights.sum(), abs=0.03)


def test_a_lazy_step_has_no_prompt_twice_unless_it_must_and_never_forgets_one():
    stream = lazy(6)
    assert len(set(ids(stream.take(6)))) == 6
    assert sorted(ids(stream.take(12))) == sorted([*range(6)] * 2)
    stream.observe([("0", Outcome.CORRECT)] * 50)
    assert any(0 in ids(stream.take(3)) for _ in range(500))


def test_a_lazy_stream_resumes_to_the_prompt():
    first = lazy(50, seed=3)
    for _ in range(5):
        first.observe([(prompt.id, Outcome(i % 2)) for i, prompt in enumerate(first.take(8))])
    second = lazy(50, seed=3)
    second.restore(first.state())
    assert ids(second.take(20)) == ids(first.take(20)) != ids(lazy(50, seed=4).take(20))


def test_a_lazy_stream_begins_with_what_is_known_and_repeats_multiply():
    counts = np.array([8, 8, 8])
    known = PassRates(["2", "0", "other"], ["math"] * 3, counts, counts, np.array([4, 8, 1]), "m", {})
    assert lazy(3, known=known).pass_counts()[1].tolist() == [8, 0, 4]
    twice = LazyStream([Prompt("0", "m", "q", (1,), "1"), Prompt("1", "m", "q", (1,), "1", 3)], 0, LazyConfig(), None)
    assert np.mean([ids(twice.take(1))[0] for _ in range(4000)]) == pytest.approx(0.75, abs=0.03)
