import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.data.tokenizer import lacking_tokens, load_tokenizer, same_tokenizer
from megatron_opd.errors import ModelError


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    return caught.value


def difference(a: Path, b: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        same_tokenizer(a, b)
    return caught.value


def test_a_good_folder_loads(model_folder):
    tokenizer = load_tokenizer(model_folder("student"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == 259
    assert tokenizer.decode(tokenizer.encode("2 + 3\n")) == "2 + 3\n"


def test_missing_parts_are_named(model_folder, tmp_path):
    assert refused(tmp_path / "nowhere").what == "No such model folder"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").got == "an empty folder"
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen2"}')
    error = refused(tmp_path / "empty")
    assert (error.what, error.got) == ("The model folder has no tokenizer", "config.json")


def test_no_config_template_or_end_token(model_folder):
    folder = model_folder("a")
    (folder / "config.json").unlink()
    assert refused(folder).what == "The model folder has no config.json"
    assert refused(model_folder("b", template=None)).what == "The tokenizer has no chat template"
    assert refused(model_folder("c", end=None)).what == "The tokenizer has no end token"


def test_a_broken_tokenizer_file(model_folder):
    folder = model_folder("a")
    (folder / "tokenizer.json").write_text("{")
    error = refused(folder)
    assert error.what == "The tokenizer cannot be loaded"
    assert error.where == folder


def test_equal_tokenizers(model_folder):
    same_tokenizer(model_folder("student"), model_folder("teacher"))


def test_a_token_that_only_one_has(model_folder):
    student, teacher = model_folder("student", extra=("Ax", "Bx")), model_folder("teacher", extra=("Ax",))
    error = difference(student, teacher)
    assert error.what == "The tokenizers differ: token 'Bx'"
    assert error.expected == f"id 260 as in {student}"
    assert error.got == f"no such token in {teacher}"


def test_a_token_with_another_id(model_folder):
    student, teacher = model_folder("student", extra=("Ax", "Bx")), model_folder("teacher", extra=("Bx", "Ax"))
    error = difference(student, teacher)
    assert error.what == "The tokenizers differ: token 'Ax' (2 tokens differ)"
    assert error.expected == f"id 259 as in {student}"
    assert error.got == f"id 260 in {teacher}"


def test_another_end_token(model_folder):
    error = difference(model_folder("student"), model_folder("teacher", end="<|endoftext|>"))
    assert error.what == "The tokenizers differ: end token (eos_token)"
    assert error.expected.startswith("'<|im_end|>'")
    assert error.got.startswith("'<|endoftext|>'")


def test_padding_and_template_may_differ(model_folder):
    # The teacher is sent token ids: its own template and padding are never used.
    teacher = model_folder("teacher", template="{{ messages[0]['content'] }}")
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    same_tokenizer(model_folder("student"), teacher)


def test_the_modules_import_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_opd.data.reading, megatron_opd.data.tokenizer, megatron_opd.data.stream\n"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def sees(model_folder):
    """The tokenizer of a student that sees: three marks, and a word, have been added to the text model's."""
    folder = model_folder("sees")
    (folder / "config.json").write_text('{"model_type": "qwen3_vl", "vision_config": {}}')
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_teacher_without_vision_may_lack_what_was_added_for_images(sees, model_folder):
    text = model_folder("text")
    same_tokenizer(sees, text)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<think>"]
    assert lacking_tokens(sees, text) == dict(enumerate(marks, start=259))
    assert lacking_tokens(text, sees) == lacking_tokens(sees, sees) == {}
    assert "<|vision_start|>" in str(difference(text, sees))  # a student must know all that its teacher says


def test_a_teacher_that_uses_an_id_for_another_token_is_refused(sees, model_folder):
    text = model_folder("text")
    tokenizer = load_tokenizer(text)
    tokenizer.add_tokens(["<|other|>"], special_tokens=True)
    tokenizer.save_pretrained(text)
    assert "259" in str(difference(sees, text))


def test_two_models_without_vision_must_have_the_same_tokens(sees, model_folder):
    (sees / "config.json").write_text('{"model_type": "qwen3"}')
    assert "<|vision_start|>" in str(difference(sees, model_folder("text")))
