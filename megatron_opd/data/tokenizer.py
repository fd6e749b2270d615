"""Tokenizers of local model folders: loading one, and comparing a teacher's with the student's.

Distillation compares log-probs token by token, so both models must give every id the same meaning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.errors import ModelError
from megatron_opd.runtime import env
from megatron_opd.runtime.vision import has_vision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these transformers builds an empty tokenizer and says nothing.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

SAMPLE_PROMPT = [{"role": "user", "content": "What is 2 + 3?"}]  # rendered to compare chat templates


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint, with a chat template and an end token. Raises ModelError."""
    _check_files(folder)
    env.quiet_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its parsers raise anything for a broken folder
        got = f"{type(error).__name__}: {error}"
        raise ModelError("The tokenizer cannot be loaded", where=folder, got=got) from error
    if not tokenizer.chat_template:
        raise ModelError(
            "The tokenizer has no chat template",
            where=folder,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="take an instruction-tuned model, or add the template",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "The tokenizer has no end token",
            where=folder,
            expected="eos_token in tokenizer_config.json",
            fix="add the token that ends the assistant's turn",
        )
    return tokenizer


def same_tokenizer(a_folder: Path, b_folder: Path) -> None:
    """Raise ModelError that names the first difference between two tokenizers; return if there is none.

    What ``lacking_tokens`` gives is no difference.
    """
    a, b = load_tokenizer(a_folder), load_tokenizer(b_folder)
    lacking = set(_lacking(a, b).values()) if has_vision(a_folder) and not has_vision(b_folder) else set()
    difference = _vocabulary_difference(a, b, lacking) or _special_difference(a, b, lacking)
    if difference:
        what, got_a, got_b = difference
        raise ModelError(
            f"The tokenizers differ: {what}",
            where=f"{a_folder} and {b_folder}",
            got=f"{got_b} in {b_folder}",
            expected=f"{got_a} as in {a_folder}",
            fix="take models of the same family, or copy the tokenizer files if the vocabularies are the same",
        )


def lacking_tokens(student: Path, teacher: Path) -> dict[int, str]:
    """The student's tokens, by id, that the tokenizer of a teacher without vision lacks: marks of images, and others
    that were added to the student's vocabulary. All else must be the same (``same_tokenizer``).

    Such a teacher can be asked about every text without them. Raises ModelError.
    """
    if not has_vision(student) or has_vision(teacher):
        return {}
    return _lacking(load_tokenizer(student), load_tokenizer(teacher))


def _lacking(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens of ``a``, by id, whose text ``b`` does not have and whose id ``b`` gives to no other token."""
    ids = b.get_vocab()
    taken = set(ids.values())
    added = {number: token.content for number, token in a.added_tokens_decoder.items()}
    return {number: text for number, text in added.items() if text not in ids and number not in taken}


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError("No such model folder", where=folder.absolute(), fix="give a Hugging Face checkpoint folder")
    present = sorted(path.name for path in folder.iterdir())
    listing = ", ".join(present[:12]) or "an empty folder"
    if "config.json" not in present:
        raise ModelError("The model folder has no config.json", where=folder, got=listing, expected="config.json")
    if not any(name in present for name in VOCABULARY_FILES):
        expected = f"one of {', '.join(VOCABULARY_FILES)}"
        raise ModelError("The model folder has no tokenizer", where=folder, got=listing, expected=expected)


def _vocabulary_difference(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, lacking: set[str]
) -> tuple[str, str, str] | None:
    """The token with the lowest id that the two do not share, but for those that ``b`` may lack."""
    ids_a, ids_b = a.get_vocab(), b.get_vocab()
    tokens = (ids_a.keys() | ids_b.keys()) - lacking
    different = [token for token in tokens if ids_a.get(token) != ids_b.get(token)]
    if not different:
        return None

    def lowest_id(token: str) -> tuple[int, str]:
        return min(ids[token] for ids in (ids_a, ids_b) if token in ids), token

    def show(ids: dict[str, int]) -> str:
        return f"id {ids[token]}" if token in ids else "no such token"

    token = min(different, key=lowest_id)
    more = f" ({len(different)} tokens differ)" if len(different) > 1 else ""
    return f"token {token!r}{more}", show(ids_a), show(ids_b)


def _special_difference(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, lacking: set[str]
) -> tuple[str, str, str] | None:
    """The first role that the two give to different tokens, the end token before all.

    A teacher that ends its turn with another token would teach the student never to end its own.
    """
    roles_a, roles_b = ({**tokenizer.special_tokens_map} for tokenizer in (a, b))
    for role in [role for role, token in roles_a.items() if token in lacking]:
        del roles_a[role]
    for role in dict.fromkeys(["eos_token", "bos_token", *roles_a, *roles_b]):
        if role != "pad_token" and roles_a.get(role) != roles_b.get(role):  # nothing is ever padded with a token
            name = "end token (eos_token)" if role == "eos_token" else role
            return name, repr(roles_a.get(role)), repr(roles_b.get(role))
    return None


def same_template(student: Path, teacher: Path, key: str) -> None:
    """Raise ModelError, which names ``key``, unless both chat templates make the same text of a sample prompt.

    Two templates may differ in comments, or in what is never used here, such as tools.
    """
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    texts = [
        tokenizer.apply_chat_template(SAMPLE_PROMPT, tokenize=False, add_generation_prompt=True)
        for tokenizer in (ours, theirs)
    ]
    if texts[0] != texts[1]:
        raise ModelError(
            "A teacher's chat template is not the student's",
            where=f"{key}.model, {teacher}",
            got=repr(texts[1]),
            expected=f"{texts[0]!r}, as {student} has it",
            fix=f"take the teacher's template for the student, or set {key}.other_template=true: "
            "it is then asked with the student's, which it may not know",
        )
