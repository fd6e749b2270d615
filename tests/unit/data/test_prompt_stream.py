import numpy as np
import pytest

from megatron_opd.data.stream import PromptStream
from megatron_opd.errors import DataError
from megatron_opd.records import Prompt


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
